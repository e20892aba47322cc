"""Retrieval tasks: texts with something to find, and the questions about it. Most follow RULER (arXiv 2404.06654).

Imports what ``workload`` imports; ``measure`` and ``tune`` ask the questions.
"""

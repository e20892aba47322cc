"""What measurements run on: models, texts, devices, and the description of machine and software.

Imports ``records``, in whose form it describes them. ``measure`` and ``tune`` import it.
"""

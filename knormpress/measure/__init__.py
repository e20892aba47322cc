"""Measure a method on a model: latency, memory, quality and retrieval, one module each, and the grid of a sweep.

Every figure is measured for the full cache too, in the same run, and returned in the form that ``records`` stores.
Imports ``workload``, ``methods``, ``records`` and ``stats``; ``tune``, ``cli`` and ``pytest_plugin`` import it.
"""

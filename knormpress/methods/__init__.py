"""The methods that can be measured: key norms, other scores, the full cache, presses of kvpress, and their registry.

A method is a callable that takes the model and returns a context manager, which yields a function that makes a fresh
cache: ``with method(model) as new_cache``. Imports ``cache`` and ``policy``; ``measure`` and ``tune`` import it.
"""

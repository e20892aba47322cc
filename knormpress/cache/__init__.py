"""The pruned cache and what makes it exact: layers, storage, selection, masks, attention, saving, generation.

Imports only ``policy``. Needs torch and transformers.
"""

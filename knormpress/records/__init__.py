"""Stored results: their schema, the files that hold them, their git commits, their history. No torch.

Imports ``policy`` and ``stats``. ``workload`` and ``measure`` make records; ``compare``, ``show`` and the commands read
them.
"""

"""The ``knormpress`` command: ``app`` parses, ``actions`` does the work, ``options`` has the shared options.

Its commands import what they need when they run, so that ``--help`` needs no torch; nothing imports it.
"""

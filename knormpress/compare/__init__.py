"""Verdicts: a run compared with an earlier one, two commits, and the quick guide's promises. No torch.

Imports ``records`` and ``stats``; ``show``, ``cli`` and ``pytest_plugin`` import it.
"""

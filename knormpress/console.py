"""The terminal that tables and progress are written to."""

from __future__ import annotations

import os

from rich.console import Console

__all__ = ["make_console"]


def make_console(*, stderr: bool = False) -> Console:
    """A console on stdout, or on ``stderr``. Where ``NO_COLOR`` is set it has neither colours nor bold or dim text."""
    # rich leaves bold and dim in, and their escape codes with them.
    return Console(stderr=stderr, color_system=None if os.environ.get("NO_COLOR") else "auto")

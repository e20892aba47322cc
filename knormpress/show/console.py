"""The terminal for tables and progress."""

from __future__ import annotations

import os

from rich.console import Console

__all__ = ["make_console"]


def make_console(*, stderr: bool = False) -> Console:
    """A console on stdout or ``stderr``. If ``NO_COLOR`` is set, it has no colours and no bold or dim text."""
    # With NO_COLOR alone, rich keeps bold and dim text with their escape codes.
    return Console(stderr=stderr, color_system=None if os.environ.get("NO_COLOR") else "auto")

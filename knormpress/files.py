"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a place beside ``path`` to write to, which is renamed over ``path`` at the end.

    A kill at any moment leaves what was at ``path``, or the whole of what comes in its place; after an error the former
    stands, and nothing is left beside it.

    Raises:
        OSError: ``path`` can't be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        beside.replace(path)
    finally:
        with suppress(OSError):  # what went wrong before is to be told, and not that there is nothing to remove
            beside.unlink()

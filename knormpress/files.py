"""Write files atomically: a file is never left half written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write to; it is renamed to ``path`` at the end.

    If the process is killed, ``path`` holds either the old file or the complete new one. After an error it holds the
    old file, and the temporary file is removed.

    Raises:
        OSError: ``path`` can't be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(OSError):  # report the first error, not that there is no temporary file to remove
            temporary.unlink()

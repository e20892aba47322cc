"""Write files atomically: a file is never left half written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from knormpress.errors import KnormError

__all__ = ["make_folder", "make_room", "replacing"]


def make_room(path: Path) -> None:
    """Make the folder of ``path``, so that a file can be written there later.

    Raises:
        KnormError: there is a folder at ``path``, or its own folder can't be made or written to.
    """
    if path.is_dir():
        raise KnormError(f"{path} is a folder; name a file to write to")
    make_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make ``folder`` if it is missing.

    Raises:
        KnormError: it can't be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KnormError(f"nothing can be written to {folder} ({error.strerror}); name another place") from error
    if not os.access(folder, os.W_OK):
        raise KnormError(f"nothing can be written to {folder}: it is read-only; name another place")


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

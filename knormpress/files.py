"""Write files atomically: a file is never left half written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from knormpress.errors import KnormError

__all__ = ["make_folder", "replacing", "room_for", "writing"]


@contextmanager
def room_for(*paths: Path) -> Iterator[None]:
    """Make the folders of ``paths``, so that files can be written there inside the context.

    After an error, the folders that were made and are still empty are removed again.

    Raises:
        KnormError: one of ``paths`` is a folder or a device, or its folder can't be made or written to.
    """
    missing = [folder for path in paths for folder in path.parents if not folder.exists()]
    try:
        for path in paths:
            if not _is_replaceable(path):
                raise KnormError(f"{path} is a {'folder' if path.is_dir() else 'device'}; name a file to write to")
            make_folder(path.parent)
        yield
    except BaseException:
        for folder in sorted(set(missing), reverse=True):  # a folder comes before those that hold it
            with suppress(OSError):
                folder.rmdir()
        raise


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
    old file, and the temporary file is removed. A symbolic link stays, and the file that it names is replaced.

    Raises:
        OSError: ``path`` can't be written, or is not a file: renaming would put a file in place of a device.
    """
    if not _is_replaceable(path):
        raise OSError(errno.EINVAL, "not a file", str(path))
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(OSError):  # report the first error, not that there is no temporary file to remove
            temporary.unlink()


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """``replacing``, with errors in one line.

    Raises:
        KnormError: ``path`` can't be written.
    """
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise KnormError(f"{path} can't be written ({error.strerror}); use another file") from error


def _is_replaceable(path: Path) -> bool:
    return path.is_file() or not path.exists()

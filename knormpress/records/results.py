"""The results file of a sweep: what it holds already, and what is added."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path

from knormpress.files import make_folder
from knormpress.progress import Progress
from knormpress.records.jsonl import read_records, store_record
from knormpress.records.schema import Record

__all__ = ["Results"]


class Results:
    """A JSON Lines file that grows by one record at a time; ``known`` are the records that it held at the start.

    Args:
        path: the file, created with the first record if it is missing.
        fresh: begin a new file. The old one is not read, and is renamed when the first new record is added.
        progress: is told so.

    Raises:
        KnormError: the file can't be read, or its folder can't be written to; the file is unchanged.
    """

    def __init__(self, path: Path, *, fresh: bool, progress: Progress) -> None:
        make_folder(path.parent)
        self._path, self._progress = path, progress
        self._old_name = _free_name(path) if fresh and path.exists() else None
        self.known: Sequence[Record] = () if fresh or not path.exists() else tuple(read_records(path))

    def add(self, record: Record) -> None:
        """Add a record as one line.

        Raises:
            KnormError: it can't be written; then it is shown, so that what was measured is not lost.
        """
        if self._old_name is not None:
            self._path.rename(self._old_name)
            self._progress.say(f"the earlier results are now in {self._old_name}")
            self._old_name = None
        store_record(self._path, record, self._progress)


def _free_name(path: Path) -> Path:
    """The first of results.1.jsonl, results.2.jsonl, ... that does not exist."""
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in count(1))
    return next(name for name in names if not name.exists())

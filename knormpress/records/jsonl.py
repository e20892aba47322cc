"""JSON Lines files of records: incomplete lines are never written, and never read as records."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock
from pydantic import ValidationError

from knormpress.errors import KnormError
from knormpress.files import replacing
from knormpress.progress import Progress
from knormpress.records.figures import Strict
from knormpress.records.schema import SCHEMA_VERSION, Entry, Record

__all__ = ["append_record", "fault", "parse_entry", "read_entries", "read_records", "store_record"]


def append_record(path: Path, record: Strict) -> None:
    """Add ``record`` as one line to the JSON Lines file ``path``.

    If the process is killed, the file has either its old or its new contents. Processes that append in the same folder
    wait for each other: each holds the folder's lock file while it writes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / ".knormpress.lock"):
        before = path.read_bytes() if path.exists() else b""
        if before and not before.endswith(b"\n"):
            before += b"\n"  # keep the new line apart from an incomplete last line
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(before + record.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def store_record(path: Path, record: Strict, progress: Progress) -> None:
    """Add ``record`` to the file; if that fails, show it, so that what was measured is not lost.

    Raises:
        KnormError: it can't be written.
    """
    try:
        append_record(path, record)
    except OSError as error:
        progress.say(record.model_dump_json())
        raise KnormError(
            f"the finished record can't be written to {path} ({error.strerror}); it is printed above: make room, and "
            "add it to the file as a line"
        ) from error


def read_records(path: Path) -> Iterator[Record]:
    """The records of a JSON Lines file, in order; empty lines are skipped.

    Raises:
        KnormError: the file can't be read, or a line is not a complete record of this schema version.
    """
    try:
        # Not splitlines(): a name may contain U+2028 or another line end that JSON does not escape.
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise KnormError(
            f"no records can be read from {path} ({error.strerror}); measure first: knormpress sweep"
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield Record.model_validate_json(line)
        except ValidationError as error:
            raise KnormError(
                f"{path} line {number} is not a complete record of schema version {SCHEMA_VERSION} ({fault(error)}); "
                "correct or remove that line, or start over with --fresh"
            ) from error


def read_entries(path: Path) -> Iterator[Entry] | None:
    """The entries of a JSON Lines file, in order; None if it can't be read or does not begin with an entry.

    Raises:
        KnormError: a later line is not a complete entry of this schema version.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        first = json.loads(lines[0]) if lines else {}
    except (OSError, ValueError):
        return None
    if not isinstance(first, dict) or "run" not in first:
        return None
    return (parse_entry(line, f"{path} line {number}") for number, line in enumerate(lines, start=1))


def parse_entry(text: str, where: str) -> Entry:
    """Read an entry from the JSON ``text``.

    Raises:
        KnormError: it is not a complete entry of this schema version; ``where`` names its place in the message.
    """
    try:
        return Entry.model_validate_json(text)
    except ValidationError as error:
        raise KnormError(
            f"{where} is not a complete entry of schema version {SCHEMA_VERSION} ({fault(error)}); "
            "correct it, or move that file away"
        ) from error


def fault(error: ValidationError) -> str:
    """The first problem, in a few words."""
    first = error.errors()[0]
    if first["loc"] == ("schema_version",):
        return f"its schema_version is {first['input']!r}"
    return f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}"

"""The stored runs of pytest.

Entries are in the folder ``knormpress`` of pytest-benchmark's storage (``.benchmarks``), one JSON Lines file per run.
Entries in pytest-benchmark's own files are read too. What people decided about the runs is in ``records.decisions``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from knormpress.errors import KnormError
from knormpress.records.decisions import Acceptance, Decision, Pin, current_name, read_decisions
from knormpress.records.jsonl import append_record, parse_entry
from knormpress.records.schema import SCHEMA_VERSION, Entry

__all__ = ["EXTRA_INFO", "History", "shortened", "store"]

EXTRA_INFO = "knormpress"
"""The key of a benchmark's ``extra_info`` that holds its entry."""

_FOLDER = "knormpress"


def store(storage: Path, entry: Entry) -> Path:
    """Add ``entry`` to the file of its run, and return the file's path."""
    commit = (entry.environment.git_commit or "no-commit")[:12]
    path = storage / _FOLDER / f"{commit}_{entry.run}.jsonl"
    append_record(path, entry)
    return path


@dataclass(frozen=True)
class History:
    """The contents of a storage, oldest first.

    Args:
        entries: one for each test of each run.
        outdated: node ids of tests with entries of another schema version, and that version.
        notes: messages about files that were skipped.
        repository: a folder in the repository of the commits; the current directory unless given.
        decisions: see ``records.decisions``.
    """

    entries: tuple[Entry, ...]
    outdated: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    repository: Path | None = None
    decisions: tuple[Decision, ...] = ()

    @property
    def pinned(self) -> str | None:
        """The commit that all runs are compared with, beside their ancestors; None if there is none."""
        pins = (decision.commit for decision in reversed(self.decisions) if isinstance(decision, Pin))
        return next(pins, None)

    @property
    def accepted(self) -> tuple[Acceptance, ...]:
        """The accepted losses, oldest first."""
        return tuple(decision for decision in self.decisions if isinstance(decision, Acceptance))

    @classmethod
    def read(cls, storage: Path) -> History:
        """Read every entry and decision in the folder ``storage``, which may be missing.

        Raises:
            KnormError: a file is not complete JSON. It is not skipped, since it may hold the reference run.
        """
        decisions = read_decisions(storage)
        entries: dict[tuple[str, str], Entry] = {}
        outdated: dict[str, object] = {}
        notes: list[str] = []

        def add(data: Any, where: str) -> None:
            if not isinstance(data, dict):
                raise KnormError(f"{where} is not an entry but {shortened(data)}; correct it, or move that file away")
            if data.get("schema_version") != SCHEMA_VERSION:
                outdated[str(data.get("test"))] = data.get("schema_version")
                return
            entry = parse_entry(json.dumps(data), where)
            entries[entry.run, entry.test] = entry

        for path in sorted(storage.rglob("*.json")):
            data = _load(path)
            benchmarks = data.get("benchmarks") if isinstance(data, dict) else None
            if not isinstance(benchmarks, list):
                notes.append(f"{path} is not a file of pytest-benchmark and was skipped")
                continue
            for benchmark in benchmarks:
                extra = benchmark.get("extra_info") if isinstance(benchmark, dict) else None
                entry = extra.get(EXTRA_INFO) if isinstance(extra, dict) else None
                if isinstance(entry, dict):
                    add(entry, str(path))
        for path in sorted(storage.glob(f"{_FOLDER}/*.jsonl")):
            for number, line in enumerate(_read(path).split(b"\n"), start=1):
                if line.strip():
                    add(_parse(line, f"{path} line {number}"), f"{path} line {number}")
        oldest_first = sorted(entries.values(), key=lambda entry: entry.created)
        named = [entry.model_copy(update={"test": current_name(entry, decisions)}) for entry in oldest_first]
        return cls(tuple(named), outdated, tuple(notes), decisions=decisions)

    def without(self, runs: Collection[str]) -> History:
        """The history without the entries of ``runs``."""
        return replace(self, entries=tuple(entry for entry in self.entries if entry.run not in runs))


def shortened(value: object) -> str:
    """``value`` as text of at most 160 characters."""
    text = str(value)
    return text if len(text) <= 160 else f"{text[:157]}..."


def _load(path: Path) -> Any:
    return _parse(_read(path), str(path))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise KnormError(f"{path} can't be read ({error.strerror}); make it readable, or move it away") from error


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise KnormError(
            f"{where} is not complete JSON ({error}); it may hold a reference run: correct it, or move that file away"
        ) from error

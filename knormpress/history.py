"""The stored runs, and which of them a run is to be compared with. Torch-free.

Entries are kept in a folder ``knormpress`` within pytest-benchmark's storage (``.benchmarks``), one JSON Lines file a
run, so that no two processes write to one file; those that pytest-benchmark stored with its own figures are read too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from knormpress.commits import ancestors, is_shallow
from knormpress.errors import KnormError
from knormpress.records import SCHEMA_VERSION, Entry, append_record, parse_entry
from knormpress.verdicts import Verdict, judge, machine_class

__all__ = ["EXTRA_INFO", "History", "judge_commits", "judge_newest", "store"]

EXTRA_INFO = "knormpress"
"""The key of a benchmark's ``extra_info`` that holds its entry."""

_FOLDER = "knormpress"
_POOLED_RUNS = 5


def store(storage: Path, entry: Entry) -> Path:
    """Add ``entry`` to the file of its run; returns the file."""
    commit = (entry.environment.git_commit or "no-commit")[:12]
    path = storage / _FOLDER / f"{commit}_{entry.run}.jsonl"
    append_record(path, entry)
    return path


@dataclass(frozen=True)
class History:
    """What a storage holds, oldest first.

    Args:
        entries: one for each test of each run.
        outdated: node ids of tests with entries of another schema version, and that version.
        notes: what was passed over.
        repository: a folder in the repository of the commits; the current one unless given.
    """

    entries: tuple[Entry, ...]
    outdated: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    repository: Path | None = None

    @classmethod
    def read(cls, storage: Path) -> History:
        """Read every entry below ``storage``; a folder that is not there holds none.

        Raises:
            KnormError: a file is cut short or no JSON: what it held may be the very baseline, so it is not passed over.
        """
        found: dict[tuple[str, str], Entry] = {}
        outdated: dict[str, object] = {}
        notes: list[str] = []

        def add(data: Any, where: str) -> None:
            if not isinstance(data, dict):
                raise KnormError(f"{where} is no entry but {_short(data)}; mend it, or move that file away")
            if data.get("schema_version") != SCHEMA_VERSION:
                outdated[str(data.get("test"))] = data.get("schema_version")
                return
            entry = parse_entry(json.dumps(data), where)
            found[entry.run, entry.test] = entry

        for path in sorted(storage.rglob("*.json")):
            data = _load(path)
            benchmarks = data.get("benchmarks") if isinstance(data, dict) else None
            if not isinstance(benchmarks, list):
                notes.append(f"{path} is no file of pytest-benchmark and was passed over")
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
        entries = sorted(found.values(), key=lambda entry: entry.created)
        return cls(tuple(entries), outdated, tuple(notes))

    def verdict(self, now: Sequence[Entry], thresholds: Mapping[str, float], base: str | None = None) -> Verdict:
        """Judge entries of one test, measured by one commit, against the nearest ancestor's.

        Args:
            now: the entries, oldest first; they may be among the stored ones.
            thresholds: see ``verdicts.THRESHOLDS``.
            base: the commit to compare with, in place of the nearest ancestor that has data.

        Raises:
            KnormError: the clone is shallow, and the baseline may be among the commits it lacks.
        """
        last = now[-1]
        runs = {entry.run for entry in now}
        others = [entry for entry in self.entries if entry.run not in runs]
        same_test = [entry for entry in others if entry.test == last.test]
        if not same_test:
            if last.test in self.outdated:
                version = self.outdated[last.test]
                return _none(
                    last,
                    "incomparable",
                    f"stored by schema version {version}, this is {SCHEMA_VERSION}: measure the baseline again",
                )
            if others:
                return _none(last, "new", "other tests have a history, this one has none")
            return _none(last, "no-baseline", "nothing is stored yet")
        sound = [entry for entry in same_test if _is_sound(entry)]
        if not sound:
            return _none(last, "no-baseline", f"all {len(same_test)} earlier runs failed, regressed or were dirty")
        alike = [entry for entry in sound if not _difference(entry, last)]
        if not alike:
            return _none(last, "incomparable", _difference(sound[-1], last))
        reachable, note = _reachable(alike, last, base, self.repository)
        if not reachable:
            return _none(last, "no-baseline", note)
        machine = machine_class(last.environment)
        same_machine = [entry for entry in reachable if machine_class(entry.environment) == machine]
        chosen = same_machine or reachable
        nearest = chosen[0]
        pooled = [
            entry
            for entry in chosen
            if entry.environment.git_commit == nearest.environment.git_commit
            and machine_class(entry.environment) == machine_class(nearest.environment)
        ]
        pooled = sorted(pooled, key=lambda entry: entry.created)[-_POOLED_RUNS:]
        where = "" if same_machine else " on another machine"
        commit = (nearest.environment.git_commit or "no commit")[:12]
        runs_of = "" if len(pooled) == 1 else f", {len(pooled)} runs"
        return judge(pooled, now, thresholds, f"against {commit}{where}{runs_of}{note}")

    def without(self, runs: Collection[str]) -> History:
        """All but the entries of ``runs``."""
        return replace(self, entries=tuple(entry for entry in self.entries if entry.run not in runs))

    def vanished(self, run: str, tests: Sequence[str], expected: Callable[[str], bool]) -> list[Verdict]:
        """The tests of the newest earlier sound run that are not among ``tests``, if they are ``expected`` there."""
        earlier = [entry for entry in self.entries if entry.run != run]
        if not earlier:
            return []
        newest = earlier[-1].run
        gone = [e for e in earlier if e.run == newest and e.test not in tests and expected(e.test)]
        return [_none(entry, "missing", f"measured on {entry.created[:10]}, not there any more") for entry in gone]


def judge_newest(history: History, thresholds: Mapping[str, float]) -> list[Verdict]:
    """The newest stored run, test by test, and the tests that have vanished since the one before it.

    Raises:
        KnormError: nothing is stored, or as for ``History.verdict``.
    """
    if not history.entries:
        raise KnormError("no run is stored; make one with: pytest tests/perf tests/quality --knorm-save")
    run = history.entries[-1].run
    newest = [entry for entry in history.entries if entry.run == run]
    tests = [entry.test for entry in newest]
    return [*(history.verdict([entry], thresholds) for entry in newest), *history.vanished(run, tests, lambda _: True)]


def judge_commits(history: History, base: str, head: str, thresholds: Mapping[str, float]) -> list[Verdict]:
    """All stored runs of the commit ``head``, pooled, against all of ``base``, test by test.

    Raises:
        KnormError: nothing is stored of ``head``.
    """
    tests: dict[str, list[Entry]] = {}
    for entry in history.entries:
        if entry.environment.git_commit == head:
            tests.setdefault(entry.test, []).append(entry)
    if not tests:
        raise KnormError(f"no test of {head[:12]} has stored an entry; do they use the knorm_* fixtures?")
    gone = [
        _none(entry, "missing", f"measured at {base[:12]}, not there at {head[:12]}")
        for entry in {e.test: e for e in history.entries if e.environment.git_commit == base}.values()
        if entry.test not in tests
    ]
    return [*(history.verdict(entries, thresholds, base) for entries in tests.values()), *gone]


def _none(entry: Entry, word: Any, reason: str) -> Verdict:
    return Verdict(entry.test, word, reason)


def _is_sound(entry: Entry) -> bool:
    return entry.passed and not entry.environment.git_dirty and "regressed" not in entry.verdicts.values()


def _difference(before: Entry, now: Entry) -> str:
    """The first condition in which two entries differ, in words; empty if they can be compared."""
    pairs: dict[str, tuple[object, object]] = {
        "model": (before.model.fingerprint, now.model.fingerprint),
        "dtype": (before.model.dtype, now.model.dtype),
        "text": (before.text.sha256, now.text.sha256),
        "method": (before.method, now.method),
    }
    for name in dict.fromkeys((*before.conditions, *now.conditions)):
        pairs[name] = (before.conditions.get(name), now.conditions.get(name))
    for name, (old, new) in pairs.items():
        if old != new:
            return f"{name} was {_short(old)} and is {_short(new)}"
    return ""


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 160 else f"{text[:157]}..."


def _reachable(
    entries: Sequence[Entry], now: Entry, base: str | None, repository: Path | None
) -> tuple[list[Entry], str]:
    """The entries that may be the baseline, the nearest first, and what to say of them."""
    commit = now.environment.git_commit
    newest_first = sorted(entries, key=lambda entry: entry.created, reverse=True)
    if base is not None:
        found = [entry for entry in newest_first if entry.environment.git_commit == base]
        return found, "" if found else f"nothing sound is stored of {base[:12]}"
    if commit is None:
        return newest_first, " (no git to tell the ancestor)"
    line = ancestors(commit, repository)
    if not now.environment.git_dirty:
        # A clean commit is compared with what came before it, and only for want of that with itself.
        line = [*line[1:], commit]
    rank = {ancestor: number for number, ancestor in enumerate(line)}
    found = [entry for entry in newest_first if entry.environment.git_commit in rank]
    if found:
        return sorted(found, key=lambda entry: rank[str(entry.environment.git_commit)]), ""
    if is_shallow(repository):
        raise KnormError(
            f"this clone is shallow, and the stored runs of {now.test} are of commits that it lacks; "
            "fetch the history (git fetch --unshallow, or fetch-depth: 0)"
        )
    return [], f"none of {len(entries)} stored runs is of an ancestor of {commit[:12]}"


def _load(path: Path) -> Any:
    return _parse(_read(path), str(path))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise KnormError(f"{path} can't be read ({error.strerror}); mend it, or move it away") from error


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise KnormError(
            f"{where} is no whole JSON ({error}); a baseline may be lost with it: mend it, or move that file away"
        ) from error

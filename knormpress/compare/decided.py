"""Make the decisions about stored runs: pin a commit, accept a loss, tell the new name of a test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from knormpress.compare.commits import resolve_commit
from knormpress.compare.stored import judge_entries
from knormpress.compare.verdicts import THRESHOLDS, judge
from knormpress.errors import KnormError
from knormpress.records.decisions import Acceptance, Pin, Rename, covers
from knormpress.records.git import head
from knormpress.records.history import History, shortened
from knormpress.records.schema import Entry

__all__ = ["accept", "pin", "rename"]

_NOTHING = "none"
_PARTS = ("latency", "memory", "quality", "retrieval", "cost")


def pin(history: History, name: str) -> Pin | None:
    """The decision to compare with the commit called ``name``, or with none; None if it is pinned already.

    Raises:
        KnormError: there is no such commit, or no run of it is stored, and this is not the commit that is checked out.
    """
    commit = None if name == _NOTHING else resolve_commit(name)
    if commit == history.pinned:
        return None
    if commit not in (None, head(), *(entry.environment.git_commit for entry in history.entries)):
        raise KnormError(
            f"no run of {name} ({str(commit)[:12]}) is stored, so it can't be pinned; check it out and store one: "
            "pytest --knorm-save"
        )
    return Pin(commit=commit)


def accept(history: History, test: str, metric: str, why: str, thresholds: Mapping[str, float]) -> list[Acceptance]:
    """The decisions to accept what ``metric`` lost in the newest run of ``test``.

    Args:
        history: the stored runs.
        test: a test's node id; or that of a function or file, for all its tests that lost.
        metric: a name in ``verdicts.THRESHOLDS``.
        why: the reason, for those who read the next reports.
        thresholds: the allowed losses.

    Raises:
        KnormError: there is no such metric or test, no reason, nothing was lost, or the newest run was of uncommitted
            changes.
    """
    if metric not in THRESHOLDS:
        raise KnormError(f"there is no metric {metric!r}; wanted one of {', '.join(THRESHOLDS)}")
    if not why.strip():
        raise KnormError("--why is empty; wanted the reason why the loss is accepted")
    newest = {entry.test: entry for entry in history.entries if covers(test, entry.test)}
    if not newest:
        raise KnormError(f"no run of {test} is stored; wanted {_known(history)}")
    dirty = [entry.test for entry in newest.values() if entry.environment.git_dirty]
    if dirty:
        raise KnormError(f"the newest run of {dirty[0]} was of uncommitted changes; commit them, and run it again")
    found = [one for entry in newest.values() for one in _losses(history, entry, metric, why, thresholds)]
    if not found:
        raise KnormError(f"{metric} lost nothing in the newest run of {test}, so there is nothing to accept")
    return found


def _losses(
    history: History, entry: Entry, metric: str, why: str, thresholds: Mapping[str, float]
) -> Iterator[Acceptance]:
    if any((one.metric, one.entry.run, one.entry.test) == (metric, entry.run, entry.test) for one in history.accepted):
        return
    for finding in judge_entries(history, [entry], thresholds).findings:
        # The run may have had other thresholds, from a mark.
        if finding.metric == metric and "regressed" in (finding.word, entry.verdicts.get(metric)):
            before, now = finding.figures
            yield Acceptance(metric=metric, before=before, now=now, why=why, entry=_part_with(entry, metric))


def _part_with(entry: Entry, metric: str) -> Entry:
    """``entry`` with no other measurement than the one that holds ``metric``."""
    for kept in _PARTS:
        others: dict[str, Any] = {part: None for part in _PARTS if part != kept}
        part = entry.model_copy(update=others)
        if metric in {finding.metric for finding in judge([part], [part], THRESHOLDS, "").findings}:
            return part
    return entry


def rename(history: History, old: str, new: str) -> Rename:
    """The decision that the stored runs of ``old`` are those of ``new``: a test, a function or a file.

    Raises:
        KnormError: there is no run of ``old``, or one run holds both, so that they are two tests.
    """
    runs = {(entry.run, entry.test) for entry in history.entries}
    moved = [(run, test) for run, test in runs if covers(old, test)]
    if not moved:
        raise KnormError(f"no run of {old} is stored; wanted {_known(history)}")
    for run, test in moved:
        other = new + test[len(old) :]
        if (run, other) in runs:
            raise KnormError(
                f"{test} and {other} were measured in the same run, so they are two tests; nothing is renamed"
            )
    return Rename(old=old, new=new)


def _known(history: History) -> str:
    tests = dict.fromkeys(entry.test for entry in history.entries)
    return f"a test, such as {shortened(', '.join(tests))}" if tests else "stored runs: pytest --knorm-save"

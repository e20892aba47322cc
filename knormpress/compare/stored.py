"""Find the reference among the stored runs, and judge stored runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from knormpress.compare.verdicts import TIMED, Finding, Verdict, Word, judge, machine_class, slower, summed
from knormpress.errors import KnormError
from knormpress.records.decisions import Acceptance
from knormpress.records.git import ancestors, is_shallow
from knormpress.records.history import History, shortened
from knormpress.records.schema import SCHEMA_VERSION, Entry

__all__ = ["judge_commits", "judge_entries", "judge_newest", "vanished_tests"]

_POOLED_RUNS = 5


def judge_entries(
    history: History, now: Sequence[Entry], thresholds: Mapping[str, float], base: str | None = None
) -> Verdict:
    """Judge entries of one test at one commit, compared with the nearest ancestor commit that has data.

    A loss since the pinned commit fails too; without an ancestor that has data, the pinned commit is the reference.
    What was accepted takes the place of an older reference and of an older pin, for its metric alone.

    Args:
        history: the stored runs.
        now: the entries, oldest first; they may be in ``history`` too.
        thresholds: see ``verdicts.THRESHOLDS``.
        base: the commit to compare with, instead of the nearest ancestor and the pinned commit.

    Raises:
        KnormError: the clone is shallow, and the reference may be at a commit that it lacks.
    """
    last = now[-1]
    reference = _reference(history, now, base)
    pinned = None if base or history.pinned == last.environment.git_commit else history.pinned
    accepted = _accepted(history, last, base)
    verdict = reference.judge(now, thresholds)
    if not pinned and not accepted:
        return verdict
    findings = {finding.metric: finding for finding in verdict.findings}
    notes = [reference.reason]
    since: dict[str, tuple[Finding, str]] = {}
    if pinned:
        pin = _reference(history, now, pinned)
        judged = pin.judge(now, thresholds)
        since = {finding.metric: (finding, f"since the pinned {pinned[:12]}") for finding in judged.findings}
        if not pin.entries:
            notes.append(f"not compared with the pinned {pinned[:12]}: {judged.reason}")
        elif not reference.entries:
            notes.append(f"only the pinned commit can be compared: {pin.reason}")
    distance = _distances(last, history.repository)
    for one in sorted(accepted, key=lambda one: distance(one.entry), reverse=True):
        level = next((f for f in judge([one.entry], now, thresholds, "").findings if f.metric == one.metric), None)
        # At one commit the reference's own runs stand. Without git nothing tells which is nearer.
        nearer = [
            last.environment.git_commit is None or distance(one.entry) < distance(other.nearest)
            for other in ((reference, pin) if pinned else (reference,))
        ]
        if level is None or not any(nearer):
            continue
        where = (one.entry.environment.git_commit or "no commit")[:12]
        unlike = _unlike(one, level, last)
        if unlike:
            notes.append(f"{one.metric} was accepted at {where}, {unlike}, so it is not applied")
            continue
        if nearer[0]:
            findings[one.metric] = level
            notes.append(f"{one.metric} as accepted at {where} by {one.who}: {one.why}")
        if nearer[1:] == [True]:
            since[one.metric] = level, f"since it was accepted at {where}"
    for metric, (finding, when) in since.items():
        if finding.word == "regressed" and (metric not in findings or findings[metric].word != "regressed"):
            findings[metric] = replace(finding, reason=f"{finding.reason}, {when}")
        elif not reference.entries:
            findings.setdefault(metric, finding)
    reason = "; ".join(notes)
    return summed(last.test, tuple(findings.values()), reason) if findings else replace(verdict, reason=reason)


def _accepted(history: History, now: Entry, base: str | None) -> list[Acceptance]:
    """What was accepted for ``now``, but not up to ``base``: its own runs have that level."""
    accepted = [one for one in history.accepted if one.entry.test == now.test and not _difference(one.entry, now)]
    of_base = ancestors(base, history.repository) if base and accepted else []
    return [one for one in accepted if one.entry.environment.git_commit not in of_base]


def _unlike(accepted: Acceptance, level: Finding, now: Entry) -> str:
    """Why ``now`` can't be compared with the accepted ``level``, in words; empty if it can."""
    old, new = accepted.entry.environment, now.environment
    if accepted.metric in TIMED and machine_class(old) != machine_class(new):
        return "on another machine"
    if level.word != "incomparable":
        return ""
    same_versions = (old.torch, old.transformers) == (new.torch, new.transformers)
    return "under other conditions" if same_versions else "under other versions"


def _distances(now: Entry, repository: Path | None) -> Callable[[Entry | None], float]:
    """How many commits back an entry is; infinite if ``now`` does not come from its commit, 0 without git."""
    commit = now.environment.git_commit
    place = {} if commit is None else {one: number for number, one in enumerate(ancestors(commit, repository))}

    def distance(entry: Entry | None) -> float:
        if entry is None:
            return math.inf
        return 0 if commit is None else place.get(entry.environment.git_commit or "", math.inf)

    return distance


@dataclass(frozen=True)
class _Reference:
    """The entries to compare with, and what is said of them; or none, the word for that, and the reason."""

    entries: Sequence[Entry]
    reason: str
    word: Word = "no-baseline"

    @property
    def nearest(self) -> Entry | None:
        return self.entries[-1] if self.entries else None

    def judge(self, now: Sequence[Entry], thresholds: Mapping[str, float]) -> Verdict:
        if not self.entries:
            return Verdict(now[-1].test, self.word, self.reason)
        return judge(self.entries, now, thresholds, self.reason)


def _reference(history: History, now: Sequence[Entry], base: str | None) -> _Reference:
    """The newest runs of ``base``, or of the nearest ancestor commit that has data."""
    last = now[-1]
    runs = {entry.run for entry in now}
    others = [entry for entry in history.entries if entry.run not in runs]
    same_test = [entry for entry in others if entry.test == last.test]
    if not same_test:
        if last.test in history.outdated:
            version = history.outdated[last.test]
            reason = f"stored with schema version {version}, wanted {SCHEMA_VERSION}: measure the reference again"
            return _Reference((), reason, "incomparable")
        if others:
            return _Reference((), "other tests have stored runs, this one has none", "new")
        return _Reference((), "nothing is stored yet")
    sound = [entry for entry in same_test if _is_sound(entry)]
    if not sound:
        return _Reference((), f"all {len(same_test)} earlier runs failed, regressed or were dirty")
    comparable = [entry for entry in sound if not _difference(entry, last)]
    if not comparable:
        return _Reference((), _difference(sound[-1], last), "incomparable")
    reachable, note = _reachable(comparable, last, base, history.repository)
    if not reachable:
        return _Reference((), note)
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
    where = "" if same_machine else _elsewhere(machine, machine_class(nearest.environment))
    commit = (nearest.environment.git_commit or "no commit")[:12]
    runs_of = "" if len(pooled) == 1 else f", {len(pooled)} runs"
    return _Reference(pooled, f"against {commit}{where}{runs_of}{note}")


def _elsewhere(machine: Mapping[str, object], other: Mapping[str, object]) -> str:
    """How the machine of the reference differs from this one, in words."""
    differing = [name for name in machine if machine[name] != other[name]]
    if differing == ["threads"]:
        return f" with {other['threads']} threads in place of {machine['threads']}"
    return " on another machine"


def vanished_tests(history: History, run: str, tests: Sequence[str], expected: Callable[[str], bool]) -> list[Verdict]:
    """The tests of the newest run before ``run`` that are not in ``tests``, if ``expected`` is true for them."""
    earlier = [entry for entry in history.entries if entry.run != run]
    if not earlier:
        return []
    newest = earlier[-1].run
    missing = [e for e in earlier if e.run == newest and e.test not in tests and expected(e.test)]
    return [_none(entry, "missing", f"measured on {entry.created[:10]}, but missing now") for entry in missing]


def judge_newest(history: History, thresholds: Mapping[str, float]) -> list[Verdict]:
    """Judge the newest stored run, test by test, and the tests that are missing since the run before it.

    A time that did not regress by the run's own verdict is no more than noise here: only the run could measure twice.

    Raises:
        KnormError: nothing is stored, or as for ``judge_entries``.
    """
    if not history.entries:
        raise KnormError("no run is stored; store one: pytest tests/perf tests/quality --knorm-save")
    run = history.entries[-1].run
    newest = [entry for entry in history.entries if entry.run == run]
    tests = [entry.test for entry in newest]
    return [
        *(_as_in_its_run(judge_entries(history, [entry], thresholds), entry) for entry in newest),
        *vanished_tests(history, run, tests, lambda _: True),
    ]


def _as_in_its_run(verdict: Verdict, entry: Entry) -> Verdict:
    cleared = {metric for metric in slower(verdict) if entry.verdicts.get(metric, "regressed") != "regressed"}
    if not cleared:
        return verdict
    findings = [
        replace(
            finding,
            word="noise",
            reason=f"{finding.reason}: {entry.verdicts[finding.metric]} in its own run, which can measure twice",
        )
        if finding.metric in cleared
        else finding
        for finding in verdict.findings
    ]
    return summed(verdict.test, findings, verdict.basis)


def judge_commits(history: History, base: str, head: str, thresholds: Mapping[str, float]) -> list[Verdict]:
    """Compare all stored runs of the commit ``head``, pooled, with all of ``base``, test by test.

    Raises:
        KnormError: no run of ``head`` is stored.
    """
    tests: dict[str, list[Entry]] = {}
    for entry in history.entries:
        if entry.environment.git_commit == head:
            tests.setdefault(entry.test, []).append(entry)
    if not tests:
        raise KnormError(f"no test of {head[:12]} stored an entry; use the knorm_* fixtures in the tests")
    missing = [
        _none(entry, "missing", f"measured at {base[:12]}, but missing at {head[:12]}")
        for entry in {e.test: e for e in history.entries if e.environment.git_commit == base}.values()
        if entry.test not in tests
    ]
    return [*(judge_entries(history, entries, thresholds, base) for entries in tests.values()), *missing]


def _none(entry: Entry, word: Word, reason: str) -> Verdict:
    return Verdict(entry.test, word, reason)


def _is_sound(entry: Entry) -> bool:
    return entry.passed and not entry.environment.git_dirty and "regressed" not in entry.verdicts.values()


def _difference(before: Entry, now: Entry) -> str:
    """A message about the first difference that prevents a comparison; empty if the entries can be compared."""
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
            return f"{name} was {shortened(old)} and is {shortened(new)}"
    return ""


def _reachable(
    entries: Sequence[Entry], now: Entry, base: str | None, repository: Path | None
) -> tuple[list[Entry], str]:
    """The entries that may be the reference, the nearest first, and a note about them."""
    commit = now.environment.git_commit
    newest_first = sorted(entries, key=lambda entry: entry.created, reverse=True)
    if base is not None:
        of_base = [entry for entry in newest_first if entry.environment.git_commit == base]
        return of_base, "" if of_base else f"no usable run of {base[:12]} is stored"
    if commit is None:
        return newest_first, " (no git to find the ancestor)"
    line = ancestors(commit, repository)
    if not now.environment.git_dirty:
        # A clean commit is compared with its ancestors, and with itself only if they have no data.
        line = [*line[1:], commit]
    rank = {ancestor: number for number, ancestor in enumerate(line)}
    of_ancestors = [entry for entry in newest_first if entry.environment.git_commit in rank]
    if of_ancestors:
        return sorted(of_ancestors, key=lambda entry: rank[str(entry.environment.git_commit)]), ""
    if is_shallow(repository):
        raise KnormError(
            f"this clone is shallow, and the stored runs of {now.test} are from commits that it lacks; "
            "fetch the history (git fetch --unshallow, or fetch-depth: 0)"
        )
    return [], f"none of {len(entries)} stored runs is from an ancestor of {commit[:12]}"

"""Compare a test's figures with those of its reference: one verdict for each metric, and the reason. No torch.

Timings and bytes are compared as ratios to the full cache of the same run, so the machine's speed does not matter.
Absolute times are only compared between equal machines that ran at equal speed.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter, methodcaller
from typing import Literal, TypeAlias, get_args

from knormpress.errors import KnormError
from knormpress.records.figures import ROUNDING_KL, SPEED_MOVED, Cost, Counted, Latency, Phase, Quality, Run, Timed
from knormpress.records.retrieval import Item
from knormpress.records.schema import Entry, Environment
from knormpress.stats.intervals import LEAST_PROCESSES, Change, between_processes, percent, ratio_of_ratios
from knormpress.stats.perplexity import ppl_change, too_few
from knormpress.stats.shares import share_of

__all__ = [
    "THRESHOLDS",
    "TIMED",
    "Finding",
    "Verdict",
    "Word",
    "confirmed",
    "judge",
    "machine_class",
    "read_thresholds",
    "slower",
    "summed",
    "worst",
]

Word: TypeAlias = Literal["ok", "improved", "regressed", "noise", "new", "missing", "no-baseline", "incomparable"]

THRESHOLDS: Mapping[str, float] = {
    "ttft": 10.0,
    "tpot": 5.0,
    "throughput": 5.0,
    "ttft_s": 25.0,
    "tpot_s": 25.0,
    "bytes": 0.5,
    "decoded_bytes": 0.5,
    "ops": 0.5,
    "moved": 0.5,
    "flops": 0.5,
    "allocated": 0.5,
    "host_reads": 0.5,
    "ppl": 1.0,
    "kl": 5.0,
    "found": 2.0,
    "answers": 5.0,
    "tasks": 2.0,
}
"""The allowed loss in % of each metric; a larger loss is a regression. Names with ``_s`` are absolute times.

``found`` is in points of the share of retrieval items that are found, ``answers`` the perplexity of their answers;
``tasks`` is in points of the share of right documents of lm-evaluation-harness.
"""

TIMED = frozenset({"ttft", "tpot", "throughput", "ttft_s", "tpot_s"})
"""The metrics that a disturbance of the machine can change."""

# A session decides on many timed metrics, and the interval of one process leaves out how processes differ. So it takes
# more than 95 % to fail a test: the most that 6 pairs against 6 can tell.
_SURE = 0.9975

# More than these are counted in the reason; the report has all of them.
_LISTED = 6

_FROM_BAD_TO_GOOD: tuple[Word, ...] = (
    "regressed",
    "missing",
    "incomparable",
    "noise",
    "no-baseline",
    "new",
    "improved",
    "ok",
)


@dataclass(frozen=True)
class Finding:
    """One metric of one test: the verdict word, the figures before and now, the change if there is one, the reason."""

    metric: str
    word: Word
    figures: tuple[str, str]
    change: Change | None
    reason: str


@dataclass(frozen=True)
class Verdict:
    """One test: the worst word of the metrics that can be compared, or the reason why none can.

    ``basis`` is the end of the reason, which says what was compared.
    """

    test: str
    word: Word
    reason: str
    findings: tuple[Finding, ...] = ()
    basis: str = ""


def worst(words: Sequence[Word]) -> Word:
    """The worst of ``words``."""
    return min(words, key=_FROM_BAD_TO_GOOD.index)


def judge(before: Sequence[Entry], now: Sequence[Entry], thresholds: Mapping[str, float], reason: str) -> Verdict:
    """Compare entries of one test with its reference entries; the code is the same within each side.

    Args:
        before, now: at least one entry each, oldest first. Timings are those of all of them; for other figures the
            newest is used. With 4 runs in all, a timing's interval is that between their processes. Fewer can't show
            how processes differ: then it is that of the pairs, and the reason says so.
        thresholds: see ``THRESHOLDS``.
        reason: names the reference.
    """
    findings = [*_timings(before, now, thresholds), *_bytes(before, now, thresholds)]
    findings += _counts(before[-1], now[-1], thresholds)
    findings += _quality(before[-1], now[-1], thresholds)
    findings += _retrieval(before[-1], now[-1], thresholds)
    findings += _tasks(before[-1], now[-1], thresholds)
    if not findings:
        return Verdict(now[-1].test, "incomparable", f"{reason}, without a figure in common")
    return summed(now[-1].test, findings, _limit(before, now) + reason)


def slower(verdict: Verdict) -> set[str]:
    """The timed metrics that regressed, which must be measured once more before they fail a test."""
    return {finding.metric for finding in verdict.findings if finding.word == "regressed"} & TIMED


def confirmed(first: Verdict, second: Verdict) -> Verdict:
    """The verdict on a test that was measured once more, since a timed metric regressed in the ``first`` measurement.

    It is that of the ``second``, but a timed metric regressed only if it did so in both. The reason shows both changes;
    the ``first`` may lack a metric.
    """
    earlier = {finding.metric: finding for finding in first.findings}
    alarms = slower(first) | slower(second)
    once = slower(second) - slower(first)
    findings, shown = [], []
    for finding in second.findings:
        if finding.metric in alarms:
            both = (earlier.get(finding.metric), finding)
            changes = [f"{one.change} ({one.change.interval})" for one in both if one and one.change]
            shown.append(f"{finding.metric} {', then '.join(changes)}")
        if finding.metric in once:
            findings.append(replace(finding, word="noise", reason=f"{finding.reason}: in one of two measurements"))
        else:
            findings.append(finding)
    return summed(second.test, findings, f"measured twice: {', '.join(shown)}; {second.basis}")


def summed(test: str, findings: Sequence[Finding], basis: str) -> Verdict:
    """The verdict on ``test`` from the findings on its metrics; ``basis`` names the reference."""
    word = worst([finding.word for finding in findings if finding.word != "incomparable"] or ["incomparable"])
    reasons = [f"{f.metric} {f.reason}" for f in findings if f.word in (word, "incomparable") and f.reason]
    return Verdict(test, word, "; ".join([*reasons, basis]), tuple(findings), basis)


def read_thresholds(text: str, others: Mapping[str, float] = THRESHOLDS) -> dict[str, float]:
    """``others``, changed by the thresholds in ``text``, such as ``"tpot=8, kl=2"``.

    Raises:
        KnormError: a name or a number is not valid.
    """
    thresholds = dict(others)
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (word.strip() for word in part.partition("="))
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if name not in THRESHOLDS or not 0 <= value < float("inf"):
            names = ", ".join(THRESHOLDS)
            raise KnormError(f"threshold {part!r} can't be read; wanted NAME=PERCENT, where NAME is one of {names}")
        thresholds[name] = value
    return thresholds


def machine_class(environment: Environment) -> dict[str, object]:
    """What must be equal for two machines to have similar ratios."""
    return {
        "device": environment.device,
        "device_name": environment.device_name,
        "device_map": environment.device_map,
        "processor": environment.processor,
        "threads": environment.threads,
    }


def _timings(before: Sequence[Entry], now: Sequence[Entry], thresholds: Mapping[str, float]) -> list[Finding]:
    old = [entry.latency for entry in before if entry.latency is not None]
    new = [entry.latency for entry in now if entry.latency is not None]
    if not old or not new:
        return []
    figures: dict[Timed, float] = {"ttft": 1.0}
    if new[0].decodes:
        figures |= {"tpot": 1.0, "throughput": -1.0}
    findings = []
    for name, worse in figures.items():
        ratios = [_by_run(side, methodcaller("ratios", name)) for side in (before, now)]
        shown = _pair(f"x{statistics.median(chain.from_iterable(side)):.3f}" for side in ratios)
        findings.append(_timing(name, shown, ratios, worse, thresholds[name]))
    reason = _why_not_absolute(before, now)
    for name in [name for name in ("ttft", "tpot") if name in figures]:
        times = [_by_run(side, functools.partial(_times, attrgetter(f"{name}_s"))) for side in (before, now)]
        shown = _pair(f"{statistics.median(chain.from_iterable(side)) * 1e3:.1f} ms" for side in times)
        if reason:
            findings.append(Finding(f"{name}_s", "incomparable", shown, None, reason))
        else:
            findings.append(_timing(f"{name}_s", shown, times, 1.0, thresholds[f"{name}_s"]))
    return findings


def _times(figure: Callable[[Run], float], latency: Latency) -> list[float]:
    return [figure(run) for run in latency.candidate]


def _by_run(entries: Sequence[Entry], figures: Callable[[Latency], Iterable[float]]) -> list[list[float]]:
    """The figures of each run: a run is one process."""
    runs: dict[str, list[float]] = {}
    for entry in entries:
        if entry.latency is not None:
            runs.setdefault(entry.run, []).extend(figures(entry.latency))
    return list(runs.values())


def _limit(before: Sequence[Entry], now: Sequence[Entry]) -> str:
    """What the intervals of timings do not tell, with a semicolon; empty if there are enough processes."""
    runs = [len(_by_run(side, lambda _: ())) for side in (before, now)]
    if not all(runs) or sum(runs) >= LEAST_PROCESSES:
        return ""
    processes = "process" if runs[0] == 1 else "processes"
    return f"times of {runs[0]} {processes} against {runs[1]}: how processes differ is not in their intervals; "


def _timing(
    metric: str, shown: tuple[str, str], sides: list[list[list[float]]], worse: float, threshold: float
) -> Finding:
    if not all(0 < figure < math.inf for side in sides for run in side for figure in run):
        return Finding(metric, "incomparable", shown, None, "is not compared: not every time is a number above 0")
    if sum(map(len, sides)) >= LEAST_PROCESSES:
        return _finding(metric, shown, between_processes(*sides), worse, threshold)
    old, new = (list(chain.from_iterable(side)) for side in sides)
    found = _finding(metric, shown, ratio_of_ratios(old, new), worse, threshold)
    if found.word == "regressed":
        sure = ratio_of_ratios(old, new, confidence=_SURE)
        if sure.low is None or min(worse * end for end in sure.ends) <= 0:
            return replace(found, word="noise", reason=f"{found.reason}: not sure enough at {100 * _SURE:g} %")
    return found


def _why_not_absolute(before: Sequence[Entry], now: Sequence[Entry]) -> str:
    """The reason why absolute times of these entries can't be compared; empty if they can."""
    software = {"git_commit", "git_dirty", "knormpress"}
    machines = [entry.environment.model_dump(exclude=software) for entry in (*before, *now)]
    differing = [name for name in machines[0] if any(machine[name] != machines[0][name] for machine in machines)]
    if differing:
        return f"is not compared: {differing[0]} differs"
    speeds = [time for entry in (*before, *now) if entry.latency for time in entry.latency.calibration_s]
    moved = percent(max(speeds) / min(speeds))
    return f"is not compared: the machine's speed changed by {moved:.0f} %" if moved > SPEED_MOVED else ""


def _bytes(before: Sequence[Entry], now: Sequence[Entry], thresholds: Mapping[str, float]) -> list[Finding]:
    old, new = before[-1].memory, now[-1].memory
    if old is None or new is None:
        return []
    shown = _pair(f"{memory.candidate_cache_bytes / 1e6:,.2f} MB" for memory in (old, new))
    if not (old.baseline_cache_bytes and old.candidate_cache_bytes and new.baseline_cache_bytes):
        return [Finding("bytes", "incomparable", shown, None, "is not compared: a cache of 0 bytes was measured")]
    findings = [_finding("bytes", shown, _exact(new.ratio / old.ratio), 1.0, thresholds["bytes"])]
    if old.decoded_ratio and new.decoded_ratio:
        shown = _pair(f"{(memory.candidate_decoded_bytes or 0) / 1e6:,.2f} MB" for memory in (old, new))
        change = _exact(new.decoded_ratio / old.decoded_ratio)
        findings.append(_finding("decoded_bytes", shown, change, 1.0, thresholds["decoded_bytes"]))
    return findings


def _counts(before: Entry, now: Entry, thresholds: Mapping[str, float]) -> list[Finding]:
    """Compare the candidate's own counts: the machine's speed is not in them."""
    if before.cost is None or now.cost is None:
        return []
    names: tuple[Counted, ...] = get_args(Counted)
    sides = before.environment, now.environment
    for kind in ("torch", "transformers", "device", "device_map"):
        versions = [getattr(side, kind) for side in sides]
        if versions[0] != versions[1]:
            reason = f"is not compared: {kind} differs ({versions[0]}, now {versions[1]})"
            return [Finding(name, "incomparable", ("", ""), None, reason) for name in names]
    return [_count(before.cost, now.cost, name, thresholds[name]) for name in names]


def _count(before: Cost, now: Cost, name: Counted, threshold: float) -> Finding:
    """The finding on the phase that is worse, with the reasons of both."""
    findings = []
    phases: tuple[Phase, ...] = get_args(Phase)
    for phase in phases:
        old, new = before.candidate(phase, name), now.candidate(phase, name)
        shown = f"{phase} {old:,.6g}", f"{new:,.6g}"
        if new > old == 0:
            found = Finding(name, "regressed", shown, None, f"was 0, now {new:,.6g}")
        else:
            found = _finding(name, shown, _exact(new / old if old else 1.0), 1.0, threshold)
        findings.append(replace(found, reason=f"{phase} {found.reason}" if found.reason else ""))
    word = worst([finding.word for finding in findings])
    chosen = next(finding for finding in findings if finding.word == word)
    return replace(chosen, reason=", ".join(finding.reason for finding in findings if finding.reason))


def _exact(ratio: float) -> Change:
    """The change of a figure that has no spread."""
    change = percent(ratio)
    return Change(change, change, change)


def _quality(before: Entry, now: Entry, thresholds: Mapping[str, float]) -> list[Finding]:
    if before.quality is None or now.quality is None:
        return []
    old, new = before.quality, now.quality
    if old.tokens != new.tokens:
        return [Finding(name, "incomparable", ("", ""), None, "other documents were scored") for name in ("ppl", "kl")]
    sides: tuple[tuple[Quality, Word, str], ...] = (
        (new, "regressed", "is NaN or infinite"),
        (old, "incomparable", "is not compared: in the reference it is NaN or infinite"),
    )
    for side, word, reason in sides:
        if not all(map(math.isfinite, (n for d in side.documents for n in (d.kl, *d.baseline_nll, *d.candidate_nll)))):
            return [Finding(name, word, ("", ""), None, reason) for name in ("ppl", "kl")]
    # The same tokens were scored, so the method's loss then and now is compared token by token.
    change = ppl_change([after - earlier for earlier, after in zip(old.gaps, new.gaps, strict=True)])
    shown = _pair(str(side.ppl) for side in (old, new))
    ppl = _finding("ppl", shown, change, 1.0, thresholds["ppl"], few=too_few(len(new.documents)))
    kls = (old.kl, new.kl)
    texts = _pair(f"{kl:.4f}" for kl in kls)
    if max(kls) < ROUNDING_KL or kls[0] == kls[1]:
        return [ppl, Finding("kl", "ok", texts, Change(0.0, 0.0, 0.0), "")]
    if kls[0] < ROUNDING_KL:
        return [ppl, Finding("kl", "regressed", texts, None, "was 0: nothing was lost before")]
    if kls[1] < ROUNDING_KL:
        return [ppl, Finding("kl", "regressed", texts, None, "fell to 0: the full cache was scored")]
    rise = percent(kls[1] / kls[0])
    return [ppl, _finding("kl", texts, Change(rise, rise, rise), 1.0, thresholds["kl"])]


def _retrieval(before: Entry, now: Entry, thresholds: Mapping[str, float]) -> list[Finding]:
    """Compare item by item: what the candidate found, and how probable its answers were."""
    old, new = before.retrieval, now.retrieval
    if old is None or new is None:
        return []
    pairs = new.paired(old)
    if old.asked != new.asked or not pairs:
        reason = "is not compared: other items were asked" if pairs else "is not compared: no item in common"
        return [Finding(name, "incomparable", ("", ""), None, reason) for name in ("found", "answers")]
    shown = _pair(str(share_of([(item.candidate.found, 1) for item in side])) for side in zip(*pairs, strict=True))
    found = _finding("found", shown, new.found_since(old), -1.0, thresholds["found"])
    listed = [
        f"{word}: {', '.join(labels[:_LISTED])}{f' and {len(labels) - _LISTED} more' if len(labels) > _LISTED else ''}"
        for word, labels in (("lost", _moved(pairs, lost=True)), ("gained", _moved(pairs, lost=False)))
        if labels
    ]
    found = replace(found, reason="; ".join(filter(None, [found.reason, *listed])))
    rises = _pair(f"{side.nll_rise or 0.0:+.2f} nats" for side in (old, new))
    return [found, _finding("answers", rises, new.answers_since(old), 1.0, thresholds["answers"])]


def _tasks(before: Entry, now: Entry, thresholds: Mapping[str, float]) -> list[Finding]:
    """Compare document by document: what the candidate had right."""
    old, new = before.lm_eval, now.lm_eval
    if old is None or new is None or not new.right:
        return []
    counts = [{task: len(documents) for task, documents in side.right.items()} for side in (old, new)]
    if old.version != new.version or counts[0] != counts[1]:
        what = f"lm-eval {old.version}, now {new.version}" if old.version != new.version else "other documents"
        return [Finding("tasks", "incomparable", ("", ""), None, f"is not compared: {what}")]
    shown = _pair(
        str(share_of([(candidate, 1) for documents in side.right.values() for _, candidate in documents]))
        for side in (old, new)
    )
    return [_finding("tasks", shown, new.change_since(old), -1.0, thresholds["tasks"])]


def _moved(pairs: Sequence[tuple[Item, Item]], *, lost: bool) -> list[str]:
    """The items that were found before and are not now, or the other way round, in words."""
    return [new.label for old, new in pairs if (old.candidate.found, new.candidate.found) == (lost, not lost)]


def _finding(
    metric: str, shown: tuple[str, str], change: Change, worse: float, threshold: float, *, few: str = ""
) -> Finding:
    """Judge a change; ``worse`` is 1 or -1, the sign of a change for the worse.

    A loss above the threshold is a regression if its whole interval is above 0. If only the interval's end is above the
    threshold, a loss of that size is neither shown nor excluded: this is noise. ``few`` says why there is no interval.
    """
    low, high = sorted(worse * end for end in change.ends)
    loss = worse * change.percent
    measured = f"{change} ({change.interval})" if low != high else str(change)
    word: Word
    if change.low is None and loss != 0:
        word, reason = "noise", f"{measured}: {few or 'too few runs for an interval'}"
    elif loss > threshold and low > 0:
        word, reason = "regressed", f"{measured}, allowed {threshold:g} %"
    elif loss < -threshold and high < 0:
        word, reason = "improved", measured
    elif high > threshold:
        word, reason = "noise", f"{measured}: a loss of more than {threshold:g} % can't be excluded"
    else:
        word, reason = "ok", ""
    return Finding(metric, word, shown, change, reason)


def _pair(texts: Iterable[str]) -> tuple[str, str]:
    before, now = texts
    return before, now

"""What became of a test's figures since its baseline: one word for each metric, and why. Torch-free.

Timings and bytes are compared as ratios to the full cache of the same run, which survive a change of machine speed;
absolute times only between equal machines that ran at an equal speed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal, TypeAlias

import numpy as np

from knormpress.changes import ppl_change
from knormpress.errors import KnormError
from knormpress.intervals import Change, percent, ratio_of_ratios
from knormpress.records import ROUNDING_KL, DocumentScore, Entry, Environment, Latency, Run

__all__ = [
    "THRESHOLDS",
    "Finding",
    "Verdict",
    "Word",
    "judge",
    "machine_class",
    "read_thresholds",
    "speed_moved",
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
    "ppl": 1.0,
    "kl": 5.0,
}
"""Change for the worse in %, by metric, from which on it is a regression. Those in ``_s`` are absolute times."""

_SPEED_MOVED = 10.0
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
    """One metric of one test: the word, the figures before and now, the change where there is one, and why."""

    metric: str
    word: Word
    figures: tuple[str, str]
    change: Change | None
    reason: str


@dataclass(frozen=True)
class Verdict:
    """One test: the worst word of the metrics that can be compared, or why none can."""

    test: str
    word: Word
    reason: str
    findings: tuple[Finding, ...] = ()


def worst(words: Sequence[Word]) -> Word:
    """The word that matters most."""
    return min(words, key=_FROM_BAD_TO_GOOD.index)


def judge(before: Sequence[Entry], now: Sequence[Entry], thresholds: Mapping[str, float], reason: str) -> Verdict:
    """Compare entries of one test with entries of its baseline, each side measured by equal code.

    Args:
        before, now: at least one each, oldest first. Timings are pooled; of what does not vary the newest stands.
        thresholds: see ``THRESHOLDS``.
        reason: what the baseline is.
    """
    findings = [*_timings(before, now, thresholds), *_bytes(before, now, thresholds)]
    findings += _quality(before[-1], now[-1], thresholds)
    if not findings:
        return Verdict(now[-1].test, "incomparable", f"{reason}, with no figure in common")
    word = worst([finding.word for finding in findings if finding.word != "incomparable"] or ["incomparable"])
    reasons = [f"{f.metric} {f.reason}" for f in findings if f.word in (word, "incomparable") and f.reason]
    return Verdict(now[-1].test, word, "; ".join([*reasons, reason]), tuple(findings))


def read_thresholds(text: str, others: Mapping[str, float] = THRESHOLDS) -> dict[str, float]:
    """``others`` with those replaced that ``text`` gives, such as ``"tpot=8, kl=2"``.

    Raises:
        KnormError: a name or a number that is none.
    """
    thresholds = dict(others)
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (word.strip() for word in part.partition("="))
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if name not in THRESHOLDS or not 0 <= value < float("inf"):
            raise KnormError(f"threshold {part!r} is none; wanted NAME=PERCENT with a name of {', '.join(THRESHOLDS)}")
        thresholds[name] = value
    return thresholds


def machine_class(environment: Environment) -> dict[str, object]:
    """What two machines must agree in for their ratios to be alike."""
    return {
        "device": environment.device,
        "device_name": environment.device_name,
        "processor": environment.processor,
        "threads": environment.threads,
    }


def speed_moved(latency: Latency) -> float | None:
    """How far in % the machine's speed moved during the measurement, or None if that was within 10 %."""
    before, after = latency.calibration_s
    moved = percent(after / before)
    return moved if abs(moved) > _SPEED_MOVED else None


def _timings(before: Sequence[Entry], now: Sequence[Entry], thresholds: Mapping[str, float]) -> list[Finding]:
    old = [entry.latency for entry in before if entry.latency is not None]
    new = [entry.latency for entry in now if entry.latency is not None]
    if not old or not new:
        return []
    figures: dict[str, tuple[Callable[[Run], float], float]] = {"ttft": (attrgetter("ttft_s"), 1.0)}
    if new[0].baseline[0].gaps_s:
        figures |= {"tpot": (attrgetter("tpot_s"), 1.0), "throughput": (attrgetter("tokens_per_s"), -1.0)}
    findings = []
    for name, (figure, worse) in figures.items():
        ratios = [_ratios(side, figure) for side in (old, new)]
        shown = _pair(f"x{statistics.median(side):.3f}" for side in ratios)
        findings.append(_timing(name, shown, ratios, worse, thresholds[name]))
    reason = _why_not_absolute(before, now)
    for name in [name for name in ("ttft", "tpot") if name in figures]:
        figure = figures[name][0]
        times = [[figure(run) for latency in side for run in latency.candidate] for side in (old, new)]
        shown = _pair(f"{statistics.median(side) * 1e3:.1f} ms" for side in times)
        if reason:
            findings.append(Finding(f"{name}_s", "incomparable", shown, None, reason))
        else:
            findings.append(_timing(f"{name}_s", shown, times, 1.0, thresholds[f"{name}_s"]))
    return findings


def _timing(metric: str, shown: tuple[str, str], sides: list[list[float]], worse: float, threshold: float) -> Finding:
    if not all(0 < figure < math.inf for side in sides for figure in side):
        return Finding(metric, "incomparable", shown, None, "is not compared, as not every time is a number above 0")
    return _finding(metric, shown, ratio_of_ratios(*sides), worse, threshold)


def _why_not_absolute(before: Sequence[Entry], now: Sequence[Entry]) -> str:
    """Why the times of these entries themselves, not as ratios, can't be set against each other; else empty."""
    software = {"git_commit", "git_dirty", "knormpress"}
    machines = [entry.environment.model_dump(exclude=software) for entry in (*before, *now)]
    differing = [name for name in machines[0] if any(machine[name] != machines[0][name] for machine in machines)]
    if differing:
        return f"is not compared, as {differing[0]} differs"
    speeds = [time for entry in (*before, *now) if entry.latency for time in entry.latency.calibration_s]
    moved = percent(max(speeds) / min(speeds))
    return f"is not compared, as the machine's speed moved by {moved:.0f} %" if moved > _SPEED_MOVED else ""


def _bytes(before: Sequence[Entry], now: Sequence[Entry], thresholds: Mapping[str, float]) -> list[Finding]:
    old, new = before[-1].memory, now[-1].memory
    if old is None or new is None:
        return []
    shown = _pair(f"{memory.candidate_cache_bytes / 1e6:,.2f} MB" for memory in (old, new))
    if not (old.baseline_cache_bytes and old.candidate_cache_bytes and new.baseline_cache_bytes):
        return [Finding("bytes", "incomparable", shown, None, "is not compared, as a cache of 0 bytes was measured")]
    ratios = [memory.candidate_cache_bytes / memory.baseline_cache_bytes for memory in (old, new)]
    change = percent(ratios[1] / ratios[0])
    return [_finding("bytes", shown, Change(change, change, change), 1.0, thresholds["bytes"])]


def _quality(before: Entry, now: Entry, thresholds: Mapping[str, float]) -> list[Finding]:
    if before.quality is None or now.quality is None:
        return []
    old, new = before.quality.documents, now.quality.documents
    if [len(document.baseline_nll) for document in old] != [len(document.baseline_nll) for document in new]:
        return [Finding(name, "incomparable", ("", ""), None, "other documents were scored") for name in ("ppl", "kl")]
    sides: tuple[tuple[Sequence[DocumentScore], Word, str], ...] = (
        (new, "regressed", "is no number: NaN or infinity was measured"),
        (old, "incomparable", "is not compared, as the baseline's is no number"),
    )
    for side, word, reason in sides:
        if not all(map(math.isfinite, (n for d in side for n in (d.kl, *d.baseline_nll, *d.candidate_nll)))):
            return [Finding(name, word, ("", ""), None, reason) for name in ("ppl", "kl")]
    # The same tokens were scored, so the losses themselves are paired: what the method cost then, and what now.
    paired = [
        DocumentScore(
            document=b.document,
            baseline_nll=tuple(np.subtract(a.candidate_nll, a.baseline_nll).tolist()),
            candidate_nll=tuple(np.subtract(b.candidate_nll, b.baseline_nll).tolist()),
            kl=0.0,
            top1_agreement=1.0,
        )
        for a, b in zip(old, new, strict=True)
    ]
    shown = _pair(str(ppl_change(documents)) for documents in (old, new))
    ppl = _finding("ppl", shown, ppl_change(paired), 1.0, thresholds["ppl"])
    kls = [float(np.average([d.kl for d in side], weights=[len(d.baseline_nll) for d in side])) for side in (old, new)]
    texts = _pair(f"{kl:.4f}" for kl in kls)
    if max(kls) < ROUNDING_KL or kls[0] == kls[1]:
        return [ppl, Finding("kl", "ok", texts, Change(0.0, 0.0, 0.0), "")]
    if kls[0] < ROUNDING_KL:
        return [ppl, Finding("kl", "regressed", texts, None, "was 0: nothing was lost before")]
    if kls[1] < ROUNDING_KL:
        return [ppl, Finding("kl", "regressed", texts, None, "fell to 0: the full cache was scored")]
    change = percent(kls[1] / kls[0])
    return [ppl, _finding("kl", texts, Change(change, change, change), 1.0, thresholds["kl"])]


def _finding(metric: str, shown: tuple[str, str], change: Change, worse: float, threshold: float) -> Finding:
    """Judge a change whose sign is ``worse`` where it is for the worse.

    A loss beyond the threshold counts once its whole interval lies above 0; while the interval merely reaches beyond
    the threshold, a loss of that size can be neither seen nor ruled out, and that is noise.
    """
    low, high = sorted(worse * end for end in change.ends)
    loss = worse * change.percent
    measured = f"{change} ({change.interval})" if low != high else str(change)
    word: Word
    if change.low is None and loss != 0:
        word, reason = "noise", f"{measured}: too few runs for an interval"
    elif loss > threshold and low > 0:
        word, reason = "regressed", f"{measured}, allowed {threshold:g} %"
    elif loss < -threshold and high < 0:
        word, reason = "improved", measured
    elif high > threshold:
        word, reason = "noise", f"{measured}: a loss of more than {threshold:g} % can't be ruled out"
    else:
        word, reason = "ok", ""
    return Finding(metric, word, shown, change, reason)


def _pair(texts: Iterable[str]) -> tuple[str, str]:
    before, now = texts
    return before, now


def _ratios(latencies: Sequence[Latency], figure: Callable[[Run], float]) -> list[float]:
    return [
        figure(candidate) / figure(baseline)
        for latency in latencies
        for baseline, candidate in zip(latency.baseline, latency.candidate, strict=True)
    ]

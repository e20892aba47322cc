"""A change against the in-run baseline, with its 95 % interval: statistics of bare figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap

from knormpress.records import DocumentScore

__all__ = ["Change", "gate", "percent", "ppl_change", "ratio_change"]

_Floats = NDArray[np.float64]

_SEED = 20240611
_RESAMPLES = 2_000
_BLOCK = 64
_LEAST_PAIRS = 3


@dataclass(frozen=True)
class Change:
    """A change against the in-run baseline in %, with its 95 % interval; None where the data can't give an interval."""

    percent: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return f"{_signed(self.percent)} %"

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of the interval, or the change itself twice where there is none."""
        return (self.percent, self.percent) if self.low is None or self.high is None else (self.low, self.high)

    @property
    def interval(self) -> str:
        """The interval in %, as text of at most 14 characters."""
        return "no interval" if self.low is None or self.high is None else f"{_signed(self.low)}..{_signed(self.high)}"


def gate(change: Change, tolerance: float) -> Literal["pass", "fail", "inconclusive"]:
    """Whether a change stays within +-``tolerance`` %: decided by its whole interval, or not at all.

    ``pass`` if the interval lies within the tolerance, ``fail`` if it lies outside, ``inconclusive`` if it crosses the
    limit or there is none. A fall beyond the tolerance is as suspect as a rise.
    """
    if change.low is None or change.high is None:
        return "inconclusive"
    if -tolerance <= change.low and change.high <= tolerance:
        return "pass"
    return "fail" if change.low > tolerance or change.high < -tolerance else "inconclusive"


def ratio_change(baseline: ArrayLike, candidate: ArrayLike) -> Change:
    """The median over pairs of candidate / baseline, as a change in %, with its percentile-bootstrap interval.

    Only within a pair are two figures compared: what slows the machine down for both leaves the ratio alone. One or two
    pairs give no interval. With n pairs even their whole range covers the true median with a probability of only
    1 - 2 ** (1 - n): 75 % at 3, 94 % at 5, and from 6 on an interval can live up to its 95 %.
    """
    ratios = np.asarray(candidate, dtype=np.float64) / np.asarray(baseline, dtype=np.float64)
    middle = percent(float(np.median(ratios)))
    if len(ratios) < _LEAST_PAIRS:
        return Change(middle, None, None)
    if np.ptp(ratios) == 0:
        return Change(middle, middle, middle)
    found = bootstrap(
        (ratios,), np.median, method="percentile", n_resamples=_RESAMPLES, rng=np.random.default_rng(_SEED)
    ).confidence_interval
    return _around(middle, percent(float(found.low)), percent(float(found.high)))


def ppl_change(documents: Sequence[DocumentScore]) -> Change:
    """exp(mean over scored tokens of (candidate NLL - baseline NLL)) - 1 in %, with a paired two-stage bootstrap.

    Documents are drawn with replacement, and inside each drawn document blocks of 64 consecutive tokens (round the end
    and on at the start, so that every token is drawn equally often), because neighbouring tokens share their context
    and are not independent. One document of up to 64 tokens gives no interval; an interval from one longer document
    speaks of that document only.
    """
    gaps: list[_Floats] = [np.subtract(document.candidate_nll, document.baseline_nll) for document in documents]
    middle = percent(math.exp(float(np.concatenate(gaps).mean())))
    if len(gaps) == 1 and len(gaps[0]) <= _BLOCK:
        return Change(middle, None, None)
    low, high = np.percentile(_resampled_means(gaps), (2.5, 97.5))
    return _around(middle, percent(math.exp(low)), percent(math.exp(high)))


def _around(middle: float, low: float, high: float) -> Change:
    # Sums in another order round differently, which can push an interval of almost no width off its own middle.
    return Change(middle, min(low, middle), max(high, middle))


def _resampled_means(gaps: list[_Floats]) -> _Floats:
    random = np.random.default_rng(_SEED)
    chosen = random.integers(len(gaps), size=(_RESAMPLES, len(gaps)))
    means = np.empty(chosen.shape)
    weights = np.empty(chosen.shape)
    for index, gap in enumerate(gaps):
        length = min(_BLOCK, len(gap))
        round_the_end = np.concatenate([gap, gap[: length - 1]])
        block_means = np.lib.stride_tricks.sliding_window_view(round_the_end, length).mean(axis=1)
        drawn = chosen == index
        starts = random.integers(len(gap), size=(int(drawn.sum()), math.ceil(len(gap) / length)))
        means[drawn] = block_means[starts].mean(axis=1)
        weights[drawn] = len(gap)
    return np.asarray((means * weights).sum(axis=1) / weights.sum(axis=1))


def percent(ratio: float) -> float:
    """A ratio to the baseline as a change in %."""
    return (ratio - 1.0) * 100.0


def _signed(percent: float) -> str:
    if abs(percent) >= 99_999.5:
        return f"{percent:+.1e}".replace("e+0", "e").replace("e+", "e")
    text = f"{percent:+.0f}" if abs(percent) >= 99.95 else f"{percent:+.1f}"
    return text[1:] if float(text) == 0 else text

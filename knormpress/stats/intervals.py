"""A change from a baseline in %, with its 95 % interval: how it is computed, and how it is written."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap

__all__ = ["SEED", "Change", "Floats", "percent", "ratio_change", "ratio_of_ratios", "spanning"]

Floats = NDArray[np.float64]

SEED = 20240611
_RESAMPLES = 2_000
_LEAST_PAIRS = 3


@dataclass(frozen=True)
class Change:
    """A change from a baseline in %: ``percent``, and the ends ``low`` and ``high`` of its 95 % interval.

    The ends are None if the data can't give an interval.
    """

    percent: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return f"{_signed(self.percent)} %"

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of the interval, or twice the change itself if there is no interval."""
        return (self.percent, self.percent) if self.low is None or self.high is None else (self.low, self.high)

    @property
    def interval(self) -> str:
        """The interval in % as text of at most 14 characters."""
        return "no interval" if self.low is None or self.high is None else f"{_signed(self.low)}..{_signed(self.high)}"


def ratio_change(baseline: ArrayLike, candidate: ArrayLike) -> Change:
    """The median of candidate / baseline over pairs, as a change in %, with its percentile-bootstrap interval.

    Figures are compared only within a pair, so a slowdown of the machine that affects both does not change the ratio.
    One or two pairs give no interval. With n pairs, even their full range covers the true median with a probability of
    only 1 - 2 ** (1 - n): 75 % for 3 pairs, 94 % for 5. From 6 pairs on, an interval can reach 95 %.
    """
    ratios = np.asarray(candidate, dtype=np.float64) / np.asarray(baseline, dtype=np.float64)
    middle = percent(float(np.median(ratios)))
    if len(ratios) < _LEAST_PAIRS:
        return Change(middle, None, None)
    if np.ptp(ratios) == 0:
        return Change(middle, middle, middle)
    ends = bootstrap(
        (ratios,), np.median, method="percentile", n_resamples=_RESAMPLES, rng=np.random.default_rng(SEED)
    ).confidence_interval
    return spanning(middle, percent(float(ends.low)), percent(float(ends.high)))


def ratio_of_ratios(before: ArrayLike, after: ArrayLike) -> Change:
    """The median of the ratios ``after`` divided by that of ``before``, as a change in % with its bootstrap interval.

    Both sets are resampled independently, since they were measured independently. Fewer than 3 in one give no interval.
    """
    first, second = np.log(np.asarray(before, dtype=np.float64)), np.log(np.asarray(after, dtype=np.float64))
    middle = percent(math.exp(float(np.median(second) - np.median(first))))
    if min(len(first), len(second)) < _LEAST_PAIRS:
        return Change(middle, None, None)
    if np.ptp(first) == 0 and np.ptp(second) == 0:
        return Change(middle, middle, middle)
    ends = bootstrap(
        (first, second),
        lambda x, y, axis: np.median(y, axis=axis) - np.median(x, axis=axis),
        method="percentile",
        n_resamples=_RESAMPLES,
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return spanning(middle, percent(math.exp(float(ends.low))), percent(math.exp(float(ends.high))))


def spanning(middle: float, low: float, high: float) -> Change:
    """A change of ``middle`` %; its interval from ``low`` to ``high`` is widened to contain it."""
    # Sums in another order round differently, so a very narrow interval could miss its own middle.
    return Change(middle, min(low, middle), max(high, middle))


def percent(ratio: float) -> float:
    """Convert a ratio to the baseline to a change in %."""
    return (ratio - 1.0) * 100.0


def _signed(percent: float) -> str:
    if abs(percent) >= 99_999.5:
        return f"{percent:+.1e}".replace("e+0", "e").replace("e+", "e")
    text = f"{percent:+.0f}" if abs(percent) >= 99.95 else f"{percent:+.1f}"
    return text[1:] if float(text) == 0 else text

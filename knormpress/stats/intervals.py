"""A change from a baseline in %, with its 95 % interval: how it is computed, and how it is written."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

__all__ = [
    "LEAST_PROCESSES",
    "SEED",
    "Change",
    "Floats",
    "between_processes",
    "is_precise",
    "percent",
    "ratio_change",
    "ratio_of_ratios",
    "spanning",
]

Floats = NDArray[np.float64]

SEED = 20240611

LEAST_PROCESSES: Final = 4
"""Processes of both sides together from which their own spread can be told."""

# Each interval by itself covers this much. Timing stops at a look at which the intervals happen to be narrow, and that
# costs up to 2 %.
_CONFIDENCE = 0.955
# More figures are first averaged with their neighbours: the work grows with the square.
_MOST = 64


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
    """The median of candidate / baseline over pairs, as a change in %, with the interval of the signed-rank test.

    Figures are compared only within a pair, so a slowdown of the machine that affects both does not change the ratio.
    The interval (F. Wilcoxon, 1945; J. W. Tukey, 1949) is taken from the averages of any two log ratios, and is exact
    for any distribution that is symmetric, with heavy tails too. In pairs in the order A B B A a steady drift of the
    machine slows A in one and B in the next, and cancels. Fewer than 6 pairs give no interval: even their full range
    would cover the true median in less than 95 % of cases.
    """
    ratios = np.asarray(candidate, dtype=np.float64) / np.asarray(baseline, dtype=np.float64)
    middle = percent(float(np.median(ratios)))
    logs = _condensed(np.log(ratios))
    left_out = _outer_averages(len(logs), _CONFIDENCE)
    if not left_out:
        return Change(middle, None, None)
    if np.ptp(ratios) == 0:
        return Change(middle, middle, middle)
    first, second = np.triu_indices(len(logs))
    return _from(middle, (logs[first] + logs[second]) / 2, left_out)


def ratio_of_ratios(before: ArrayLike, after: ArrayLike, *, confidence: float = _CONFIDENCE) -> Change:
    """The median of the ratios ``after`` divided by that of ``before``, as a change in %.

    Its interval is that of the rank-sum test (H. B. Mann and D. R. Whitney, 1947; J. L. Hodges and E. L. Lehmann,
    1963), taken from the differences of any two log ratios. It is exact if both sides spread alike, and it is about
    these ratios alone: see ``between_processes``. 3 on each side, for instance, are too few for an interval.
    """
    first, second = np.log(np.asarray(before, dtype=np.float64)), np.log(np.asarray(after, dtype=np.float64))
    middle = percent(math.exp(float(np.median(second) - np.median(first))))
    spread = np.ptp(first) + np.ptp(second)
    first, second = _condensed(first), _condensed(second)
    left_out = _outer_differences(len(first), len(second), confidence)
    if not left_out:
        return Change(middle, None, None)
    if spread == 0:
        return Change(middle, middle, middle)
    return _from(middle, np.subtract.outer(second, first).ravel(), left_out)


def between_processes(before: Sequence[ArrayLike], after: Sequence[ArrayLike]) -> Change:
    """As ``ratio_of_ratios``, but each process counts once, by the median of its ratios: processes differ too.

    Its interval is Student's, with the spread of the processes of both sides. Fewer than 4 processes give no interval.
    """
    first, second = (np.log([np.median(np.asarray(one)) for one in side]) for side in (before, after))
    middle = percent(math.exp(float(np.mean(second) - np.mean(first))))
    freedom = len(first) + len(second) - 2
    if len(first) + len(second) < LEAST_PROCESSES:
        return Change(middle, None, None)
    squares = float(((first - first.mean()) ** 2).sum() + ((second - second.mean()) ** 2).sum())
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(squares / freedom * (1 / len(first) + 1 / len(second)))
    point = float(np.mean(second) - np.mean(first))
    return spanning(middle, percent(math.exp(point - half)), percent(math.exp(point + half)))


def is_precise(changes: Sequence[Change], width: float) -> bool:
    """Whether both ends of each interval are within ``width`` % of the change; never without an interval."""
    return all(
        change.low is not None and max(abs(end - change.percent) for end in change.ends) <= width for change in changes
    )


def spanning(middle: float, low: float, high: float) -> Change:
    """A change of ``middle`` %; its interval from ``low`` to ``high`` is widened to contain it."""
    # Sums in another order round differently, so a very narrow interval could miss its own middle.
    return Change(middle, min(low, middle), max(high, middle))


def percent(ratio: float) -> float:
    """Convert a ratio to the baseline to a change in %."""
    return (ratio - 1.0) * 100.0


def _from(middle: float, logs: Floats, left_out: int) -> Change:
    """``middle`` with the interval that remains of ``logs`` without the ``left_out`` - 1 lowest and highest."""
    places = (left_out - 1, len(logs) - left_out)
    low, high = np.partition(logs, places)[list(places)]
    return spanning(middle, percent(math.exp(low)), percent(math.exp(high)))


def _condensed(logs: Floats) -> Floats:
    """Means of neighbours, until there are few enough."""
    while len(logs) > _MOST:
        even = len(logs) // 2 * 2
        logs = (logs[:even:2] + logs[1:even:2]) / 2
    return logs


@functools.cache
def _outer_averages(count: int, confidence: float) -> int:
    """The rank of the average of two of ``count`` figures at which the interval begins; 0 if there is none."""
    ways = np.ones(1)
    for rank in range(1, count + 1):
        ways = np.pad(ways, (0, rank)) + np.pad(ways, (rank, 0))
    return _rank(ways, confidence)


@functools.cache
def _outer_differences(first: int, second: int, confidence: float) -> int:
    """The rank of the difference of two figures at which the interval begins; 0 if there is none."""
    # Of `size` ranks chosen among those so far, (size, how far they lie above the lowest possible).
    ways = np.zeros((first + 1, first * second + 1))
    ways[0, 0] = 1.0
    for rank in range(first + second):
        for size in range(min(first, rank + 1), 0, -1):
            above = rank - size + 1
            if above <= second:
                ways[size, above:] += ways[size - 1, : ways.shape[1] - above]
    return _rank(ways[first], confidence)


def _rank(ways: Floats, confidence: float) -> int:
    return int(np.searchsorted(np.cumsum(ways) / ways.sum(), (1 - confidence) / 2, side="right"))


def _signed(percent: float) -> str:
    if abs(percent) >= 99_999.5:
        return f"{percent:+.1e}".replace("e+0", "e").replace("e+", "e")
    text = f"{percent:+.0f}" if abs(percent) >= 99.95 else f"{percent:+.1f}"
    return text[1:] if float(text) == 0 else text

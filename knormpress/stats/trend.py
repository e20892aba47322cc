"""How a figure moves over a series of commits: its slope, and the places where it changed for good."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from knormpress.stats.intervals import Change

__all__ = ["FEWEST_FOR_SLOPE", "FEWEST_FOR_STEPS", "Step", "Trend", "trend"]

FEWEST_FOR_SLOPE: Final = 5
"""With fewer values no order of them is rarer than 1 in 20, so that no interval can reach 95 %."""

FEWEST_FOR_STEPS: Final = 8
"""With fewer values the noise between neighbours is hardly known."""

# Of 100 series of pure noise about one then has a step, see tests/unit/stats/test_trend.py.
_PENALTY = 7.0
_LEAST_LENGTH = 2
# The median of the absolute differences of two normal figures, in standard deviations of one.
_MEDIAN_DIFFERENCE = 0.6745 * 2**0.5


@dataclass(frozen=True)
class Step:
    """From value ``at`` on, the level is higher by ``size``, in the unit of the values."""

    at: int
    size: float


@dataclass(frozen=True)
class Trend:
    """The slope for each value, with its 95 % interval, and the steps in their order."""

    slope: Change
    steps: tuple[Step, ...]


def trend(values: Sequence[float], *, least: float) -> Trend | None:
    """The trend of ``values``, in their order; None for fewer than ``FEWEST_FOR_SLOPE``.

    The slope is the median of those between all pairs of values (Theil and Sen), with Sen's interval by Kendall's tau.

    The steps are those of the function, constant between steps, with the smallest sum of absolute residuals and a
    penalty for each step (the l1-Potts problem, which asv solves too), found exactly by dynamic programming. The
    penalty is 7 standard deviations of the noise, estimated from the differences of neighbours. A level lasts for two
    values at least, so that one outlier is none. Where a straight line leaves less than the steps, there are no steps.

    Args:
        values: finite figures.
        least: the smallest standard deviation to assume, in the unit of the values: what is smaller is of no interest.
    """
    if len(values) < FEWEST_FOR_SLOPE:
        return None
    from scipy.stats import theilslopes

    figures = np.asarray(values, dtype=np.float64)
    slope, _, low, high = map(float, theilslopes(figures))
    change = Change(slope, min(low, slope), max(high, slope))
    if len(values) < FEWEST_FOR_STEPS:
        return Trend(change, ())
    noise = max(least, float(np.median(np.abs(np.diff(figures)))) / _MEDIAN_DIFFERENCE)
    penalty = _PENALTY * noise
    starts, cost = _levels(figures.tolist(), penalty)
    line = figures - slope * np.arange(len(figures))
    if _spread(line.tolist()) + penalty <= cost:
        return Trend(change, ())
    middles = [float(np.median(part)) for part in np.split(figures, starts)]
    sizes = (after - before for before, after in pairwise(middles))
    return Trend(change, tuple(Step(at, size) for at, size in zip(starts, sizes, strict=True)))


def _levels(figures: Sequence[float], penalty: float) -> tuple[list[int], float]:
    """Where each level but the first begins, and the sum of the residuals and penalties."""
    count = len(figures)
    best, begins = [-penalty, *[math.inf] * count], [0] * (count + 1)
    for end in range(_LEAST_LENGTH, count + 1):
        for begin in range(end - _LEAST_LENGTH + 1):
            cost = best[begin] + penalty + _spread(figures[begin:end])
            # Sums round differently, and equal costs are no reason for a step.
            if cost < best[end] - 1e-9 * penalty:
                best[end], begins[end] = cost, begin
    starts = []
    place = begins[count]
    while place > 0:
        starts.append(place)
        place = begins[place]
    return starts[::-1], best[count]


def _spread(figures: Sequence[float]) -> float:
    """The sum of the distances to the median."""
    ordered, half = sorted(figures), len(figures) // 2
    return sum(ordered[len(ordered) - half :]) - sum(ordered[:half])

"""Find the plan that keeps the fewest tokens, from the damage of pruning each layer alone. Numbers only, no model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from knormpress.stats.intervals import Floats

__all__ = ["Choice", "Curve", "least_keep", "mean_of", "plan_at"]

_STEP = 0.02
_HALVINGS = 60


class Choice(NamedTuple):
    """What one layer gets: the number of its curve, and a ratio."""

    curve: int
    ratio: float


@dataclass(frozen=True)
class Curve:
    """One layer pruned by one score: the ``damage`` to the model's predictions at each of ``ratios``, which ascend.

    ``damage`` may be negative, compared with a plan that prunes this layer already. It is interpolated linearly in the
    logarithm of the ratios. It never falls when less is kept; a measured fall is treated as noise.
    """

    ratios: tuple[float, ...]
    damage: tuple[float, ...]

    def sampled(self) -> tuple[Floats, Floats]:
        """Ratios from the lowest to the highest in steps of 0.02, and the damage at each ratio."""
        low, high = self.ratios[0], self.ratios[-1]
        ratios = np.unique(np.round([*np.arange(low, high, _STEP), *self.ratios], 4))
        monotone = np.maximum.accumulate(np.asarray(self.damage)[::-1])[::-1]
        return ratios, np.interp(np.log(ratios), np.log(self.ratios), monotone)


def mean_of(choices: Sequence[Choice]) -> float:
    """The mean of the layers' ratios."""
    return statistics.fmean(choice.ratio for choice in choices)


def plan_at(layers: Sequence[Sequence[Curve]], mean_keep: float) -> tuple[Choice, ...]:
    """The choices, one per layer, with the least total damage among those whose mean ratio is at most ``mean_keep``.

    ``layers`` has the curves of each layer, at least one. Assumes that the layers' damages add up. Bisection finds one
    price of a kept token for all layers (a Lagrange multiplier), which is exact up to the sampling of the ratios. If
    even the lowest ratios have a larger mean, returns those.
    """
    sampled = [[curve.sampled() for curve in curves] for curves in layers]

    def best(curves: Sequence[tuple[Floats, Floats]], price: float) -> Choice:
        costs = [damage + price * ratios for ratios, damage in curves]
        number = int(np.argmin([cost.min() for cost in costs]))
        return Choice(number, float(curves[number][0][np.argmin(costs[number])]))

    def at(price: float) -> tuple[Choice, ...]:
        return tuple(best(curves, price) for curves in sampled)

    # At the highest price every layer gets its lowest ratio; at the lowest price any damage is worth avoiding.
    most = max(float(np.ptp(np.concatenate([damage for _, damage in curves]))) for curves in sampled)
    low, high = 1e-9 * most, max(most, 1e-12) / _STEP * 1e3
    for _ in range(_HALVINGS):
        price = (low + high) / 2 if low == 0 else float(np.sqrt(low * high))
        if mean_of(at(price)) > mean_keep:
            low = price
        else:
            high = price
    return at(high)


def least_keep(
    layers: Sequence[Sequence[Curve]],
    is_good: Callable[[tuple[Choice, ...]], bool],
    *,
    low: float,
    high: float,
    within: float = 0.02,
) -> tuple[Choice, ...] | None:
    """The plan with the least mean keep ratio for which ``is_good`` is true, by bisection between ``low`` and ``high``.

    Tries ``high`` first; returns None if even that plan is not good.
    """
    best = plan_at(layers, high)
    if not is_good(best):
        return None
    high = mean_of(best)
    while high - low > within:
        middle = (low + high) / 2
        plan = plan_at(layers, middle)
        if is_good(plan):
            best, high = plan, min(middle, mean_of(plan))
        else:
            low = middle
    return best

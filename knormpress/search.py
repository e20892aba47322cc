"""From what each layer's pruning does alone to the plan that keeps least: numbers only, no model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from knormpress.intervals import Floats

__all__ = ["Curve", "least_keep", "plan_at"]

_STEP = 0.02
_HALVINGS = 60


@dataclass(frozen=True)
class Curve:
    """One layer: what it does to the model's predictions to keep each of ``ratios``, which ascend.

    ``damage`` may be negative, against a plan that prunes this layer already. Between the ratios it is taken to be
    linear in their logarithm; it never falls as less is kept, since what looks so is noise.
    """

    ratios: tuple[float, ...]
    damage: tuple[float, ...]

    def sampled(self) -> tuple[Floats, Floats]:
        """Ratios from the lowest to the highest in steps of 0.02, and the damage at each."""
        low, high = self.ratios[0], self.ratios[-1]
        ratios = np.unique(np.round([*np.arange(low, high, _STEP), *self.ratios], 4))
        falling = np.maximum.accumulate(np.asarray(self.damage)[::-1])[::-1]
        return ratios, np.interp(np.log(ratios), np.log(self.ratios), falling)


def plan_at(curves: Sequence[Curve], mean_keep: float) -> tuple[float, ...]:
    """The ratios, one a layer, whose damages sum to the least while their mean is at most ``mean_keep``.

    The layers' damages are taken to add up. One price of a kept token for all layers (Lagrange's multiplier) is found
    by halving: exact but for the steps between the ratios that are sampled. Where even the lowest ratios keep more,
    those.
    """
    sampled = [curve.sampled() for curve in curves]

    def at(price: float) -> tuple[float, ...]:
        return tuple(float(ratios[np.argmin(damage + price * ratios)]) for ratios, damage in sampled)

    # At the highest price nothing is worth keeping, at the lowest all is that does any harm.
    most = max(float(np.ptp(damage)) for _, damage in sampled)
    low, high = 1e-9 * most, max(most, 1e-12) / _STEP * 1e3
    for _ in range(_HALVINGS):
        price = (low + high) / 2 if low == 0 else float(np.sqrt(low * high))
        if statistics.fmean(at(price)) > mean_keep:
            low = price
        else:
            high = price
    return at(high)


def least_keep(
    curves: Sequence[Curve],
    is_good: Callable[[tuple[float, ...]], bool],
    *,
    low: float,
    high: float,
    within: float = 0.02,
) -> tuple[float, ...] | None:
    """The plan of least mean keep that is found good, by halving between ``low`` and ``high``.

    ``high`` is tried first: where it is not good there is None.
    """
    best = plan_at(curves, high)
    if not is_good(best):
        return None
    high = statistics.fmean(best)
    while high - low > within:
        middle = (low + high) / 2
        plan = plan_at(curves, middle)
        if is_good(plan):
            best, high = plan, min(middle, statistics.fmean(plan))
        else:
            low = middle
    return best

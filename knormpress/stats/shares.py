"""Shares of found items, and how they change: Wilson's interval and McNemar's test. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from knormpress.stats.intervals import Change, spanning

__all__ = ["Share", "found_change", "lost_and_gained", "share_of"]

_Z = 1.959964  # the normal quantile of a two-sided interval of 95 %


@dataclass(frozen=True)
class Share:
    """``found`` of ``known`` items, and the ends of the 95 % interval of their share; NaN where none is known."""

    found: int
    known: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.found} of {self.known}"

    @property
    def value(self) -> float:
        """The share itself; NaN where none is known."""
        return self.found / self.known if self.known else math.nan

    @property
    def ends(self) -> str:
        """The interval as text, in %."""
        return f"{100 * self.low:.0f}..{100 * self.high:.0f} %" if self.known else "no item"

    @property
    def percent(self) -> str:
        """The share and its interval as text, in %."""
        if not self.known:
            return "no item"
        return f"{100 * self.value:.0f} % ({100 * self.low:.0f}..{100 * self.high:.0f})"


def share_of(texts: Sequence[tuple[int, int]]) -> Share:
    """The share of found items, with Wilson's interval (E. B. Wilson, 1927), which is valid near 1 too.

    Args:
        texts: for each text, how many of its items were found, and how many there are.

    Items of one text are not independent. Their number is therefore divided by the design effect, the variance of the
    share over texts divided by that of independent items (Kish, Survey Sampling, 1965), where that is above 1. Where
    all items are found, or none, there is nothing to estimate it from, and they count as independent.
    """
    found, known = sum(part for part, _ in texts), sum(whole for _, whole in texts)
    if not known:
        return Share(0, 0, math.nan, math.nan)
    p, count = found / known, float(known)
    parts = [text for text in texts if text[1]]
    if 0 < found < known and 1 < len(parts) < known:
        spread = sum((part - p * whole) ** 2 for part, whole in parts) * len(parts) / (len(parts) - 1)
        count /= max(1.0, spread / (known * p * (1 - p)))
    middle = p + _Z**2 / (2 * count)
    half = _Z * math.sqrt(p * (1 - p) / count + _Z**2 / (4 * count**2))
    scale = 1 + _Z**2 / count
    # Wilson's interval holds the share; where that is 0 or 1, rounding must not put an end beyond it.
    return Share(found, known, max(0.0, min(p, (middle - half) / scale)), min(1.0, max(p, (middle + half) / scale)))


def lost_and_gained(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int]:
    """How many items were found before and not after, and the other way round."""
    pairs = list(zip(before, after, strict=True))
    return pairs.count((True, False)), pairs.count((False, True))


def found_change(before: Sequence[bool], after: Sequence[bool]) -> Change:
    """The change of the share of found items in points of %, paired, with an exact interval.

    As in McNemar's exact test (Q. McNemar, 1947) only items whose outcome changed count. Among them, the share that was
    lost has the exact interval of Clopper and Pearson (1934); it holds one half just where the test finds no change.
    Without an item there is no interval.
    """
    lost, gained = lost_and_gained(before, after)
    changed, items = lost + gained, len(before)
    if not items:
        return Change(0.0, None, None)
    if not changed:
        return Change(0.0, 0.0, 0.0)
    # All of scipy.stats takes long to import, and most who import this module never come here.
    from scipy.stats import binomtest

    ends = binomtest(lost, changed).proportion_ci(method="exact")
    point = 100 * changed / items
    return spanning(100 * (gained - lost) / items, point * (1 - 2 * ends.high), point * (1 - 2 * ends.low))

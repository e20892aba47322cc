"""Whether two figures put the same things in the same order."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["rank_correlation"]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation (C. Spearman, 1904) of two figures of the same things, in the same order.

    1 if both put the things in the same order, -1 if in opposite ones; NaN if one of the figures never differs.
    """
    if len(set(first)) < 2 or len(set(second)) < 2:
        return math.nan
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)

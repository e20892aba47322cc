"""The change of perplexity between two caches that scored the same tokens, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from knormpress.stats.intervals import SEED, Change, Floats, percent, spanning

__all__ = ["LARGEST_NATS", "LEAST_DOCUMENTS", "ppl_change", "ppl_percent", "too_few"]

LARGEST_NATS: Final = 700.0
"""exp() of slightly more overflows float64."""

LEAST_DOCUMENTS: Final = 8
"""The bootstrap of fewer documents does not show how documents differ, and its interval would be too narrow."""

_RESAMPLES = 2_000
_BLOCK = 64


def ppl_percent(gaps: Sequence[Floats]) -> float:
    """exp(mean of ``gaps``) - 1 in %, see ``ppl_change``."""
    return _rise(float(np.concatenate(gaps).mean()))


def ppl_change(gaps: Sequence[Floats]) -> Change:
    """exp(mean of ``gaps``) - 1 in %, with the interval of a two-stage bootstrap.

    Args:
        gaps: for each document (tokens,): how much the negative log-likelihood of each token rose, in nats.

    Documents are drawn with replacement, and in each drawn document blocks of 64 consecutive tokens, because
    neighbouring tokens share their context and are not independent. A block can continue from the end of a document at
    its start, so that every token is drawn equally often. Fewer than ``LEAST_DOCUMENTS`` give no interval.
    """
    middle = ppl_percent(gaps)
    if len(gaps) < LEAST_DOCUMENTS:
        return Change(middle, None, None)
    low, high = np.percentile(_resampled_means(gaps), (2.5, 97.5))
    return spanning(middle, _rise(low), _rise(high))


def too_few(documents: int) -> str:
    """Why so many documents give no interval, in words; empty if they do."""
    if documents >= LEAST_DOCUMENTS:
        return ""
    return f"too few documents ({documents} of {LEAST_DOCUMENTS}) for an interval"


def _rise(nats: float) -> float:
    """Convert a gap in nats per token to a change of perplexity in %, limited so that it does not overflow."""
    return percent(math.exp(min(nats, LARGEST_NATS)))


def _resampled_means(gaps: Sequence[Floats]) -> Floats:
    random = np.random.default_rng(SEED)
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

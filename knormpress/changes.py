"""The change of perplexity against the full cache, and whether a gate lets it pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal, TypeAlias

import numpy as np
from scipy.stats import binomtest

from knormpress.intervals import SEED, Change, Floats, percent, spanning
from knormpress.records import DocumentScore

__all__ = ["LARGEST_NATS", "documents_to_decide", "gate", "passkey_gate", "ppl_change"]

LARGEST_NATS: Final = 700.0
"""exp() of a little more is no longer a float64."""

_RESAMPLES = 2_000
_BLOCK = 64


Decision: TypeAlias = Literal["pass", "fail", "inconclusive"]


def gate(change: Change, tolerance: float) -> Decision:
    """Whether a change stays within +-``tolerance`` %: decided by its whole interval, or not at all.

    ``pass`` if the interval lies within the tolerance, ``fail`` if it lies outside, ``inconclusive`` if it crosses the
    limit or there is none. A fall beyond the tolerance is as suspect as a rise.
    """
    if change.low is None or change.high is None:
        return "inconclusive"
    if -tolerance <= change.low and change.high <= tolerance:
        return "pass"
    return "fail" if change.low > tolerance or change.high < -tolerance else "inconclusive"


def passkey_gate(found: int, known: int, share: float) -> tuple[Decision, str]:
    """Whether ``found`` of ``known`` passkeys are ``share`` of them or more, and what was measured, in words.

    The whole 95 % interval of the proportion decides: E. B. Wilson's (1927), which holds near 1 as well.
    """
    if not known:
        return "inconclusive", "the full cache found no passkey, so that none can be lost"
    interval = binomtest(found, known).proportion_ci(method="wilson")
    text = (
        f"{found} of the {known} passkeys found that the full cache finds: {100 * found / known:.0f} % "
        f"({100 * interval.low:.0f}..{100 * interval.high:.0f}), wanted {100 * share:g} %"
    )
    if interval.low >= share:
        return "pass", text
    return ("fail" if interval.high < share else "inconclusive"), text


def documents_to_decide(change: Change, tolerance: float, documents: int) -> int | None:
    """About how many more documents it takes for ``gate`` to decide, after ``documents`` left it inconclusive.

    An interval narrows with the square root of the documents, about a change that stays where it is. None where it lies
    on the limit itself, or has no interval yet.
    """
    if change.low is None or change.high is None:
        return None
    above, below = change.high - change.percent, change.percent - change.low
    if abs(change.percent) < tolerance:
        room = [(above, tolerance - change.percent), (below, tolerance + change.percent)]
    elif change.percent > 0:
        room = [(below, change.percent - tolerance)]
    else:
        room = [(above, -tolerance - change.percent)]
    if min(distance for _, distance in room) <= 0:
        return None
    wanted = math.ceil(documents * max(width / distance for width, distance in room) ** 2)
    return max(1, wanted - documents)


def ppl_change(documents: Sequence[DocumentScore]) -> Change:
    """exp(mean over scored tokens of (candidate NLL - baseline NLL)) - 1 in %, with a paired two-stage bootstrap.

    Documents are drawn with replacement, and inside each drawn document blocks of 64 consecutive tokens (round the end
    and on at the start, so that every token is drawn equally often), because neighbouring tokens share their context
    and are not independent. One document of up to 64 tokens gives no interval; an interval from one longer document
    speaks of that document only.
    """
    gaps: list[Floats] = [np.subtract(document.candidate_nll, document.baseline_nll) for document in documents]
    middle = _rise(float(np.concatenate(gaps).mean()))
    if len(gaps) == 1 and len(gaps[0]) <= _BLOCK:
        return Change(middle, None, None)
    low, high = np.percentile(_resampled_means(gaps), (2.5, 97.5))
    return spanning(middle, _rise(low), _rise(high))


def _rise(nats: float) -> float:
    """A gap in nats a token as a change of perplexity in %, at most the largest that a float holds."""
    return percent(math.exp(min(nats, LARGEST_NATS)))


def _resampled_means(gaps: list[Floats]) -> Floats:
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

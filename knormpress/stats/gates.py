"""Decide whether a measured loss passes a gate. The whole interval decides."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from knormpress.stats.intervals import Change
from knormpress.stats.shares import Share, share_of

__all__ = ["Decision", "documents_to_decide", "gate", "passkey_gate", "share_gate"]

Decision: TypeAlias = Literal["pass", "fail", "inconclusive"]


def gate(change: Change, tolerance: float) -> Decision:
    """Decide whether a change is within +-``tolerance`` %.

    ``pass`` if the whole interval is within the tolerance, ``fail`` if it is outside, ``inconclusive`` if it crosses a
    limit or there is no interval. A fall beyond the tolerance is as suspicious as a rise.
    """
    if change.low is None or change.high is None:
        return "inconclusive"
    if -tolerance <= change.low and change.high <= tolerance:
        return "pass"
    return "fail" if change.low > tolerance or change.high < -tolerance else "inconclusive"


def share_gate(share: Share, wanted: float) -> Decision:
    """Decide whether a share is at least ``wanted``; its whole interval decides. Without items it is inconclusive."""
    if share.low >= wanted:
        return "pass"
    return "fail" if share.high < wanted else "inconclusive"


def passkey_gate(found: int, known: int, share: float) -> tuple[Decision, str]:
    """Decide whether ``found`` of ``known`` passkeys are at least ``share``; returns this and the figures as text."""
    measured = share_of([(1, 1)] * found + [(0, 1)] * (known - found))
    if not known:
        return "inconclusive", "the full cache found no passkey, so none can be lost"
    text = f"found {found} of the {known} passkeys that the full cache finds: {measured.percent}"
    return share_gate(measured, share), f"{text}, wanted {100 * share:g} %"


def documents_to_decide(change: Change, tolerance: float, documents: int) -> int | None:
    """About how many more documents ``gate`` needs to decide, after ``documents`` were inconclusive.

    Assumes that the change stays the same, and that the interval narrows with the square root of the documents. None if
    the change is on the limit itself or has no interval.
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

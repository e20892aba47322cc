"""Decide whether a measured loss passes a gate. The whole interval decides."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from scipy.stats import binomtest

from knormpress.stats.intervals import Change

__all__ = ["Decision", "documents_to_decide", "gate", "passkey_gate"]

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


def passkey_gate(found: int, known: int, share: float) -> tuple[Decision, str]:
    """Decide whether ``found`` of ``known`` passkeys are at least ``share``; returns this and the figures as text.

    The whole 95 % interval of the proportion decides. It is E. B. Wilson's (1927), which is valid near 1 too.
    """
    if not known:
        return "inconclusive", "the full cache found no passkey, so none can be lost"
    interval = binomtest(found, known).proportion_ci(method="wilson")
    text = (
        f"found {found} of the {known} passkeys that the full cache finds: {100 * found / known:.0f} % "
        f"({100 * interval.low:.0f}..{100 * interval.high:.0f}), wanted {100 * share:g} %"
    )
    if interval.low >= share:
        return "pass", text
    return ("fail" if interval.high < share else "inconclusive"), text


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

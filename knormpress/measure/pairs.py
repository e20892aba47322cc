"""Measure two things in turn, so that a change of the machine's speed affects both in the same way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeAlias, TypeVar

from knormpress.errors import KnormError

__all__ = ["Pairs", "Repeat", "in_turn", "until_enough"]

T = TypeVar("T")

Repeat: TypeAlias = Callable[[Callable[[], None], Callable[[], None]], None]
"""Calls ``before`` and then ``run``, again and again until ``before`` raises."""


def until_enough(before: Callable[[], None], run: Callable[[], None]) -> None:
    """A ``Repeat`` that does nothing else."""
    while True:
        before()
        run()


class _Enough(BaseException):
    """Ends ``Repeat``. It is not an ``Exception``, so that pytest-benchmark does not take it for a failure."""


@dataclass
class Pairs(Generic[T]):
    """Measured pairs: ``baseline[i]`` and ``candidate[i]`` are neighbours in time; ``stopped`` says why it ended."""

    baseline: list[T] = field(default_factory=list)
    candidate: list[T] = field(default_factory=list)
    stopped: Literal["precise", "time", "rounds"] = "rounds"


def in_turn(
    baseline: Callable[[], T],
    candidate: Callable[[], T],
    *,
    rounds: int,
    is_precise: Callable[[Pairs[T]], bool] | None = None,
    seconds: float = math.inf,
    repeat: Repeat = until_enough,
) -> Pairs[T]:
    """Call two functions in turn in the order A B B A A B ... and pair what they return.

    Args:
        baseline, candidate: A and B.
        rounds: the least number of pairs, 1 or more.
        is_precise: called after ``rounds``, and only between two A B B A, in which a steady drift of the machine
            cancels; true stops. Without it ``rounds`` pairs are measured.
        seconds: after ``rounds``, start no more A B B A once this time has passed.
        repeat: runs the candidate, see ``Repeat``; with it pytest-benchmark can use its own clock.

    Raises:
        KnormError: ``rounds`` is below 1.
    """
    if rounds < 1:
        raise KnormError(f"rounds is {rounds}; wanted at least 1")
    pairs: Pairs[T] = Pairs()

    def complete() -> None:
        if len(pairs.candidate) > len(pairs.baseline):
            pairs.baseline.append(baseline())

    def before() -> None:
        complete()
        if len(pairs.candidate) >= rounds and is_precise is None:
            raise _Enough
        if len(pairs.candidate) >= rounds and is_precise is not None and len(pairs.candidate) % 2 == 0:
            pairs.stopped = "precise" if is_precise(pairs) else "time"
            if pairs.stopped == "precise" or time.perf_counter() - start >= seconds:
                raise _Enough
        if len(pairs.candidate) % 2 == 0:
            pairs.baseline.append(baseline())

    start = time.perf_counter()
    with suppress(_Enough):
        repeat(before, lambda: pairs.candidate.append(candidate()))
    complete()  # if it stopped repeating before the end
    return pairs

"""Measure things in turn, so that a change of the machine's speed affects all of them in the same way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeAlias, TypeVar

from knormpress.errors import KnormError

__all__ = ["Pairs", "Repeat", "in_turn", "until_enough"]

T = TypeVar("T")

Repeat: TypeAlias = Callable[[Callable[[], None], Callable[[], None]], None]
"""Calls ``before`` and then ``run``, which runs a candidate, again and again until ``before`` raises."""


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
    *candidates: Callable[[], T],
    rounds: int,
    is_precise: Callable[[Pairs[T]], bool] | None = None,
    seconds: float = math.inf,
    repeat: Repeat = until_enough,
) -> list[Pairs[T]]:
    """Call functions in turn in the order A B B A A B ..., and pair what each candidate returns with the baseline.

    Several candidates share the calls of the baseline: A B C C B A A B C ... Each stops for itself.

    Args:
        baseline, candidates: A, and B, C, ...
        rounds: the least number of pairs, 1 or more.
        is_precise: called after ``rounds`` for each candidate, and only between two A B B A, in which a steady drift of
            the machine cancels; true ends that candidate's calls. Without it ``rounds`` pairs are measured.
        seconds: after ``rounds``, start no more A B B A once this time has passed.
        repeat: runs the candidates, see ``Repeat``; with it pytest-benchmark can use its own clock for one candidate.

    Returns:
        The pairs of each candidate.

    Raises:
        KnormError: ``rounds`` is below 1.
    """
    if rounds < 1:
        raise KnormError(f"rounds is {rounds}; wanted at least 1")
    found: list[Pairs[T]] = [Pairs() for _ in candidates]
    due: int | None = None

    def turns() -> Iterator[int]:
        """The numbers of the candidates in the order of their calls, with the baseline's calls between them."""
        running = list(range(len(found)))
        start = time.perf_counter()
        while running:
            _append(found, running, baseline())
            yield from running
            if is_precise is None and _fewest(found, running) >= rounds:
                return
            yield from reversed(running)
            _append(found, running, baseline())
            if _fewest(found, running) < rounds:
                continue
            if is_precise is None:
                return
            time_is_up = time.perf_counter() - start >= seconds
            for which in tuple(running):
                precise = is_precise(found[which])
                if precise or time_is_up:
                    found[which].stopped = "precise" if precise else "time"
                    running.remove(which)

    def before() -> None:
        nonlocal due
        due = next(turn, None)
        if due is None:
            raise _Enough

    def run() -> None:
        assert due is not None
        found[due].candidate.append(candidates[due]())

    turn = turns()
    with suppress(_Enough):
        repeat(before, run)
    # If it stopped repeating before the end.
    if late := [which for which, pairs in enumerate(found) if len(pairs.candidate) > len(pairs.baseline)]:
        _append(found, late, baseline())
    return found


def _append(found: list[Pairs[T]], running: list[int], measured: T) -> None:
    for which in running:
        found[which].baseline.append(measured)


def _fewest(found: list[Pairs[T]], running: list[int]) -> int:
    return min(len(found[which].candidate) for which in running)

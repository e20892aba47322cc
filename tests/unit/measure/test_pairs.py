"""The order in which two things are measured, and when there are enough pairs of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest

from knormpress.errors import KnormError
from knormpress.measure import pairs
from knormpress.measure.pairs import Pairs, in_turn


class Counted:
    """Two functions whose calls are numbered together, from 0."""

    def __init__(self) -> None:
        self.order = ""

    def baseline(self) -> int:
        self.order += "A"
        return len(self.order) - 1

    def candidate(self) -> int:
        self.order += "B"
        return len(self.order) - 1


@pytest.fixture
def counted() -> Counted:
    return Counted()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a second each time it is read."""
    seconds = count()
    monkeypatch.setattr(pairs.time, "perf_counter", lambda: float(next(seconds)))


@pytest.mark.parametrize(
    ("rounds", "order", "baseline", "candidate"),
    [(1, "AB", [0], [1]), (2, "ABBA", [0, 3], [1, 2]), (5, "ABBAABBAAB", [0, 3, 4, 7, 8], [1, 2, 5, 6, 9])],
)
def test_neighbours_are_paired_in_the_order_a_b_b_a(
    counted: Counted, rounds: int, order: str, baseline: list[int], candidate: list[int]
) -> None:
    (found,) = in_turn(counted.baseline, counted.candidate, rounds=rounds)
    assert counted.order == order
    assert (found.baseline, found.candidate, found.stopped) == (baseline, candidate, "rounds")


@pytest.mark.parametrize(("rounds", "order"), [(1, "ABCD"), (2, "ABCDDCBA"), (3, "ABCDDCBAABCD")])
def test_several_candidates_share_the_calls_of_the_baseline(rounds: int, order: str) -> None:
    """Each of them stands as far from the one as from the other of two calls: a steady drift cancels."""
    called: list[str] = []

    def calling(name: str) -> Callable[[], str]:
        return lambda: called.append(name) or f"{name}{len(called) - 1}"

    found = in_turn(*map(calling, "ABCD"), rounds=rounds)
    assert "".join(called) == order
    places = {name: [f"{name}{place}" for place, each in enumerate(order) if each == name] for name in "ABCD"}
    assert [pairs.candidate for pairs in found] == [places["B"], places["C"], places["D"]]
    assert all(pairs.baseline == places["A"] for pairs in found)


def test_a_candidate_is_not_called_again_when_it_is_precise() -> None:
    called: list[str] = []

    def calling(name: str) -> Callable[[], str]:
        return lambda: called.append(name) or name

    def is_precise(pairs: Pairs[str]) -> bool:
        return pairs.candidate[0] == "B" or len(pairs.candidate) >= 6

    found = in_turn(*map(calling, "ABC"), rounds=2, is_precise=is_precise)
    assert "".join(called) == "ABCCBA" + "ACCA" * 2
    assert [(len(pairs.baseline), len(pairs.candidate), pairs.stopped) for pairs in found] == [
        (2, 2, "precise"),
        (6, 6, "precise"),
    ]


def test_no_pair_is_refused(counted: Counted) -> None:
    with pytest.raises(KnormError, match="rounds is 0"):
        in_turn(counted.baseline, counted.candidate, rounds=0)
    assert counted.order == ""


@pytest.mark.parametrize(("enough", "measured"), [(1, 4), (4, 4), (5, 6), (8, 8)])
def test_pairs_are_added_until_they_are_precise(counted: Counted, enough: int, measured: int) -> None:
    """Asked from the pairs wanted at least on, and of whole A B B A only: a steady drift cancels in these."""
    asked: list[int] = []

    def is_precise(found: Pairs[int]) -> bool:
        assert len(found.baseline) == len(found.candidate)
        asked.append(len(found.baseline))
        return len(found.baseline) >= enough

    (found,) = in_turn(counted.baseline, counted.candidate, rounds=3, is_precise=is_precise)
    assert (found.stopped, len(found.candidate)) == ("precise", measured)
    assert asked == list(range(4, measured + 1, 2))


@pytest.mark.parametrize(("seconds", "measured"), [(0.0, 2), (1.0, 2), (1.5, 4), (4.0, 8)])
def test_no_pair_is_begun_when_the_time_is_up(counted: Counted, clock: None, seconds: float, measured: int) -> None:
    """But the pairs wanted at least are, whatever they take. The clock is read at the start, then once an A B B A."""
    (found,) = in_turn(counted.baseline, counted.candidate, rounds=2, is_precise=lambda _: False, seconds=seconds)
    assert (found.stopped, len(found.baseline), len(found.candidate)) == ("time", measured, measured)


def test_the_last_pair_may_be_precise_when_the_time_is_up(counted: Counted, clock: None) -> None:
    (found,) = in_turn(counted.baseline, counted.candidate, rounds=2, is_precise=lambda _: True, seconds=0.0)
    assert (found.stopped, len(found.candidate)) == ("precise", 2)


def test_whoever_repeats_the_candidate_runs_it_and_nothing_else(counted: Counted) -> None:
    """So pytest-benchmark times it by its own clock. What catches every ``Exception`` must not hold up the end."""

    def repeat(before: Callable[[], None], run: Callable[[], None]) -> None:
        while True:
            try:
                before()
                counted.order += "("
                run()
                counted.order += ")"
            except Exception:
                pytest.fail("the end was taken for an error")

    (found,) = in_turn(counted.baseline, counted.candidate, rounds=3, repeat=repeat)
    assert counted.order == "A(B)(B)AA(B)"
    assert len(found.baseline) == len(found.candidate) == 3


@pytest.mark.parametrize(("times", "order"), [(0, ""), (1, "AB"), (2, "ABBA")])
def test_pairs_are_whole_where_it_is_not_repeated_to_the_end(counted: Counted, times: int, order: str) -> None:
    """As with ``--benchmark-disable``, which runs everything once."""

    def repeat(before: Callable[[], None], run: Callable[[], None]) -> None:
        for _ in range(times):
            before()
            run()

    (found,) = in_turn(counted.baseline, counted.candidate, rounds=9, repeat=repeat)
    assert counted.order == order
    assert len(found.baseline) == len(found.candidate) == times


def test_what_fails_is_not_hidden(counted: Counted) -> None:
    def fail() -> int:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        in_turn(counted.baseline, fail, rounds=2)

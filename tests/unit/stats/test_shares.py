"""Shares of found items and their changes, against known intervals and exact tests."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from knormpress.stats.intervals import Change
from knormpress.stats.shares import found_change, lost_and_gained, share_of


def independent(found: int, known: int) -> list[tuple[int, int]]:
    """Texts of one item each."""
    return [(1, 1)] * found + [(0, 1)] * (known - found)


@pytest.mark.parametrize(
    ("found", "known", "low", "high"),
    [(36, 40, 0.769, 0.960), (40, 40, 0.912, 1.0), (0, 40, 0.0, 0.088), (1, 1, 0.207, 1.0), (5, 10, 0.237, 0.763)],
)
def test_the_interval_of_independent_items_is_wilsons(found: int, known: int, low: float, high: float) -> None:
    share = share_of(independent(found, known))
    assert (share.found, share.known, share.value) == (found, known, found / known)
    assert (share.low, share.high) == pytest.approx((low, high), abs=5e-4)


@given(st.integers(1, 200).flatmap(lambda known: st.tuples(st.integers(0, known), st.just(known))))
def test_it_is_wilsons_for_every_count(counts: tuple[int, int]) -> None:
    found, known = counts
    share, expected = share_of(independent(found, known)), binomtest(found, known).proportion_ci(method="wilson")
    assert (share.low, share.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert 0.0 <= share.low <= share.value <= share.high <= 1.0


def test_items_that_are_lost_together_count_as_fewer() -> None:
    """Ten texts of four items, of which nine are whole and one is lost: that is 9 of 10 rather than 36 of 40."""
    together, apart = share_of([(4, 4)] * 9 + [(0, 4)]), share_of(independent(36, 40))
    as_texts = share_of(independent(9, 10))
    assert (together.found, together.known) == (36, 40)
    assert together.low < apart.low - 0.1
    assert together.high > apart.high
    # The variance over ten texts is estimated with nine degrees of freedom.
    assert as_texts.low - 0.03 < together.low < as_texts.low


def test_losses_that_are_spread_evenly_do_not_count_as_more() -> None:
    """One item lost in each text is less spread than chance gives, which chance can give too."""
    even, apart = share_of([(3, 4)] * 10), share_of(independent(30, 40))
    assert (even.low, even.high) == (apart.low, apart.high)


def test_one_text_and_texts_without_an_item_give_an_interval() -> None:
    assert share_of([(3, 4)]) == share_of(independent(3, 4))
    assert share_of([(3, 4), (0, 0)]) == share_of([(3, 4)])


def test_where_nothing_is_known_there_is_no_share() -> None:
    for texts in ([], [(0, 0)]):
        share = share_of(texts)
        assert (share.found, share.known, share.percent, str(share)) == (0, 0, "no item", "0 of 0")
        assert math.isnan(share.value)
        assert math.isnan(share.low)
        assert math.isnan(share.high)


def test_a_share_as_text() -> None:
    share = share_of(independent(36, 40))
    assert str(share) == "36 of 40"
    assert share.percent == "90 % (77..96)"


def items(both: int, lost: int, gained: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Before and after."""
    before = [True] * (both + lost) + [False] * (gained + neither)
    after = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return before, after


@given(*[st.integers(0, 30)] * 3, st.integers(1, 30))
def test_a_change_is_found_just_where_mcnemars_exact_test_finds_one(
    both: int, lost: int, gained: int, neither: int
) -> None:
    before, after = items(both, lost, gained, neither)
    assert lost_and_gained(before, after) == (lost, gained)
    change = found_change(before, after)
    assert change.low is not None
    assert change.high is not None
    assert change.percent == pytest.approx(100 * (sum(after) - sum(before)) / len(before))
    assert change.low <= change.percent <= change.high
    finds = lost + gained > 0 and binomtest(lost, lost + gained).pvalue < 0.05
    assert (change.low > 0 or change.high < 0) == finds


def test_more_found_is_a_rise_and_less_a_fall() -> None:
    rise, fall = found_change(*items(20, 0, 8, 2)), found_change(*items(20, 8, 0, 2))
    assert rise.percent == pytest.approx(100 * 8 / 30)
    assert rise.low is not None
    assert rise.low > 0
    assert (fall.percent, fall.low, fall.high) == pytest.approx((-rise.percent, -rise.ends[1], -rise.ends[0]))


def test_what_did_not_change_is_no_change() -> None:
    assert found_change(*items(5, 0, 0, 3)) == Change(0.0, 0.0, 0.0)


def test_without_an_item_there_is_no_interval() -> None:
    assert found_change([], []) == Change(0.0, None, None)

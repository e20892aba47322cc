"""The change of a ratio and its interval, from figures that were drawn for it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, wilcoxon

from knormpress.stats.intervals import Change, between_processes, percent, ratio_change, ratio_of_ratios


def bounds(change: Change) -> tuple[float, float]:
    assert change.low is not None
    assert change.high is not None
    return change.low, change.high


@pytest.mark.parametrize(
    ("baseline", "candidate", "percent"),
    [
        ([1.0, 1.0, 1.0], [0.5, 0.9, 40.0], -10.0),
        # The median of ratios, and not the ratio of medians.
        ([1.0, 2.0, 4.0], [2.0, 2.0, 2.0], 0.0),
        ([1.0, 2.0, 10.0], [3.0, 1.0, 2.0], -50.0),
    ],
)
def test_the_middle_pair_decides(baseline: list[float], candidate: list[float], percent: float) -> None:
    assert ratio_change(baseline, candidate).percent == pytest.approx(percent)


def test_a_drift_of_the_machine_cancels() -> None:
    """The machine becomes three times slower; unpaired, the two sides would lie in each other's range."""
    random = np.random.default_rng(3)
    drift = np.linspace(1.0, 3.0, 12) * np.exp(random.normal(0.0, 0.3, 12))
    change = ratio_change(drift, 0.8 * drift * np.exp(random.normal(0.0, 0.003, 12)))
    low, high = bounds(change)
    assert change.percent == pytest.approx(-20.0, abs=0.5)
    assert high - low < 1.5
    assert np.ptp(bounds(ratio_change(drift, 0.8 * np.roll(drift, 5)))) > 20.0


@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_fewer_than_six_pairs_give_no_interval(pairs: int) -> None:
    change = ratio_change([1.0, 2.0, 3.0, 4.0, 5.0][:pairs], [0.9, 1.8, 2.7, 3.6, 4.6][:pairs])
    assert change.percent == pytest.approx(-10.0)
    assert (change.low, change.high) == (None, None)
    assert change.ends == (change.percent, change.percent)
    assert change.interval == "no interval"


@pytest.mark.parametrize("pairs", [6, 200])
def test_equal_ratios_give_an_interval_of_one_point(pairs: int) -> None:
    assert ratio_change([1.0] * pairs, [0.5] * pairs) == Change(-50.0, -50.0, -50.0)


def test_the_same_pairs_give_the_same_interval() -> None:
    baseline, candidate = np.random.default_rng(0).gamma(4.0, 0.1, (2, 9))
    assert ratio_change(baseline, candidate) == ratio_change(baseline, candidate)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(1e-4, 1e3), st.floats(1e-4, 1e3)), min_size=6, max_size=9))
def test_the_interval_lies_within_the_pairs_and_holds_the_change(pairs: list[tuple[float, float]]) -> None:
    baseline, candidate = zip(*pairs, strict=True)
    change = ratio_change(baseline, candidate)
    low, high = bounds(change)
    ratios = [after / before for before, after in pairs]
    assert low <= change.percent <= high
    rounding = 1e-9 * (1.0 + max(ratios))
    assert 1.0 + low / 100.0 >= min(ratios) - rounding
    assert 1.0 + high / 100.0 <= max(ratios) + rounding


def test_the_interval_covers_the_truth_in_about_95_percent() -> None:
    random = np.random.default_rng(8)
    held = 0
    for _ in range(300):
        machine = random.gamma(4.0, 0.1, 20)
        low, high = bounds(ratio_change(machine, machine * 0.85 * np.exp(random.normal(0.0, 0.1, 20))))
        held += low <= -15.0 <= high
    assert 0.93 <= held / 300 <= 0.995


def test_the_interval_of_six_pairs_is_their_range() -> None:
    ratios = [0.9, 0.97, 1.02, 1.0, 1.3, 0.99]
    assert bounds(ratio_change([1.0] * 6, ratios)) == pytest.approx((-10.0, 30.0))


@pytest.mark.parametrize("pairs", [7, 12, 20])
def test_the_interval_is_what_the_signed_rank_test_does_not_reject(pairs: int) -> None:
    """Against scipy's exact test, just within and just beyond both ends."""
    ratios = np.exp(np.random.default_rng(pairs).normal(0.1, 0.05, pairs))
    low, high = bounds(ratio_change(np.ones(pairs), ratios))
    for end, outwards in ((low, -1), (high, 1)):
        for step, within in ((-1e-9, True), (1e-9, False)):
            shift = math.log1p(end / 100) + outwards * step
            assert bool(wilcoxon(np.log(ratios) - shift, method="exact").pvalue > 0.045) is within


@pytest.mark.parametrize(("first", "second"), [(4, 4), (5, 7), (12, 6)])
def test_the_interval_between_two_runs_is_what_the_rank_sum_test_does_not_reject(first: int, second: int) -> None:
    random = np.random.default_rng(first)
    before, after = (np.exp(random.normal(0.0, 0.05, size)) for size in (first, second))
    low, high = bounds(ratio_of_ratios(before, after))
    for end, outwards in ((low, -1), (high, 1)):
        for step, within in ((-1e-9, True), (1e-9, False)):
            shift = math.log1p(end / 100) + outwards * step
            found = mannwhitneyu(np.log(after) - shift, np.log(before), method="exact").pvalue
            assert bool(found > 0.045) is within


def test_many_pairs_take_little_time_and_lose_little() -> None:
    """They are averaged with their neighbours: the interval still narrows with their number."""
    ratios = np.exp(np.random.default_rng(4).normal(0.1, 0.1, 20_000))
    low, high = bounds(ratio_change(np.ones(20_000), ratios))
    assert low < percent(math.exp(0.1)) < high
    assert high - low < 2 * 2.5 * percent(math.exp(0.1 / math.sqrt(20_000)))


def test_ratios_measured_apart() -> None:
    change = ratio_of_ratios([1.0, 1.02, 0.98, 1.01, 0.99], [1.1, 1.122, 1.078, 1.111, 1.089])
    assert change.percent == pytest.approx(10.0)
    low, high = bounds(change)
    assert 5 < low < 10 < high < 15


@pytest.mark.parametrize(("before", "after"), [([1.0, 1.1, 1.2], [1.0, 1.1, 1.2]), ([1.0], [1.0] * 20)])
def test_too_few_ratios_on_either_side_give_no_interval(before: list[float], after: list[float]) -> None:
    assert ratio_of_ratios(before, after).low is None


def test_the_spread_of_either_side_counts() -> None:
    assert bounds(ratio_of_ratios([2.0] * 4, [1.0] * 4)) == pytest.approx((-50.0, -50.0))
    spread = [0.8, 0.9, 1.0, 1.1, 1.2]
    for before, after in ((spread, [1.0] * 5), ([1.0] * 5, spread)):
        low, high = bounds(ratio_of_ratios(before, after))
        assert low < 0.0 < high


def test_processes_count_once_each() -> None:
    """Within each process nothing varies: pooled, their ratios would be sure of what only three processes say."""
    before, after = [[1.0] * 20, [1.06] * 6, [0.97] * 6], [[1.01] * 6, [1.05] * 6]
    low, high = bounds(between_processes(before, after))
    pooled_low, pooled_high = bounds(ratio_of_ratios(np.concatenate(before), np.concatenate(after)))
    assert low < -5 < 10 < high
    assert high - low > pooled_high - pooled_low
    assert between_processes(before, after) == between_processes([[1.0], [1.06], [0.97]], [[1.01], [1.05]])


def test_fewer_than_four_processes_give_no_interval() -> None:
    assert between_processes([[1.0], [1.1]], [[1.0]]).low is None
    assert between_processes([[1.0], [1.1], [1.05]], [[1.0]]).low is not None


def test_the_interval_between_processes_covers_the_truth() -> None:
    random = np.random.default_rng(12)
    held = 0
    for _ in range(600):
        sides = [np.exp(random.normal(middle, 0.01, (2, 1)) + random.normal(0, 0.02, (2, 6))) for middle in (0.0, 0.1)]
        low, high = bounds(between_processes(*map(list, sides)))
        held += low <= percent(math.exp(0.1)) <= high
    # The binomial standard error is 0.9 %.
    assert 0.93 <= held / 600 <= 0.975


@pytest.mark.parametrize(
    ("percent", "text"),
    [
        (1.44, "+1.4 %"),
        (-0.04, "0.0 %"),
        (0.0, "0.0 %"),
        (-12.35, "-12.3 %"),
        (99.94, "+99.9 %"),
        (99.95, "+100 %"),
        (612.7, "+613 %"),
        (99_999.4, "+99999 %"),
        (99_999.5, "+1.0e5 %"),
        (1.234e6, "+1.2e6 %"),
    ],
)
def test_a_change_as_text(percent: float, text: str) -> None:
    assert str(Change(percent, None, None)) == text


def test_an_interval_as_text() -> None:
    assert Change(1.0, -0.51, 612.0).interval == "-0.5..+612"
    for low, high in ((None, 2.0), (0.0, None)):
        assert Change(1.0, low, high).interval == "no interval"
        assert Change(1.0, low, high).ends == (1.0, 1.0)
    assert len(Change(1.0, -math.inf, math.inf).interval) <= 14

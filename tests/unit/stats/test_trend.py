"""The slope of a series and its steps: what is found, and how often in noise alone."""

from __future__ import annotations

import numpy as np
import pytest

from knormpress.stats.trend import FEWEST_FOR_SLOPE, FEWEST_FOR_STEPS, trend


def steps(values: list[float], least: float = 0.01) -> list[tuple[int, float]]:
    found = trend(values, least=least)
    assert found is not None
    return [(step.at, round(step.size, 6)) for step in found.steps]


def test_few_values_have_no_trend_and_some_have_no_steps() -> None:
    values = [0.0] * 4 + [5.0] * 4
    assert trend(values[: FEWEST_FOR_SLOPE - 1], least=0.01) is None
    assert steps(values[: FEWEST_FOR_STEPS - 1]) == []
    assert steps(values) == [(4, 5.0)]


def test_a_step_is_found_where_it_is_and_one_outlier_is_none() -> None:
    assert steps([1.0] * 9) == []
    assert steps([1.0] * 7 + [1.4] * 2) == [(7, 0.4)]
    assert steps([1.0] * 4 + [3.0] * 3 + [2.0] * 3) == [(4, 2.0), (7, -1.0)]
    assert steps([1.0] * 5 + [9.0] + [1.0] * 5) == []
    assert steps([1.0] * 8 + [9.0]) == [], "whether it lasts shows with the next value"


def test_what_is_smaller_than_is_of_interest_is_no_step() -> None:
    values = [1.0] * 4 + [1.001] * 4
    assert steps(values, least=0.01) == []
    assert steps(values, least=0.0001) == [(4, 0.001)]


def test_a_steady_creep_is_a_slope_and_no_step() -> None:
    found = trend([0.3 * n for n in range(12)], least=0.01)
    assert found is not None
    assert (found.slope.percent, found.slope.low, found.slope.high) == pytest.approx((0.3, 0.3, 0.3))
    assert found.steps == ()


def test_the_slope_is_robust_and_its_interval_says_what_is_not_known() -> None:
    noise = np.random.default_rng(0).normal(0.0, 1.0, 20)
    rising = trend([*(noise + 0.5 * np.arange(20))[:19], 100.0], least=0.01)
    level = trend(noise.tolist(), least=0.01)
    assert rising is not None
    assert level is not None
    assert rising.slope.low is not None
    assert 0.3 < rising.slope.low < 0.5 < rising.slope.high  # type: ignore[operator]
    assert level.slope.low is not None
    assert level.slope.low < 0 < level.slope.high  # type: ignore[operator]


@pytest.mark.parametrize("count", [8, 12, 24])
@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_noise_alone_has_a_step_in_about_one_series_of_a_hundred(count: int, tails: str) -> None:
    random = np.random.default_rng(1)
    series = random.normal(size=(300, count)) if tails == "normal" else random.standard_t(3, size=(300, count))
    assert sum(bool(steps(one.tolist())) for one in series) <= 6


def test_a_step_of_four_standard_deviations_is_found_and_dated() -> None:
    random = np.random.default_rng(2)
    found = 0
    for _ in range(100):
        values = random.normal(size=20) + np.where(np.arange(20) < 12, 0.0, 4.0)
        found += [abs(at - 12) <= 1 and size > 0 for at, size in steps(values.tolist())] == [True]
    assert found >= 90

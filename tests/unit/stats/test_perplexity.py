"""The change of perplexity and its interval, from rises of each token's loss that were drawn for it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from knormpress.stats.gates import gate
from knormpress.stats.intervals import Change, Floats
from knormpress.stats.perplexity import ppl_change, ppl_percent, too_few


def bounds(gaps: list[Floats]) -> tuple[float, float]:
    change = ppl_change(gaps)
    assert change.percent == ppl_percent(gaps)
    assert change.low is not None
    assert change.high is not None
    assert change.low <= change.percent <= change.high
    return change.low, change.high


def same(nats: float, tokens: int, documents: int = 1) -> list[Floats]:
    """Documents in which each token's loss rises by so many nats."""
    return [np.full(tokens, nats)] * documents


def test_no_difference_is_exactly_no_change() -> None:
    assert ppl_change(same(0.0, 200, 8)) == Change(0.0, 0.0, 0.0)


def test_documents_that_all_agree_give_a_narrow_interval() -> None:
    low, high = bounds(same(0.05, 256, 8))
    assert low == pytest.approx(high) == pytest.approx(100 * math.expm1(0.05))


def test_a_rise_that_no_float_holds_fails_the_gate() -> None:
    change = ppl_change(same(1_000.0, 128, 8))
    assert math.isfinite(change.percent)
    assert gate(change, 5.0) == "fail"


def test_the_spread_between_documents_counts() -> None:
    """Within each document nothing varies: a bootstrap over tokens alone would be sure to a hundredth."""
    low, high = bounds([np.full(128, nats) for nats in (0.0, 0.02, 0.08, 0.1) * 2])
    assert low < 3.0
    assert high > 7.0


def test_the_spread_within_documents_counts() -> None:
    """All documents have one mean; half of each is far above it, half far below."""
    low, high = bounds([np.repeat((0.5, -0.4), 128)] * 8)
    assert low < 0.0 < high
    assert high - low > 10.0


def test_neighbouring_tokens_are_not_taken_for_independent() -> None:
    random = np.random.default_rng(5)
    alike = np.repeat(random.normal(0.0, 0.2, 16), 64)
    low, high = bounds([alike] * 8)
    mixed_low, mixed_high = bounds([random.permutation(alike)] * 8)
    assert high - low > 3 * (mixed_high - mixed_low)


def test_longer_documents_weigh_more() -> None:
    assert ppl_percent([*same(0.1, 900), *same(0.0, 100)]) == pytest.approx(100 * math.expm1(0.09))
    # One long document against nine short ones without a change: drawn thrice in ten it holds 81 % of the tokens.
    _, high = bounds([*same(0.1, 900), *same(0.0, 90, 9)])
    assert high == pytest.approx(100 * math.expm1(0.1 * 2700 / (2700 + 7 * 90)))


@pytest.mark.parametrize("documents", [1, 7])
def test_few_documents_give_no_interval(documents: int) -> None:
    change = ppl_change(same(0.1, 200, documents))
    assert change == Change(pytest.approx(100 * math.expm1(0.1)), None, None)
    assert f"({documents} of 8)" in too_few(documents)


def test_eight_documents_do() -> None:
    assert ppl_change(same(0.1, 1, 8)).low is not None
    assert too_few(8) == ""


def test_the_interval_covers_the_truth_in_about_95_percent() -> None:
    random = np.random.default_rng(21)
    held = 0
    for _ in range(150):
        own = random.normal(0.05, 0.05, (12, 1))
        low, high = bounds(list(random.normal(own, 0.3, (12, 128))))
        held += low <= 100 * math.expm1(0.05) <= high
    assert 0.88 <= held / 150 <= 0.995

"""From damages to plans: against every plan there is, on grids small enough to try them all."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knormpress.tune.allocation import Choice, Curve, least_keep, mean_of, plan_at

RATIOS = (0.1, 0.4, 1.0)
DAMAGES = st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)).map(lambda two: (max(two), min(two), 0.0))
CURVES = st.lists(DAMAGES.map(lambda damage: Curve(RATIOS, damage)), min_size=1, max_size=2)
LAYERS = st.lists(CURVES, min_size=1, max_size=3)


def damage_of(layers: list[list[Curve]], plan: tuple[Choice, ...]) -> float:
    total = 0.0
    for curves, choice in zip(layers, plan, strict=True):
        ratios, damage = curves[choice.curve].sampled()
        (place,) = [i for i, known in enumerate(ratios) if known == choice.ratio]
        total += damage[place]
    return total


@given(LAYERS, st.floats(0.1, 1.0))
def test_no_plan_that_keeps_as_little_does_less(layers, mean_keep):
    plan = plan_at(layers, mean_keep)
    assert mean_of(plan) <= mean_keep + 1e-9
    found, kept = damage_of(layers, plan), mean_of(plan)
    choices = [[Choice(curve, ratio) for curve in range(len(curves)) for ratio in RATIOS] for curves in layers]
    for other in itertools.product(*choices):
        if mean_of(other) <= kept:
            assert damage_of(layers, other) >= found - 1e-9


def test_the_layer_that_does_no_harm_is_cut_first():
    plan = plan_at([[Curve(RATIOS, (1.0, 0.6, 0.0))], [Curve(RATIOS, (0.0, 0.0, 0.0))]], 0.56)
    assert [choice.ratio for choice in plan] == [1.0, 0.1]


def test_a_layer_gets_the_score_that_does_less_harm_at_its_ratio():
    """One is better far down, the other further up."""
    layer = [Curve(RATIOS, (0.5, 0.4, 0.0)), Curve(RATIOS, (0.9, 0.1, 0.0))]
    assert plan_at([layer], 0.1) == (Choice(0, 0.1),)
    assert plan_at([layer], 0.4) == (Choice(1, 0.4),)


def test_what_rises_with_less_kept_only_by_noise_is_not_believed():
    ratios, damage = Curve(RATIOS, (0.1, 0.3, 0.0)).sampled()
    assert damage[0] == pytest.approx(0.3)
    assert all(before >= after for before, after in itertools.pairwise(damage))
    assert (ratios[0], ratios[-1]) == (0.1, 1.0)


def test_where_even_the_lowest_ratios_keep_more_those_are_given():
    assert plan_at([[Curve((0.5, 1.0), (1.0, 0.0))]], 0.2) == (Choice(0, 0.5),)


def test_halving_finds_the_limit():
    curves = [[Curve(RATIOS, (1.0 - i / 9, 0.3, 0.0))] for i in range(9)]
    tried = []

    def is_good(plan: tuple[Choice, ...]) -> bool:
        tried.append(plan)
        return mean_of(plan) >= 0.43

    plan = least_keep(curves, is_good, low=0.1, high=0.9)
    assert plan is not None
    assert 0.43 <= mean_of(plan) <= 0.43 + 0.06
    assert len(tried) <= 8


def test_nothing_good_gives_nothing():
    assert least_keep([[Curve(RATIOS, (1.0, 0.3, 0.0))]], lambda _: False, low=0.1, high=0.9) is None

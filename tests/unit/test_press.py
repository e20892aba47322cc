"""The policy: what it accepts, refuses, and computes."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knormpress import KnormError, KnormPress
from knormpress.press import share


@pytest.mark.parametrize("ratio", [0, 0.0, -0.1, 1.1, math.nan, math.inf, "abc", None, True, []])
def test_refuses_a_keep_ratio_outside_its_range(ratio):
    with pytest.raises(KnormError, match=r"keep_ratio is .*wanted a number above 0 and at most 1"):
        KnormPress(keep_ratio=ratio)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prune_after", 0),
        ("prune_after", 1.5),
        ("keep_recent", -1),
        ("prune_interval", 0),
        ("skip_layers", "0"),
        ("skip_layers", (0.5,)),
        ("skip_layers", 0),
        ("layer_keep_ratios", (0.5, 1.2)),
        ("schedule", "sometimes"),
    ],
)
def test_refuses_other_values_in_one_line(field, value):
    with pytest.raises(KnormError, match=f"{field} is") as refusal:
        KnormPress(**{field: value})
    assert "\n" not in str(refusal.value)


def test_is_a_value():
    assert KnormPress(0.5, skip_layers=[0, -1]) == KnormPress(0.5, skip_layers=(0, -1))
    assert len({KnormPress(0.5), KnormPress(0.5), KnormPress(0.6)}) == 2
    with pytest.raises(AttributeError):
        KnormPress().keep_ratio = 0.5
    assert KnormPress(**KnormPress(0.3, layer_keep_ratios=(0.2, 0.4)).as_dict()) == KnormPress(
        0.3, layer_keep_ratios=(0.2, 0.4)
    )


def test_ratios_of_skipped_and_planned_layers():
    assert KnormPress(0.5, skip_layers=(0, -1)).ratios(4) == (1.0, 0.5, 0.5, 1.0)
    assert KnormPress(0.5, layer_keep_ratios=(0.1, 0.2)).ratios(2) == (0.1, 0.2)


@pytest.mark.parametrize("layer", [4, -5])
def test_a_skipped_layer_must_exist(layer):
    with pytest.raises(KnormError, match=rf"skip_layers names layer {layer}, but the model has 4 layers; use -4 to 3"):
        KnormPress(skip_layers=(layer,)).ratios(4)


def test_a_plan_must_fit_the_model():
    with pytest.raises(KnormError, match="2 entries, but the model has 3 layers"):
        KnormPress(layer_keep_ratios=(0.1, 0.2)).ratios(3)


@given(st.integers(1, 100), st.integers(0, 200_000))
def test_share_is_exact_for_typed_decimals(percent, count):
    assert share(percent / 100, count) == math.ceil(Fraction(percent, 100) * count)


def test_share_differs_from_binary_rounding():
    assert math.ceil(0.07 * 100) == 8
    assert share(0.07, 100) == 7

"""The policy: what it accepts, refuses and computes, and what makes two policies equal."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knormpress import KnormError, KnormPress
from knormpress.policy.policy import Policy, share


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("keep_ratio", ratio) for ratio in (0, 0.0, -0.1, 1.1, math.nan, math.inf, "abc", None, True, [])),
        ("layer_keep_ratios", (0.5, 1.2)),
        ("prune_after", 0),
        ("prune_after", 1.5),
        ("prune_after", True),
        ("keep_recent", -1),
        ("prune_interval", 0),
        ("skip_layers", "0"),
        ("skip_layers", (0.5,)),
        ("skip_layers", 0),
        ("layer_scores", "knorm"),
        ("schedule", "sometimes"),
    ],
)
def test_refuses_what_is_out_of_range_in_one_line(field, value):
    with pytest.raises(KnormError, match=rf"^{field} is .*; wanted .*") as refusal:
        Policy(**{field: value})
    refused = value[-1] if isinstance(value, tuple) else value
    assert repr(refused) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_limits_are_accepted():
    limits = {"keep_ratio": 1, "prune_after": 1, "keep_recent": 0, "prune_interval": 1, "skip_layers": []}
    assert Policy(**limits).as_dict() == Policy(1.0, 1, (), None, 0, 1, "proportional").as_dict()


@pytest.mark.parametrize("kind", [Policy, KnormPress])
@pytest.mark.parametrize("other", [Policy, KnormPress])
def test_is_a_value_whichever_class_it_has(kind, other):
    """A press and a policy with equal fields are equal: records and caches compare one with the other."""
    one, same = kind(0.5, skip_layers=[0, -1]), other(0.5, skip_layers=(0, -1))
    assert one == same
    assert hash(one) == hash(same)
    assert len({one, same, kind(0.5), other(0.6)}) == 3
    planned = kind(0.3, layer_keep_ratios=(0.2, 0.4))
    assert other(**planned.as_dict()) == planned != other(0.3, layer_keep_ratios=(0.2, 0.5))
    assert one != (0.5, 512, (0, -1), None, 0, 64, "proportional")
    with pytest.raises(AttributeError):
        one.keep_ratio = 0.5


def test_ratios_of_skipped_and_planned_layers():
    assert Policy(0.5, skip_layers=(0, -1)).ratios(4) == (1.0, 0.5, 0.5, 1.0)
    assert Policy(0.5, skip_layers=(3, -4)).ratios(4) == (1.0, 0.5, 0.5, 1.0)
    assert Policy(0.5, layer_keep_ratios=(0.1, 0.2)).ratios(2) == (0.1, 0.2)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"skip_layers": (4,)}, "layer 4, .* 4 layers; .*-4 to 3"),
        ({"skip_layers": (-5,)}, "layer -5, .* 4 layers; .*-4 to 3"),
        ({"layer_keep_ratios": (0.1, 0.2)}, "2 entries, .* 4 layers"),
        ({"layer_scores": ("knorm",)}, "1 entries, .* 4 layers"),
    ],
)
def test_a_policy_must_fit_the_model(values, told):
    with pytest.raises(KnormError, match=told):
        Policy(**values).scores(4), Policy(**values).ratios(4)


def test_scores_are_names_and_key_norms_where_none_are_given():
    assert Policy().scores(2) == ("knorm", "knorm")
    assert Policy(layer_scores=["keydiff", "knorm"]).scores(2) == ("keydiff", "knorm")
    assert Policy(layer_scores=("keydiff",)) != Policy() == Policy(layer_scores=None)
    for names in (("",), (1,), (None,)):
        with pytest.raises(KnormError, match=r"layer_scores has .*; wanted names"):
            Policy(layer_scores=names)


@pytest.mark.parametrize(
    ("values", "drops", "mean"),
    [
        ({"keep_ratio": 1.0}, False, 1.0),
        ({"keep_ratio": 0.9}, True, 0.9),
        ({"keep_ratio": 1.0, "layer_keep_ratios": (1.0, 0.5)}, True, 0.75),
        ({"keep_ratio": 0.5, "layer_keep_ratios": (1.0, 1.0)}, False, 1.0),
    ],
)
def test_a_plan_decides_what_is_kept(values, drops, mean):
    assert (Policy(**values).drops, Policy(**values).mean_keep) == (drops, mean)


@given(st.integers(1, 100), st.integers(0, 200_000))
def test_share_is_exact_for_typed_decimals(percent, count):
    assert share(percent / 100, count) == math.ceil(Fraction(percent, 100) * count)


def test_share_differs_from_binary_rounding():
    assert math.ceil(0.07 * 100) == 8
    assert share(0.07, 100) == 7

"""The controls of a retrieval gate keep as many tokens as the method that they stand beside."""

from __future__ import annotations

from dataclasses import replace

import pytest

from knormpress import KnormPress
from knormpress.methods.method import policy_of
from knormpress.policy.policy import Policy
from knormpress.pytest_plugin.measured import CONTROLS, retrieval_controls

PLAN = KnormPress(
    layer_keep_ratios=(0.2, 0.9, 0.7), layer_scores=("knorm", "keydiff", "knorm"), keep_recent=8, prune_after=64
)
EVEN = KnormPress(0.5, skip_layers=(1,), prune_after=64)


def of_controls(policy: Policy) -> list[Policy]:
    controls = retrieval_controls(policy)
    assert tuple(controls) == CONTROLS
    return [found for control in controls.values() if (found := policy_of(control))]


def test_under_a_plan_they_keep_its_mean_in_every_layer() -> None:
    random, recent = of_controls(PLAN)
    assert random == recent
    assert random.ratios(3) == pytest.approx([0.6] * 3)
    assert random == replace(random, prune_after=64, keep_recent=8, layer_scores=None)


def test_under_any_other_policy_they_follow_it() -> None:
    random, recent = of_controls(EVEN)
    assert random == recent == EVEN


def test_where_nothing_is_dropped_there_is_none() -> None:
    assert retrieval_controls(KnormPress(1.0)) == {}
    assert retrieval_controls(KnormPress(layer_keep_ratios=(1.0, 1.0))) == {}

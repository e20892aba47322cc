"""The quality gate: perplexity through the pruned cache within the tolerance of the full cache's, and its controls."""

from __future__ import annotations

import pytest

from knormpress import KnormPress
from knormpress.methods import make_method

GATED = {"keep 0.9": KnormPress(0.9), "keep 0.8": KnormPress(0.8)}
WHOLE = {"keep 1.0": KnormPress(1.0)}
WORSE = {"keep 0.05": KnormPress(0.05), "highest norm first": make_method("highest-norm", KnormPress(0.8))}


@pytest.fixture(scope="module")
def changes(knorm_ppl_change):
    """Perplexity changes of all the methods, which share one prefill a document."""
    methods = GATED | WHOLE | WORSE
    return dict(zip(methods, knorm_ppl_change(list(methods.values())), strict=True))


def passes(change, tolerance):
    return abs(change.percent) <= tolerance


@pytest.mark.parametrize("name", GATED)
def test_stays_within_the_tolerance(changes, knorm_ppl_tolerance, name):
    assert passes(changes[name], knorm_ppl_tolerance), f"{name}: perplexity {changes[name]} ({changes[name].interval})"


def test_keeping_everything_changes_nothing(changes):
    assert changes["keep 1.0"].percent == 0.0


@pytest.mark.parametrize("name", WORSE)
def test_control_the_gate_fails_what_is_known_to_be_worse(changes, knorm_ppl_tolerance, name):
    assert not passes(changes[name], knorm_ppl_tolerance), f"the gate is broken: {name} gives {changes[name]}"

"""The quality gate: perplexity through the pruned cache within the tolerance of the full cache's, and its controls.

A verdict needs the whole 95 % interval: where it crosses the limit the text at hand can't tell, and the item is
reported as an expected failure with that reason, never as passed.
"""

from __future__ import annotations

import pytest

from knormpress import KnormPress
from knormpress.changes import gate
from knormpress.methods import make_method

GATED = {"keep 0.9": KnormPress(0.9), "keep 0.8": KnormPress(0.8)}
WHOLE = {"keep 1.0": KnormPress(1.0)}
WORSE = {"keep 0.05": KnormPress(0.05), "highest norm first": make_method("highest-norm", KnormPress(0.8))}


@pytest.fixture(scope="module")
def changes(knorm_ppl_change):
    """Perplexity changes of all the methods, which share one prefill a document."""
    methods = GATED | WHOLE | WORSE
    found = dict(zip(methods, knorm_ppl_change(list(methods.values())), strict=True))
    print("\n" + "\n".join(f"{name}: perplexity {change} ({change.interval})" for name, change in found.items()))
    return found


@pytest.mark.parametrize("name", GATED)
def test_stays_within_the_tolerance(changes, knorm_ppl_tolerance, name):
    verdict = gate(changes[name], knorm_ppl_tolerance)
    measured = f"{name}: perplexity {changes[name]} ({changes[name].interval}), tolerance {knorm_ppl_tolerance} %"
    if verdict == "inconclusive":
        pytest.xfail(f"inconclusive, score more documents with --knorm-samples: {measured}")
    assert verdict == "pass", measured


def test_keeping_everything_changes_nothing(changes):
    assert (changes["keep 1.0"].low, changes["keep 1.0"].high) == (0.0, 0.0)


@pytest.mark.parametrize("name", WORSE)
def test_control_the_gate_fails_what_is_known_to_be_worse(changes, knorm_ppl_tolerance, name):
    assert gate(changes[name], knorm_ppl_tolerance) == "fail", f"the gate is broken: {name} gives {changes[name]}"

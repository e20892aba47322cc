"""The quality gate: perplexity through the pruned cache within the tolerance of the full cache's, and its controls."""

from __future__ import annotations

import pytest

from knormpress import KnormPress
from knormpress.methods.registry import make_method
from knormpress.records.figures import ROUNDING_KL
from knormpress.stats.gates import gate

GATED = {"keep 0.9": KnormPress(0.9), "keep 0.8": KnormPress(0.8)}
WHOLE = {"keep 1.0": KnormPress(1.0)}
WORSE = {"keep 0.05": KnormPress(0.05), "highest norm first": make_method("highest-norm", KnormPress(0.8))}


@pytest.fixture(scope="module")
def found(knorm_quality):
    """All the methods scored; they share each document's prefill."""
    methods = GATED | WHOLE | WORSE
    found = dict(zip(methods, knorm_quality(list(methods.values())), strict=True))
    for name, result in found.items():
        print(f"\n{name}: perplexity {result.quality.ppl} ({result.quality.ppl.interval}), KL {result.quality.kl:.4f}")
    return found


@pytest.mark.parametrize("name", GATED)
def test_stays_within_the_tolerance(found, knorm_gate, name):
    knorm_gate(found[name])


def test_keeping_everything_changes_nothing(found, knorm_gate):
    knorm_gate(found["keep 1.0"])
    assert found["keep 1.0"].quality.kl < ROUNDING_KL
    assert max(map(abs, found["keep 1.0"].quality.ppl.ends)) < 0.001


@pytest.mark.parametrize("name", WORSE)
def test_control_the_gate_fails_what_is_known_to_be_worse(found, knorm_ppl_tolerance, name):
    change = found[name].quality.ppl
    assert gate(change, knorm_ppl_tolerance) == "fail", f"the gate is broken: {name} gives {change}"

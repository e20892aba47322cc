"""The passkey gate: what perplexity hides. A number in filler text is asked for behind the pruned cache."""

from __future__ import annotations

import pytest

from knormpress import KnormPress
from knormpress.methods.registry import make_method
from knormpress.stats.gates import passkey_gate

GATED = {"keep 0.9": KnormPress(0.9)}
WORSE = {"keep 0.05": KnormPress(0.05), "highest norm first": make_method("highest-norm", KnormPress(0.8))}

# Each of the four lengths nine times. A gate of 0.9 needs 35 that are all found.
COUNT = 36


@pytest.fixture(scope="module")
def found(knorm_passkeys):
    """All the methods asked, sharing one prefill a prompt."""
    methods = GATED | WORSE
    return dict(zip(methods, knorm_passkeys(list(methods.values()), count=COUNT), strict=True))


@pytest.mark.parametrize("name", GATED)
def test_finds_the_passkeys(found, knorm_passkey_gate, name):
    knorm_passkey_gate(found[name])


@pytest.mark.parametrize("name", WORSE)
def test_control_the_gate_fails_what_is_known_to_be_worse(found, name):
    verdict, measured = passkey_gate(*found[name], 0.9)
    assert verdict == "fail", f"the gate is broken: {name} gives {measured}"

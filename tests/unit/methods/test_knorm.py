"""The press of this package, made from a policy."""

from __future__ import annotations

import pytest

from knormpress import KnormPress
from knormpress.policy.policy import Policy


@pytest.mark.parametrize("policy", [Policy(), Policy(0.3, 7, (1,), (0.2, 0.4), 5, 9, "iterative"), KnormPress(0.4)])
def test_the_press_of_a_policy_is_that_policy(policy):
    press = KnormPress.of(policy)
    assert type(press) is KnormPress
    assert press == policy
    assert press.as_dict() == policy.as_dict()

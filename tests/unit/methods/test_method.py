"""The text that records tell methods apart by: alike for equal methods, in every process and every version."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest

from knormpress import KnormPress
from knormpress.methods.full import FullCache
from knormpress.methods.method import describe_method
from knormpress.methods.registry import make_method
from knormpress.policy.policy import Policy

PRESS = KnormPress(0.5, skip_layers=())
FIELDS = (
    "keep_ratio=0.5, prune_after=512, skip_layers=(), layer_keep_ratios=None, keep_recent=0, prune_interval=64, "
    "schedule='proportional'"
)


def own_score(tokens):
    return tokens.positions.float()


class OwnMethod:
    def __call__(self, model):
        raise NotImplementedError


@dataclass
class Holder:
    inner: object


@pytest.mark.parametrize(
    ("method", "described"),
    [
        (FullCache(), "FullCache()"),
        (PRESS, f"KnormPress({FIELDS})"),
        (Policy(0.5, skip_layers=()), f"Policy({FIELDS})"),
        (own_score, f"{__name__}.own_score"),
        (OwnMethod(), f"{__name__}.OwnMethod"),
        (functools.partial(own_score, 3, layer="a"), f"{__name__}.own_score(3, layer='a')"),
        (Holder((1, None)), "Holder(inner=(1, None))"),
    ],
)
def test_values_are_told_by_name_and_fields(method, described):
    assert describe_method(method) == described


def test_functions_of_this_package_are_told_by_their_folder():
    """Moving one to another module of its folder must not break off the history of what was measured with it."""
    assert describe_method(make_method("random", PRESS)) == (
        f"ScoredPress(press=KnormPress({FIELDS}), score=knormpress.methods.random_order)"
    )
    assert describe_method(make_method("knorm", PRESS)) == describe_method(KnormPress.of(PRESS))

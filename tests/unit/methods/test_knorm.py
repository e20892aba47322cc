"""The press of this package, made from a policy, and the plans that come with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from knormpress import KnormCache, KnormError, KnormPress
from knormpress.cache.fingerprint import model_fingerprint
from knormpress.cache.scores.named import SCORES
from knormpress.policy import plan as plan_file
from knormpress.policy.policy import Policy
from knormpress.records.plan import read_plan, write_plan
from tests.plan_factory import make_plan
from tests.strategies import tiny_model, tokens

SHIPPED = sorted((Path(plan_file.__file__).parents[1] / "plans").glob("*.json"))


@pytest.mark.parametrize("policy", [Policy(), Policy(0.3, 7, (1,), (0.2, 0.4), 5, 9, "iterative"), KnormPress(0.4)])
def test_the_press_of_a_policy_is_that_policy(policy):
    press = KnormPress.of(policy)
    assert type(press) is KnormPress
    assert press == policy
    assert press.as_dict() == policy.as_dict()


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Writes a plan as one that comes with the package."""
    monkeypatch.setattr(plan_file, "_SHIPPED", tmp_path)

    def write(name: str, model: Any, press: KnormPress) -> KnormPress:
        planned = {"name": "tiny", "dtype": str(model.dtype), "fingerprint": model_fingerprint(model)}
        write_plan(make_plan(press=press, model=planned, frontier=()), tmp_path / f"{name}.json")
        return press

    return write


def test_the_smallest_plan_for_the_model_is_found(shipped):
    model, other = tiny_model(), tiny_model(seed=1)
    norms = KnormPress(layer_keep_ratios=(0.5, 0.4, 0.6), prune_after=8)
    shipped("a", model, norms)
    best = shipped("b", model, replace(norms, layer_keep_ratios=(0.5, 0.3, 0.2), layer_scores=("keydiff",) * 3))
    shipped("c", other, replace(norms, layer_keep_ratios=(0.1,) * 3))
    assert KnormPress.for_model(model) == best
    assert KnormPress.for_model(model, scores=("knorm",)) == norms
    assert KnormPress.for_model(model, scores=("knorm", "keydiff")) == best
    cache = KnormCache(model, KnormPress.for_model(model))
    with torch.inference_mode():
        model(tokens(20), past_key_values=cache)
    assert [layer.stored for layer in cache.stats()] == [10, 6, 4]


def test_a_model_without_a_plan_is_told_what_to_do(shipped):
    shipped("a", tiny_model(), KnormPress(layer_keep_ratios=(0.5, 0.4, 0.6), layer_scores=("keydiff",) * 3))
    for model, scores in (
        (tiny_model(dtype=torch.bfloat16), None),
        (tiny_model("gpt2"), None),
        (tiny_model(), ["knorm"]),
    ):
        with pytest.raises(KnormError, match=r"no plan.*knormpress tune") as refused:
            KnormPress.for_model(model, scores=scores)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_plans_that_come_with_the_package_are_whole(path):
    """Measured behind their search, within their target of perplexity, and of scores that every installation has."""
    plan = read_plan(path)
    (own,) = (point for point in plan.frontier if plan.is_own(point))
    assert plan.mean_keep < 0.5
    assert own.ends is not None
    assert own.ppl[0] <= plan.targets.ppl
    assert set(plan.press.layer_scores or ()) <= set(SCORES)


def test_there_is_a_plan_of_key_norms_alone_and_a_smaller_one():
    norms, best = (
        min(
            (plan for plan in map(read_plan, SHIPPED) if bool(plan.press.layer_scores) is scored),
            key=lambda p: p.mean_keep,
        )
        for scored in (False, True)
    )
    assert best.mean_keep < norms.mean_keep


def test_the_name_of_a_model_is_no_model() -> None:
    with pytest.raises(KnormError, match=r"got 'gpt2'; wanted a loaded model") as refused, KnormPress(0.5)("gpt2"):
        pass
    assert "\n" not in str(refused.value)


def test_a_cache_with_its_arguments_swapped_is_told_the_order() -> None:
    with pytest.raises(KnormError, match=r"KnormPress as the model.*LlamaForCausalLM as the press") as refused:
        KnormCache(KnormPress(0.5), tiny_model())
    assert "\n" not in str(refused.value)

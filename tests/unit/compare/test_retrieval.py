"""The retrieval gate: which tasks decide, and that what is known to be worse fails."""

from __future__ import annotations

import pytest

from knormpress.compare.retrieval import LEAST_ITEMS, judge_retrieval
from knormpress.records.retrieval import Retrieval
from tests.record_factory import make_retrieval

BAD = {"random": make_retrieval(0.1, texts=12, seed=1), "recent-window": make_retrieval(0.5, texts=12, seed=2)}


def found(share: float) -> Retrieval:
    return make_retrieval(share, texts=12)


@pytest.mark.parametrize(("share", "decision"), [(1.0, "pass"), (0.9, "inconclusive"), (0.5, "fail")])
def test_the_whole_interval_decides(share: float, decision: str) -> None:
    outcome = judge_retrieval(found(share), BAD, 0.9)
    assert outcome.decision == decision
    assert outcome.gating == ("multikey-prose", "list")
    assert not outcome.left_out
    assert f"found {found(share).share} items" in outcome.text
    assert "controls: random" in outcome.text


def test_a_task_that_a_control_passes_decides_nothing() -> None:
    """A method that finds everything does not pass where a random choice of tokens does as well."""
    for name in BAD:
        outcome = judge_retrieval(found(1.0), BAD | {name: found(1.0)}, 0.9)
        assert outcome.decision == "inconclusive"
        assert not outcome.gating
        assert all(name in reason for reason in outcome.left_out.values())
        assert "no task gates" in outcome.text


def test_a_task_that_the_full_cache_hardly_solves_is_named_and_left_out() -> None:
    whole = found(1.0)
    few = tuple(
        item for item in whole.items if item.task == "list" or (item.text == 0 and item.name < f"key {LEAST_ITEMS - 1}")
    )
    part = Retrieval(asked=whole.asked, items=few)
    outcome = judge_retrieval(part, BAD, 0.9)
    assert outcome.gating == ("list",)
    assert "solves 4 of 50" in outcome.left_out["multikey-prose"]
    assert outcome.decision == "pass"


def test_one_lost_task_fails_though_all_together_might_pass() -> None:
    both = found(1.0)
    lost = tuple(
        item.model_copy(update={"candidate": item.candidate.model_copy(update={"found": item.name > "key 1"})})
        if item.task == "list"
        else item
        for item in both.items
    )
    outcome = judge_retrieval(Retrieval(asked=both.asked, items=lost), BAD, 0.75)
    assert outcome.decision == "fail"
    assert "list 24 of 48" in outcome.text
    assert "fails by itself" in outcome.text


def test_without_controls_every_solved_task_decides() -> None:
    assert judge_retrieval(found(1.0), {}, 0.9).decision == "pass"

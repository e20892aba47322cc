"""Tasks of lm-evaluation-harness: the gate, the change, and the verdict on two runs."""

from __future__ import annotations

import pytest

from knormpress import KnormError
from knormpress.compare.lm_eval import judge_tasks
from knormpress.compare.verdicts import THRESHOLDS, Finding, judge
from knormpress.records.lm_eval import HarnessTasks
from tests.entry_factory import make_entry, make_tasks


def both(first: HarnessTasks, second: HarnessTasks) -> HarnessTasks:
    return first.model_copy(update={"metrics": (*first.metrics, *second.metrics)})


@pytest.mark.parametrize(("right", "decision"), [(40, "pass"), (37, "inconclusive"), (20, "fail")])
def test_the_whole_interval_decides(right: int, decision: str) -> None:
    decided, text = judge_tasks(make_tasks(right), 0.9)
    assert decided == decision
    assert f"choice: {right} of 40 documents are still right" in text


def test_only_what_the_full_cache_has_right_can_be_lost() -> None:
    """What the candidate has right beside it makes up for nothing."""
    tasks = make_tasks(40, full=20)
    assert judge_tasks(tasks, 0.8)[0] == "pass"
    assert str(tasks.kept["choice"]) == "20 of 20"


def test_every_task_must_pass() -> None:
    good, bad = make_tasks(40), make_tasks(20, task="other")
    few = make_tasks(4, of=4, task="few")
    assert judge_tasks(both(good, bad), 0.9)[0] == "fail"
    assert judge_tasks(both(both(good, few), bad), 0.9)[0] == "fail"
    decision, text = judge_tasks(both(good, few), 0.9)
    assert decision == "inconclusive"
    assert "few: 4 of 4 documents are still right that are right with the full cache, fewer than 5" in text


def test_a_task_without_right_and_wrong_is_refused() -> None:
    tasks = make_tasks(40)
    figures = tasks.model_copy(update={"metrics": tasks.metrics[:1]})
    with pytest.raises(KnormError, match="choice has no metric that is a share"):
        judge_tasks(figures, 0.9)


def test_changes_are_in_points_and_paired() -> None:
    tasks = make_tasks(30)
    acc, perplexity = tasks.metrics[1].change, tasks.metrics[0].change
    assert acc == tasks.change
    assert acc.percent == -25.0
    assert acc.high is not None
    assert acc.high < 0
    assert (perplexity.low, perplexity.high) == (None, None)
    assert make_tasks(40).change_since(tasks).percent == 25.0


def finding(before: HarnessTasks, now: HarnessTasks) -> Finding:
    sides = [
        make_entry(run=str(n), parts=()).model_copy(update={"lm_eval": side}) for n, side in enumerate((before, now))
    ]
    (found,) = judge(sides[:1], sides[1:], THRESHOLDS, "").findings
    return found


def test_two_runs_are_compared_document_by_document() -> None:
    assert finding(make_tasks(30), make_tasks(30)).word == "ok"
    lost = finding(make_tasks(40), make_tasks(30))
    assert (lost.metric, lost.word, lost.figures) == ("tasks", "regressed", ("40 of 40", "30 of 40"))
    assert finding(make_tasks(30), make_tasks(40)).word == "improved"
    assert finding(make_tasks(40), make_tasks(39)).word == "noise"


@pytest.mark.parametrize("change", [{"version": "0.4.14"}, {"metrics": make_tasks(20, of=20).metrics}])
def test_other_documents_or_another_version_are_not_compared(change: dict[str, object]) -> None:
    found = finding(make_tasks(30), make_tasks(30).model_copy(update=change))
    assert (found.word, found.change) == ("incomparable", None)

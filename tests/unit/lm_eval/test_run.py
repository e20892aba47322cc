"""Tasks through the full cache and through a method's: the figures, and what can't be run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM

from knormpress import KnormError, KnormPress
from knormpress.compare.lm_eval import judge_tasks
from knormpress.lm_eval.model import KnormLM
from knormpress.lm_eval.run import compare_tasks, find_tasks
from tests.lm_eval_tasks import let_answers_be, write_tasks


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory, loaded: dict[str, Any]) -> Path:
    """Tasks of which the full cache has every choice right."""
    folder = write_tasks(tmp_path_factory.mktemp("known"))
    let_answers_be(folder, HFLM(**loaded))
    return folder


def test_both_sides_have_the_figures_of_a_run_of_their_own(loaded: dict[str, Any], known: Path) -> None:
    names, manager = ["choice", "cloze"], find_tasks(["choice", "cloze"], known)
    model = KnormLM(**loaded, method=KnormPress(0.05, 16))
    tasks, text = compare_tasks(model, manager, names)
    sides = {
        side: simple_evaluate(model=lm, tasks=names, task_manager=find_tasks(names, known), bootstrap_iters=0)
        for side, lm in (("full", HFLM(**loaded)), ("candidate", KnormLM(**loaded, method=KnormPress(0.05, 16))))
    }
    found = {(metric.task, metric.metric): metric for metric in tasks.metrics}
    assert found.keys() == {("choice", "acc,none"), ("cloze", "acc,none"), ("cloze", "perplexity,none")}
    for (task, name), metric in found.items():
        for side, results in sides.items():
            assert getattr(metric, side) == pytest.approx(results["results"][task][name], rel=1e-4)
            rights = [metric.right] if name.startswith("acc") else []
            for right in rights:
                own = [sample["acc"] for sample in results["samples"][task]]
                assert [pair[side == "candidate"] for pair in right] == own
    assert found["choice", "acc,none"].full == 1.0 > found["choice", "acc,none"].candidate
    assert found["choice", "acc,none"].higher_is_better
    assert found["cloze", "perplexity,none"].right == ()
    assert (text.name, model.method) == ("choice, cloze", KnormPress(0.05, 16))
    # The contexts of the choices and of the cloze are the same: four questions on each of two texts.
    assert (tasks.contexts, tasks.pruned) == (8, 8)


def test_a_group_has_the_metrics_of_its_tasks_and_none_of_its_own(
    loaded: dict[str, Any], known: Path, tmp_path: Path
) -> None:
    """Its figures are no share of documents, so that a gate could not decide by them."""
    for name in ("choice", "cloze"):
        (tmp_path / f"{name}.yaml").write_bytes((known / f"{name}.yaml").read_bytes())
    group = {"group": "both", "task": ["choice", "cloze"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "both.yaml").write_text(json.dumps(group), encoding="utf-8")
    model = KnormLM(**loaded, method=KnormPress(0.05, 16))
    tasks, text = compare_tasks(model, find_tasks(["both"], tmp_path), ["both"])
    assert {metric.task for metric in tasks.metrics} == {"choice", "cloze"} == tasks.kept.keys()
    assert "choice: " in judge_tasks(tasks, 0.9)[1]
    assert text.name == "choice, cloze"


def test_where_less_is_better_1_is_not_right(loaded: dict[str, Any], known: Path, tmp_path: Path) -> None:
    wrong = {"metric": "acc", "aggregation": "mean", "higher_is_better": False}
    for metrics in ([wrong], [wrong, {"metric": "acc_norm"}]):
        task = json.loads((known / "choice.yaml").read_text(encoding="utf-8")) | {"metric_list": metrics}
        (tmp_path / "choice.yaml").write_text(json.dumps(task), encoding="utf-8")
        model = KnormLM(**loaded, method=KnormPress(0.05, 16))
        tasks, _ = compare_tasks(model, find_tasks(["choice"], tmp_path), ["choice"])
        assert [metric.metric for metric in tasks.metrics if metric.right] == ["acc_norm,none"][: len(metrics) - 1]
        assert len(tasks.right) == len(metrics) - 1


def test_other_documents_or_another_split_are_another_text(loaded: dict[str, Any], known: Path) -> None:
    def text(**options: Any) -> str:
        split = options.pop("split", None)
        model = KnormLM(**loaded, keep_ratio=0.5, prune_after=16, split=split)
        return compare_tasks(model, find_tasks(["choice"], known), ["choice"], **options)[1].sha256

    assert len({text(limit=1), text(limit=2), text(limit=1, split="What")}) == 3


class TestFindTasks:
    def test_a_file_needs_no_folder(self, known: Path) -> None:
        name = str(known / "choice.yaml")
        assert list(find_tasks([name]).load([name])["tasks"]) == ["choice"]

    @pytest.mark.parametrize(
        ("names", "folder", "message"),
        [
            ([], None, "no task is named"),
            (["choice"], Path("nowhere"), "no folder nowhere"),
            (["nowhere.yaml"], None, "no file nowhere.yaml"),
        ],
    )
    def test_what_there_is_not(self, names: list[str], folder: Path | None, message: str, known: Path) -> None:
        with pytest.raises(KnormError, match=message) as caught:
            find_tasks(names, folder or (known if names else None))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"dataset_kwargs": {"data_files": "nowhere.jsonl"}}, {"doc_to_text": "{{text"}, {"output_type": "nonsense"}],
    ids=["data", "template", "type"],
)
def test_a_task_that_cannot_be_run_is_one_line(
    loaded: dict[str, Any], known: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    task = json.loads((known / "choice.yaml").read_text(encoding="utf-8")) | change
    (tmp_path / "choice.yaml").write_text(json.dumps(task), encoding="utf-8")
    model = KnormLM(**loaded, keep_ratio=0.5, prune_after=16)
    with pytest.raises(KnormError, match="lm-evaluation-harness can't run choice: ") as caught:
        compare_tasks(model, find_tasks(["choice"], tmp_path), ["choice"])
    assert "\n" not in str(caught.value)

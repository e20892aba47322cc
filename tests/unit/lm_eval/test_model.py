"""The model that lm-evaluation-harness takes: its figures at keep 1.0 are the harness's own, and others below it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from knormpress import KnormError, KnormPress
from knormpress.lm_eval.model import KnormLM
from knormpress.methods.full import FullCache
from tests.lm_eval_tasks import QUESTION, TASKS

SCORED = ("cloze", "choice", "rolling")
GENERATED = ("generation", "shots")


def run(model: Any, folder: Path, *tasks: str) -> Any:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0)


def answers(results: Any) -> dict[str, list[Any]]:
    """What the model answered, request by request."""
    return {task: [sample["resps"] for sample in samples] for task, samples in results["samples"].items()}


def knorm(loaded: dict[str, Any], keep: float, **options: Any) -> KnormLM:
    given: dict[str, Any] = {"keep_ratio": keep, "prune_after": 16, "split": QUESTION} | options
    return KnormLM(**loaded, **given)


@pytest.fixture(scope="module")
def own(loaded: dict[str, Any], task_folder: Path) -> Any:
    """The results of the harness's own model."""
    return run(HFLM(**loaded), task_folder, *TASKS)


def numbers(answered: Any) -> list[float]:
    if isinstance(answered, list | tuple):
        return [number for part in answered for number in numbers(part)]
    return [float(answered)]


@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"prefill_chunk": 100}, {"method": FullCache()}])
def test_keep_1_gives_the_figures_of_the_harness(
    loaded: dict[str, Any], task_folder: Path, own: Any, options: dict[str, Any]
) -> None:
    results = run(knorm(loaded, 1.0, **options), task_folder, *TASKS)
    for task, figures in own["results"].items():
        for metric, figure in figures.items():
            expected = pytest.approx(figure, rel=1e-4) if isinstance(figure, float) else figure
            assert results["results"][task][metric] == expected, (task, metric)
    for task in SCORED:
        assert numbers(answers(results)[task]) == pytest.approx(numbers(answers(own)[task]), abs=1e-4)
    for task in GENERATED:
        assert answers(results)[task] == answers(own)[task]

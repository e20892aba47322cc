"""Run tasks of lm-evaluation-harness through the full cache and through a method's cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from knormpress.errors import KnormError
from knormpress.lm_eval.model import KnormLM, quiet
from knormpress.methods.full import FullCache
from knormpress.methods.method import Method
from knormpress.records.lm_eval import HarnessTasks, TaskMetric
from knormpress.records.schema import TextInfo

__all__ = ["compare_tasks", "find_tasks"]


def find_tasks(names: Sequence[str], folder: Path | None = None) -> TaskManager:
    """The harness's manager that knows the tasks, groups and tags called ``names``.

    Args:
        names: names of the harness, or YAML files of tasks.
        folder: a folder with YAML files of tasks of your own.

    Raises:
        KnormError: there is no such task or folder, or none is named.
    """
    if folder is not None and not folder.is_dir():
        raise KnormError(f"there is no folder {folder}; wanted a folder with YAML files of tasks")
    if not names:
        raise KnormError("no task is named; wanted at least one, such as lambada_openai or a YAML file")
    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    for name in files:
        if not Path(name).is_file():
            raise KnormError(f"there is no file {name}; wanted the YAML file of a task")
    # The harness's own thousands of tasks take long to read, and are left out where they are not needed.
    for with_own in (False, True):
        manager = TaskManager(include_path=folder and str(folder), include_defaults=with_own)
        unknown = [name for name in names if name not in (*files, *manager.all_tasks)]
        if not unknown:
            return manager
    raise KnormError(
        f"there is no task {unknown[0]!r}; wanted a name that lm-eval ls tasks shows, a YAML file, or a name in the "
        "folder of --include-path"
    )


def compare_tasks(
    model: KnormLM,
    manager: TaskManager,
    names: Sequence[str],
    *,
    few_shot: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
) -> tuple[HarnessTasks, TextInfo]:
    """Every metric of every task, through the full cache and through the cache of the method of ``model``.

    Args:
        model: the model and the method.
        manager, names: see ``find_tasks``.
        few_shot: examples before each question; as the task says unless given.
        limit: the most documents of a task.
        chat_template: whether prompts are put into the chat template of the tokenizer.

    Returns:
        The metrics, and the documents of the tasks as the text that was measured on.

    Raises:
        KnormError: a task can't be loaded or can't be answered by this model, or nothing of its contexts was pruned.
    """
    method = model.method

    def ask(each: Method) -> Any:
        model.method, model.contexts, model.pruned = each, 0, 0
        with _one_line(names):
            return simple_evaluate(
                model=model,
                tasks=list(names),
                task_manager=manager,
                num_fewshot=few_shot,
                limit=limit,
                apply_chat_template=chat_template,
                bootstrap_iters=0,
            )

    try:
        candidate = ask(method)
        contexts, pruned = model.contexts, model.pruned
        full = ask(FullCache())
    finally:
        model.method = method
    metrics = tuple(_metrics(full, candidate))
    tasks = HarnessTasks(version=lm_eval.__version__, contexts=contexts, pruned=pruned, metrics=metrics)
    prompts = [sample["prompt_hash"] + sample["target_hash"] for part in full["samples"].values() for sample in part]
    text = TextInfo(
        name=", ".join(full["samples"]),
        source=f"lm-evaluation-harness {lm_eval.__version__}",
        sha256=hashlib.sha256("".join([*prompts, model.split or ""]).encode()).hexdigest(),
    )
    return tasks, text


@contextmanager
def _one_line(names: Sequence[str]) -> Iterator[None]:
    """Errors of the harness and of the libraries that it loads data with, in one line, and without its log."""
    try:
        with quiet():
            yield
    except KnormError:
        raise
    # YAML, templates and data sets are read by different libraries, each with its own errors.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise KnormError(f"lm-evaluation-harness can't run {', '.join(names)}: {reason}") from error


def _metrics(full: Any, candidate: Any) -> Iterator[TaskMetric]:
    for task, figures in full["results"].items():
        # A group, whose figures are those of its tasks together, has no samples of its own.
        if task not in full["samples"]:
            continue
        for metric, figure in figures.items():
            name, _, key = metric.partition(",")
            if not key or name.endswith("_stderr") or not isinstance(figure, int | float):
                continue
            higher_is_better = full["higher_is_better"].get(task, {}).get(name)
            sides = [_right(side["samples"][task], name, key) for side in (full, candidate)]
            yield TaskMetric(
                task=task,
                metric=metric,
                higher_is_better=higher_is_better,
                full=float(figure),
                candidate=float(candidate["results"][task][metric]),
                # Where less is better, 1 says that a document is wrong.
                right=tuple(zip(*sides, strict=True)) if all(sides) and higher_is_better is not False else (),
            )


def _right(samples: Sequence[Any], metric: str, key: str) -> list[bool]:
    """Whether each document is right; empty where the metric is something else."""
    values = [sample.get(metric) for sample in samples if sample["filter"] == key]
    return [bool(value) for value in values] if all(value in (0, 1) for value in values) else []

"""Entries as the pytest plugin stores them, made from the records of ``record_factory``."""

from __future__ import annotations

from typing import Any

from knormpress.records.lm_eval import HarnessTasks, TaskMetric
from knormpress.records.schema import Entry
from tests.record_factory import make_record

COMMIT = "a" * 40


def make_entry(
    *,
    run: str = "run-1",
    test: str = "tests/test_x.py::test_x",
    keep_ratio: float = 0.9,
    commit: str | None = COMMIT,
    dirty: bool = False,
    method: str = "KnormPress(keep_ratio=0.9)",
    parts: tuple[str, ...] = ("latency", "memory", "quality", "retrieval", "cost"),
    passed: bool = True,
    verdicts: dict[str, str] | None = None,
    **parameters: Any,
) -> Entry:
    """An entry of the commit ``commit``; the rest as for ``make_record``."""
    record = make_record(keep_ratio, **{"found": 1.0, **parameters})
    changed = {"git_commit": commit, "git_dirty": dirty}
    return Entry(
        run=run,
        test=test,
        created=record.created,
        environment=record.environment.model_copy(update=changed),
        model=record.model,
        text=record.text,
        method=method,
        conditions={"prompt_tokens": record.conditions.prompt_tokens},
        verdicts=verdicts or {},
        passed=passed,
        **{part: getattr(record, part) for part in parts},
    )


def make_tasks(right: int = 40, *, of: int = 40, task: str = "choice", full: int | None = None) -> HarnessTasks:
    """A run of lm-evaluation-harness with one task: the candidate has the first ``right`` of ``of`` documents right.

    The full cache has the first ``full`` right, all unless given.
    """
    full = of if full is None else full
    pairs = tuple((number < full, number < right) for number in range(of))
    metric = TaskMetric(
        task=task, metric="acc,none", higher_is_better=True, full=full / of, candidate=right / of, right=pairs
    )
    other = TaskMetric(task=task, metric="perplexity,none", higher_is_better=False, full=5.0, candidate=6.0)
    return HarnessTasks(version="0.4.13", contexts=of, pruned=of, metrics=(other, metric))

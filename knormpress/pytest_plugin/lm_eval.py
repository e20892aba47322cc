"""The fixture of the pytest plugin that gates tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from knormpress.pytest_plugin.gates import settle
from knormpress.pytest_plugin.options import number

if TYPE_CHECKING:
    from knormpress.methods.method import Method
    from knormpress.pytest_plugin.measured import Measured
    from knormpress.workload.bench import Bench

__all__ = ["knorm_lm_eval_gate"]


@pytest.fixture
def knorm_lm_eval_gate(
    _knorm_measured: Measured, knorm_bench: Bench, request: pytest.FixtureRequest
) -> Callable[..., None]:
    """Let the test pass only if a method has right what the full cache has right of lm-evaluation-harness's tasks.

    Called as ``knorm_lm_eval_gate(method, ["arc_easy"], few_shot=5, limit=200, split=None, include_path=None)``. In
    each task it must have right ``--knorm-retrieval-share`` of the documents that the full cache has right; Wilson's
    whole 95 % interval decides, as in ``knorm_retrieval_gate``. Needs the extra ``lm-eval``.
    """
    wanted = number(request.config, "retrieval_share")

    def decide(
        method: Method,
        tasks: Sequence[str],
        *,
        few_shot: int | None = None,
        limit: int | None = None,
        split: str | None = None,
        include_path: str | Path | None = None,
    ) -> None:
        from knormpress.compare.lm_eval import judge_tasks
        from knormpress.pytest_plugin.measured import run_tasks

        folder = None if include_path is None else Path(include_path)
        result, text = run_tasks(knorm_bench, method, tasks, folder=folder, split=split, few_shot=few_shot, limit=limit)
        _knorm_measured.tasks(result, text)
        assert result.lm_eval is not None
        decision, figures = judge_tasks(result.lm_eval, wanted)
        settle(request.node, decision, figures)

    return decide

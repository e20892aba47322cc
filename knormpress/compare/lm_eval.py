"""Decide whether a method still has right what the full cache has right of the harness's tasks. No torch."""

from __future__ import annotations

from knormpress.compare.retrieval import LEAST_ITEMS
from knormpress.errors import KnormError
from knormpress.records.lm_eval import HarnessTasks
from knormpress.stats.gates import Decision, share_gate

__all__ = ["judge_tasks"]


def judge_tasks(tasks: HarnessTasks, wanted: float) -> tuple[Decision, str]:
    """Decide by Wilson's whole interval whether the share ``wanted`` is kept in each task.

    Args:
        tasks: what the harness said.
        wanted: the share, in (0, 1], of the documents that the full cache has right.

    Returns:
        ``fail`` where a task fails, else ``inconclusive`` where one does not decide, and the figures in a few lines. A
        task of which the full cache has too little right decides nothing.

    Raises:
        KnormError: a task has no metric that is a share of documents.
    """
    names = dict.fromkeys(metric.task for metric in tasks.metrics)
    without = [name for name in names if name not in tasks.kept]
    if without or not names:
        raise KnormError(
            f"{', '.join(without) or 'the run'} has no metric that is a share of documents; wanted a task with acc, "
            "exact_match or another that is 0 or 1 for each document"
        )
    decisions: list[Decision] = []
    lines = []
    for name, share in tasks.kept.items():
        decisions.append("inconclusive" if share.known < LEAST_ITEMS else share_gate(share, wanted))
        too_few = f", fewer than {LEAST_ITEMS} to decide by" if share.known < LEAST_ITEMS else ""
        lines.append(
            f"{name}: {share} documents are still right that are right with the full cache{too_few}: {share.percent}, "
            f"wanted {100 * wanted:g} %"
        )
    worst: Decision = "fail" if "fail" in decisions else "inconclusive" if "inconclusive" in decisions else "pass"
    return worst, "\n".join(lines)

"""The tasks of lm-evaluation-harness in a report: every metric through both caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from knormpress.records.schema import Entry
from knormpress.show.page.parts import Block, Cell, Table
from knormpress.show.page.words import interval
from knormpress.show.pictures.style import pretty

__all__ = ["task_blocks"]


def task_blocks(entries: Sequence[Entry]) -> Iterator[Block]:
    """A table for each method and set of documents; of several runs of the same, the last one."""
    latest = {
        (entry.test, entry.model.fingerprint, entry.model.dtype, entry.method, entry.text.sha256): entry
        for entry in entries
        if entry.lm_eval is not None
    }
    for entry in latest.values():
        yield _table(entry)


def _table(entry: Entry) -> Table:
    tasks = entry.lm_eval
    assert tasks is not None
    rows: list[tuple[Cell, ...]] = []
    for metric in tasks.metrics:
        change: Cell = (pretty(str(metric.change)), interval(metric.change)) if metric.right else ""
        rows.append((metric.task, metric.metric, f"{metric.full:.4f}", f"{metric.candidate:.4f}", change))
    return Table(
        caption=f"{entry.model.name}: {entry.method}",
        head=("Task", "Metric", "Full cache", "Pruned", "Change (points)"),
        rows=tuple(rows),
        row_heads=2,
        note=f"lm-evaluation-harness {tasks.version}, {entry.created[:10]}. {tasks.pruned:,} of {tasks.contexts:,} "
        "contexts were pruned. A change is given for metrics that are a share of documents.",
    )

"""Tasks of lm-evaluation-harness as a table in the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console

from knormpress.records.schema import Entry
from knormpress.show.console import StackingTable, make_console
from knormpress.show.sweep_table import WIDTH

__all__ = ["print_tasks"]


def print_tasks(entry: Entry, console: Console | None = None) -> None:
    """Print every metric of ``entry`` through both caches, in at most 80 columns."""
    tasks = entry.lm_eval
    assert tasks is not None
    console = console or make_console()
    table = StackingTable(
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=f"{entry.model.name}: {entry.method}",
        title_style="bold",
        title_justify="left",
        caption=f"lm-evaluation-harness {tasks.version}; {tasks.pruned:,} of {tasks.contexts:,} contexts were pruned. "
        "The change is in points of %, for metrics that are a share of documents.",
        caption_justify="left",
    )
    for column in ("task", "metric"):
        table.add_column(column, no_wrap=True)
    for column in ("full cache", "pruned", "change", "95 % interval"):
        table.add_column(column, justify="right", no_wrap=True)
    for metric in tasks.metrics:
        change = metric.change
        points = (str(change).removesuffix(" %"), change.interval) if metric.right else ("", "")
        table.add_row(metric.task, metric.metric, f"{metric.full:.4f}", f"{metric.candidate:.4f}", *points)
    console.print(table, width=min(WIDTH, console.width) if console.is_terminal else WIDTH)

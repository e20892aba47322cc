"""A plan and its frontier as a table in the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console

from knormpress.compare.targets import judge_plan
from knormpress.records.plan import Plan
from knormpress.show.console import StackingTable, make_console
from knormpress.show.sweep_table import WIDTH

__all__ = ["print_plan"]


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print what the plan keeps, and its results on unseen data beside those of others; in at most 80 columns."""
    console = console or make_console()
    width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    held, press = plan.held_out, plan.press
    table = StackingTable(
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=f"{plan.model.name}: {held['documents']} unseen documents, {held['scored']} tokens after"
        f" {held['context']:,}",
        title_style="bold",
        title_justify="left",
        caption=f"Targets: {_targets(plan)}. Found: {plan.items}, of those that the full cache finds.",
        caption_justify="left",
    )
    table.add_column("plan or method", no_wrap=True)
    for column in ("mean keep", "PPL change", "95 % interval", "KL", "found"):
        table.add_column(column, justify="right", no_wrap=True)
    for point in plan.frontier:
        change = point.change
        found = "" if point.found is None else f"{point.found[0]}/{point.found[1]}"
        table.add_row(
            f"{point.name} (the plan)" if plan.is_own(point) else point.name,
            f"{point.mean_keep:.3f}",
            str(change),
            change.interval,
            f"{point.kl:.4f}",
            found,
            style="bold" if plan.is_own(point) else None,
        )
    console.print(table, width=width)
    ratios = " ".join(f"{ratio:g}" for ratio in press.layer_keep_ratios or ())
    lines = [f"keep ratio of each layer: {ratios}", f"keep_recent: {press.keep_recent}"]
    if press.layer_scores:
        lines.insert(1, f"score of each layer: {' '.join(press.layer_scores)}")
    console.print("\n" + "\n".join([*judge_plan(plan), *lines]), width=width)


def _targets(plan: Plan) -> str:
    ppl, retrieval = plan.targets.ppl, plan.targets.retrieval
    return f"perplexity +{ppl:g} %" + ("" if retrieval is None else f", {plan.items} {retrieval:g}")

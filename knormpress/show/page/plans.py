"""The plans in a report: the frontier as a table, and the three pictures of each plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from knormpress.compare.targets import judge_plan
from knormpress.records.plan import Plan
from knormpress.show.page.parts import Block, Chart, Charts, Heading, Table, Words
from knormpress.show.page.words import interval
from knormpress.show.pictures.frontier import draw_frontier
from knormpress.show.pictures.kept import draw_kept
from knormpress.show.pictures.sensitivities import draw_sensitivities
from knormpress.show.pictures.style import pretty

__all__ = ["plan_blocks"]


def plan_blocks(plans: Sequence[Plan]) -> Iterator[Block]:
    """For each plan: what it keeps, its loss on text that the search did not use, and its pictures."""
    for plan in plans:
        if len(plans) > 1:
            yield Heading(f"{plan.model.name}, mean keep {plan.mean_keep:.3f}")
        yield Words(
            " ".join([_summary(plan), *(f"{sentence[0].upper()}{sentence[1:]}." for sentence in judge_plan(plan))])
        )
        if plan.frontier:
            yield _table(plan)
        charts = tuple(_charts(plan))
        if charts:
            yield Charts(charts)


def _summary(plan: Plan) -> str:
    ratios = ", ".join(f"{ratio:g}" for ratio in plan.press.layer_keep_ratios or ())
    targets = [f"perplexity within +{plan.targets.ppl:g} %"]
    if plan.targets.retrieval is not None:
        targets.append(f"{plan.targets.retrieval:.0%} of the {plan.items} found")
    scores = f" Score of each layer: {', '.join(plan.press.layer_scores)}." if plan.press.layer_scores else ""
    return (
        f"A plan for {plan.model.name} ({plan.model.dtype}), with the targets {' and '.join(targets)}: a mean of "
        f"{plan.mean_keep:.3f} of the tokens is kept, and the newest {plan.press.keep_recent} always. "
        f"Keep ratio of each layer: {ratios}.{scores}"
    )


def _table(plan: Plan) -> Table:
    held = plan.held_out
    rows = []
    for point in plan.frontier:
        change = point.change
        found = "" if point.found is None else f"{point.found[0]} of {point.found[1]}"
        figures = (pretty(str(change)), interval(change)), f"{point.kl:.4f}", found
        rows.append(
            (f"{point.name} (the plan)" if plan.is_own(point) else point.name, f"{point.mean_keep:.3f}", *figures)
        )
    return Table(
        caption=f"On {held['documents']} documents that the search did not use, {held['scored']} tokens scored after "
        f"{held['context']:,}",
        head=("plan or method", "mean keep", "PPL change", "KL (nats)", "found"),
        rows=tuple(rows),
        note=f"Found: {plan.items}, of those that the full cache finds.",
    )


def _charts(plan: Plan) -> Iterator[Chart]:
    if plan.frontier:
        points = [f"{point.name} at {point.mean_keep:.3f}: {pretty(str(point.change))}" for point in plan.frontier]
        words = f"Change of perplexity by mean keep ratio. {'; '.join(points)}."
        yield Chart("What a smaller cache costs", draw_frontier(plan, plan.frontier), words)
    if plan.sensitivities and plan.sensitivities.text:
        worst = sorted(enumerate(plan.sensitivities.text), key=lambda layer: -layer[1][0])[:5]
        words = "The layers whose pruning damages the text most: " + ", ".join(str(layer) for layer, _ in worst) + "."
        yield Chart("What pruning one layer alone costs", draw_sensitivities(plan, plan.sensitivities), words)
    if plan.kept and plan.kept.tokens:
        words = f"Which of {len(plan.kept.tokens)} tokens are kept in which of {len(plan.kept.layers)} layers."
        yield Chart("The tokens that are kept", draw_kept(plan, plan.kept), words)

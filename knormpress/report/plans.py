"""What a report says of plans: the frontier as a table, and the three pictures of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from knormpress.intervals import Change
from knormpress.plan import Plan, Point
from knormpress.plots.frontier import draw_frontier
from knormpress.plots.kept import draw_kept
from knormpress.plots.sensitivities import draw_sensitivities
from knormpress.plots.style import pretty
from knormpress.report.parts import Block, Chart, Charts, Heading, Table, Words
from knormpress.report.words import interval

__all__ = ["plan_blocks"]


def plan_blocks(plans: Sequence[Plan]) -> Iterator[Block]:
    """For each plan what it keeps, what that costs on text that its search did not see, and its pictures."""
    for plan in plans:
        if len(plans) > 1:
            yield Heading(f"{plan.model['name']}, mean keep {plan.mean_keep:.3f}")
        yield Words(_summary(plan))
        if plan.frontier:
            yield _table(plan)
        charts = tuple(_charts(plan))
        if charts:
            yield Charts(charts)


def _summary(plan: Plan) -> str:
    ratios = ", ".join(f"{ratio:g}" for ratio in plan.press.layer_keep_ratios or ())
    asked = [f"perplexity within +{plan.targets['ppl']:g} %"]
    if plan.targets["passkey"] is not None:
        asked.append(f"{plan.targets['passkey']:.0%} of the passkeys found")
    return (
        f"A plan for {plan.model['name']} ({plan.model['dtype']}), searched under {' and '.join(asked)}: a mean of "
        f"{plan.mean_keep:.3f} of the tokens is kept, and the newest {plan.press.keep_recent} always. "
        f"Keep ratio of each layer: {ratios}."
    )


def _table(plan: Plan) -> Table:
    held = plan.held_out
    rows = []
    for point in plan.frontier:
        change = Change(*point.ppl)
        found = "" if point.passkeys is None else f"{point.passkeys[0]} of {point.passkeys[1]}"
        figures = (pretty(str(change)), interval(change)), f"{point.kl:.4f}", found
        rows.append(
            (f"{point.name} (the plan)" if _is(plan, point) else point.name, f"{point.mean_keep:.3f}", *figures)
        )
    return Table(
        caption=f"On {held['documents']} documents that the search did not see, {held['scored']} tokens scored after "
        f"{held['context']:,}",
        head=("plan or method", "mean keep", "PPL change", "KL (nats)", "passkeys"),
        rows=tuple(rows),
        note="Passkeys: found of those that the full cache finds.",
    )


def _is(plan: Plan, point: Point) -> bool:
    return point.name == "tuned" and point.press == plan.press


def _charts(plan: Plan) -> Iterator[Chart]:
    if plan.frontier:
        points = [
            f"{point.name} at {point.mean_keep:.3f}: {pretty(str(Change(*point.ppl)))}" for point in plan.frontier
        ]
        words = f"Change of perplexity by mean keep ratio. {'; '.join(points)}."
        yield Chart("What a smaller cache costs", draw_frontier(plan, plan.frontier), words)
    if plan.sensitivities and plan.sensitivities.text:
        worst = sorted(enumerate(plan.sensitivities.text), key=lambda layer: -layer[1][0])[:5]
        words = (
            "The layers whose pruning does most harm to the text: " + ", ".join(str(layer) for layer, _ in worst) + "."
        )
        yield Chart("What pruning one layer alone does", draw_sensitivities(plan, plan.sensitivities), words)
    if plan.kept and plan.kept.tokens:
        words = f"Which of {len(plan.kept.tokens)} tokens stay in which of {len(plan.kept.layers)} layers."
        yield Chart("The tokens that are kept", draw_kept(plan, plan.kept), words)

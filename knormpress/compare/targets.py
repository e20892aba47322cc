"""Judge a plan by the targets that it was tuned for, on what the search did not see. No torch."""

from __future__ import annotations

from knormpress.records.plan import Plan

__all__ = ["judge_plan"]


def judge_plan(plan: Plan) -> list[str]:
    """A sentence for each target: met or not met by the whole 95 % interval, else not decided.

    There is none where the plan was not measured, or where its retrieval has no interval (in earlier versions).
    """
    own = next((point for point in plan.frontier if plan.is_own(point)), None)
    if own is None:
        return []
    _, low, high = own.ppl
    word = _word(high <= plan.targets.ppl, low > plan.targets.ppl)
    sentences = [f"Target PPL +{plan.targets.ppl:g} %: {word}, measured {own.change} ({own.change.interval})"]
    wanted = plan.targets.retrieval
    if wanted is not None and own.found is not None and own.ends is not None:
        low, high = own.ends
        word = _word(low >= wanted, high < wanted)
        found, known = own.found
        sentences.append(
            f"Target {plan.items} {100 * wanted:g} %: {word}, found {found} of {known} "
            f"({100 * low:.0f}..{100 * high:.0f} %)"
        )
    return sentences


def _word(met: bool, missed: bool) -> str:
    return "met" if met else "not met" if missed else "not decided"

"""The two lines below each picture of a plan: model, policy, targets, data and date."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from knormpress.records.plan import Plan
from knormpress.show.pictures.style import add_footer_lines, pretty, shortened

__all__ = ["add_plan_footer", "target_words"]

_MOST = 60
_SHOWN = ("text", "documents", "passkeys", "texts")
_TIME_OF_DAY = re.compile(r"(?<=^\d{4}-\d\d-\d\d)[T ]\d.*")


def add_plan_footer(figure: Figure, plan: Plan) -> None:
    """Write model, policy, targets, texts and date at the bottom left."""
    press = plan.press
    recent = f", keep_recent {press.keep_recent:,}" if press.keep_recent else ""
    made = [f"{name} {_TIME_OF_DAY.sub('', value)}" for name, value in plan.made.items()]
    add_footer_lines(
        figure,
        (
            [
                f"{shortened(plan.model.name, _MOST)}, {plan.model.dtype}",
                f"plan: mean keep {plan.mean_keep:.3f}, prune_after {press.prune_after:,}{recent}",
                f"targets: {', '.join(target_words(plan))}",
            ],
            [f"held out: {_facts(plan.held_out)}", f"search: {_facts(plan.calibration)}", *made],
        ),
    )


def target_words(plan: Plan) -> list[str]:
    """The plan's targets as text."""
    ppl, retrieval = plan.targets.ppl, plan.targets.retrieval
    words = [pretty(f"PPL <= {ppl:+g} %")]
    return words if retrieval is None else [*words, pretty(f"{plan.items} >= {100 * retrieval:g} %")]


def _facts(values: Mapping[str, Any]) -> str:
    return ", ".join(_fact(name, values[name]) for name in _SHOWN if name in values)


def _fact(name: str, value: Any) -> str:
    if isinstance(value, str):
        return shortened(value, _MOST)
    if isinstance(value, list | tuple | dict):
        return f"{len(value):,} {name}"
    return f"{value:,} {name}" if type(value) is int else f"{name} {value}"

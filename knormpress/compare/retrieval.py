"""Decide whether a method still finds what the full cache finds, by those tasks that controls fail. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from knormpress.records.retrieval import Retrieval
from knormpress.stats.gates import Decision, share_gate

__all__ = ["LEAST_ITEMS", "Outcome", "judge_retrieval"]

LEAST_ITEMS = 5
"""A task of which the full cache solves fewer items decides nothing."""


@dataclass(frozen=True)
class Outcome:
    """The decision of a retrieval gate.

    Args:
        decision: for all gating tasks together; ``fail`` too where one of them fails by itself.
        gating: the tasks that decide.
        left_out: why each other task does not.
        text: the figures, in a few lines.
    """

    decision: Decision
    gating: tuple[str, ...]
    left_out: Mapping[str, str]
    text: str


def judge_retrieval(method: Retrieval, controls: Mapping[str, Retrieval], wanted: float) -> Outcome:
    """Decide by Wilson's whole interval whether ``method`` finds the share ``wanted`` of the full cache's items.

    Args:
        method: what the method found.
        controls: what methods found that must be worse, with as many tokens kept and on the same items.
        wanted: the share, in (0, 1].

    A task gates only if the full cache solves enough of it, and if every control fails it: what a random choice of
    tokens passes says nothing about the method.
    """
    left_out = {task: reason for task in method.asked if (reason := _why_not(task, method, controls, wanted))}
    gating = tuple(task for task in method.asked if task not in left_out)
    share = method.of(*gating).share
    failing = [task for task in gating if share_gate(method.of(task).share, wanted) == "fail"]
    decision = "fail" if failing else share_gate(share, wanted) if gating else "inconclusive"
    lines = [f"found {share} items: {share.percent}, wanted {100 * wanted:g} %" if gating else "no task gates"]
    lines += [_line(task, method, controls) + (": fails by itself" if task in failing else "") for task in gating]
    lines += [f"{task} left out: {reason}" for task, reason in left_out.items()]
    return Outcome(decision, gating, left_out, "\n".join(lines))


def _line(task: str, method: Retrieval, controls: Mapping[str, Retrieval]) -> str:
    part = method.of(task)
    others = "; ".join(f"{name} {control.of(task).share.found}" for name, control in controls.items())
    beside = f" (controls: {others})" if others else ""
    return f"{task} {part.share}{beside}"


def _why_not(task: str, method: Retrieval, controls: Mapping[str, Retrieval], wanted: float) -> str:
    """Why ``task`` does not gate; empty if it does."""
    known = method.of(task).share.known
    if known < LEAST_ITEMS:
        return f"the full cache solves {known} of {method.asked[task]}, too few to decide anything"
    for name, control in controls.items():
        share = control.of(task).share
        if share_gate(share, wanted) != "fail":
            return f"{name} with as many tokens kept finds {share}, so the task does not tell it from a method"
    return ""

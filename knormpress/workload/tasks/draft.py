"""A text with something to find, in words, as a task writes it: before it is cut to a length in tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from knormpress.workload.tasks.draw import Draw

__all__ = ["Asked", "Draft", "Fits", "Task"]

Fits: TypeAlias = Callable[[str], int]
"""How many lines like the given one fill the text."""


@dataclass(frozen=True)
class Asked:
    """A question, as text that the answer continues.

    Args:
        name: what is asked for.
        question: ends where the answer begins, without the space between them.
        answer: begins with that space, if there is one.
        others: other values that stand in the text, written like the answer.
        depth: where in the text the answer stands, as a share of it; the first place if there are several.
    """

    name: str
    question: str
    answer: str
    others: tuple[str, ...] = ()
    depth: float = 0.0


@dataclass(frozen=True)
class Draft:
    """What a text holds beside its body: ``needles`` at depths, a beginning ``head``, and the questions."""

    asked: tuple[Asked, ...]
    needles: tuple[tuple[float, str], ...] = ()
    head: str = ""


@dataclass(frozen=True)
class Task:
    """A kind of text and question.

    Args:
        name: as users type it.
        write: makes the draft of one text.
        body: what the needles are hidden in; ``"lines"`` where needles fill the text themselves.
        in_turn: the questions are asked one after another of the same cache, each after the answers before it; else
            each is asked of a copy.
        source: where the task comes from.
    """

    name: str
    write: Callable[[Draw, Fits], Draft]
    body: Literal["prose", "filler", "lines"]
    in_turn: bool = False
    source: str = ""

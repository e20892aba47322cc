"""The parts of a report: sections of blocks, which are independent of the output format.

The page and its Markdown form are made from the same blocks, so their content can't differ. To add a kind of chart, add
a ``Chart`` to the ``Charts`` of a section.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from matplotlib.figure import Figure

__all__ = [
    "Block",
    "Cell",
    "Chart",
    "Charts",
    "Download",
    "Facts",
    "Heading",
    "Line",
    "Section",
    "Statement",
    "Statements",
    "Table",
    "Tone",
    "Words",
]

Tone: TypeAlias = Literal["good", "bad", "unsure", "plain"]

Cell: TypeAlias = str | tuple[str, str]
"""A cell of a table: text, or a figure and a small text below it."""


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str
    kind: ClassVar[str] = "heading"


@dataclass(frozen=True)
class Words:
    """A paragraph."""

    text: str
    kind: ClassVar[str] = "words"


@dataclass(frozen=True)
class Line:
    """One sentence with a verdict, and the verdict's word."""

    tone: Tone
    word: str
    text: str


@dataclass(frozen=True)
class Statement:
    """A verdict: the word, a sentence, and optionally more lines and the reason."""

    tone: Tone
    word: str
    text: str
    lines: tuple[Line, ...] = ()
    why: str | None = None


@dataclass(frozen=True)
class Statements:
    """A list of verdicts."""

    statements: tuple[Statement, ...]
    kind: ClassVar[str] = "statements"


@dataclass(frozen=True)
class Table:
    """A table whose first ``row_heads`` columns name the row. A ``folded`` table opens on a click."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    row_heads: int = 1
    note: str = ""
    folded: bool = False
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Facts:
    """A list of names, each with a text."""

    pairs: tuple[tuple[str, str], ...]
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Chart:
    """A picture, and a description of it in words, for readers who can't see it.

    ``themed`` pictures have a transparent background and the colours of ``pictures.style``, which follow a dark page;
    others are on a light card. Large pictures keep their size, and scroll on a narrow screen.
    """

    title: str
    figure: Figure
    words: str
    themed: bool = False


@dataclass(frozen=True)
class Charts:
    """Pictures side by side, as many as there is room for."""

    charts: tuple[Chart, ...]
    kind: ClassVar[str] = "charts"


@dataclass(frozen=True)
class Download:
    """A file that is embedded in the page."""

    name: str
    media_type: str
    text: str
    what: str
    kind: ClassVar[str] = "download"


Block: TypeAlias = Heading | Words | Statements | Table | Facts | Charts | Download


@dataclass(frozen=True)
class Section:
    """A part of the report under one heading; links use its ``identifier``."""

    identifier: str
    title: str
    blocks: tuple[Block, ...]

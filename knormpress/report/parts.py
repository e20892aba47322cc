"""What a report is made of: sections of blocks, each of which knows nothing of how it is written down.

The page and its Markdown form are made from the same blocks, so that they can't differ in what they say. To add a kind
of chart, add a ``Chart`` to the ``Charts`` of a section.
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
    "Finding",
    "Findings",
    "Heading",
    "Line",
    "Section",
    "Table",
    "Tone",
    "Words",
]

Tone: TypeAlias = Literal["good", "bad", "unsure", "plain"]

Cell: TypeAlias = str | tuple[str, str]
"""A cell of a table: text, or a figure and what is written small beneath it."""


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
    """One sentence that judges one thing, and the word for it."""

    tone: Tone
    word: str
    text: str


@dataclass(frozen=True)
class Finding:
    """A verdict: the word, what it is about, the sentences behind it and why it is so."""

    tone: Tone
    word: str
    text: str
    lines: tuple[Line, ...] = ()
    why: str | None = None


@dataclass(frozen=True)
class Findings:
    """A list of verdicts."""

    findings: tuple[Finding, ...]
    kind: ClassVar[str] = "findings"


@dataclass(frozen=True)
class Table:
    """A table whose first ``row_heads`` columns name the row. ``folded`` ones are shown when asked for."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    row_heads: int = 1
    note: str = ""
    folded: bool = False
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Facts:
    """Names, each with what is to be said of it."""

    pairs: tuple[tuple[str, str], ...]
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Chart:
    """A picture, and in words what it shows, for those who can't see it.

    ``themed`` pictures are drawn in the colours of ``plots.style`` on no ground of their own, and follow a dark page;
    all others stand on a light card. Give large ones as they are: on a narrow screen they scroll within their card.
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
    """A file that the page carries in itself."""

    name: str
    media_type: str
    text: str
    what: str
    kind: ClassVar[str] = "download"


Block: TypeAlias = Heading | Words | Findings | Table | Facts | Charts | Download


@dataclass(frozen=True)
class Section:
    """A part of the report under one heading; ``identifier`` is what links lead to."""

    identifier: str
    title: str
    blocks: tuple[Block, ...]

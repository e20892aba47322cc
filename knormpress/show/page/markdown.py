"""A report as Markdown for the summary of a CI job, as GitHub renders it, without charts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from knormpress.show.page.parts import Cell, Facts, Heading, Section, Statements, Table, Words

__all__ = ["render_markdown"]


def render_markdown(sections: Sequence[Section]) -> str:
    """The paragraphs, verdicts, tables and facts of the sections, in order."""
    return "\n".join(["# KnormPress report", *(line for section in sections for line in _section(section)), ""])


def _section(section: Section) -> Iterator[str]:
    yield from ("", f"## {_escaped(section.title)}")
    for block in section.blocks:
        if isinstance(block, Heading):
            yield from ("", f"### {_escaped(block.text)}")
        elif isinstance(block, Words):
            yield from ("", _escaped(block.text))
        elif isinstance(block, Statements):
            yield from _statements(block)
        elif isinstance(block, Table):
            yield from _table(block)
        elif isinstance(block, Facts):
            yield ""
            yield from (f"- **{_escaped(name)}**: {_escaped(text)}" for name, text in block.pairs)


def _statements(block: Statements) -> Iterator[str]:
    yield ""
    for statement in block.statements:
        yield f"- **{_escaped(statement.word)}**: {_escaped(statement.text)}"
        yield from (f"  - {_escaped(line.word)}: {_escaped(line.text)}" for line in statement.lines)
        if statement.why is not None:
            yield f"  - Why: {_escaped(statement.why)}"


def _table(table: Table) -> Iterator[str]:
    caption = _escaped(table.caption)
    yield from ("", f"<details><summary>{caption}</summary>" if table.folded else f"{caption}:", "")
    yield f"| {' | '.join(map(_escaped, table.head))} |"
    yield f"|{' --- |' * len(table.head)}"
    yield from (f"| {' | '.join(map(_cell, row))} |" for row in table.rows)
    if table.note:
        yield from ("", _escaped(table.note))
    if table.folded:
        yield from ("", "</details>")


def _cell(cell: Cell) -> str:
    return _escaped(cell) if isinstance(cell, str) else f"{_escaped(cell[0])} ({_escaped(cell[1])})"


def _escaped(text: str) -> str:
    """Text that Markdown shows unchanged: it can't break tables, start HTML, mention users, or make links."""
    text = re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", " ".join(text.split()))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace("@", "&#64;").replace("://", "&#58;//")

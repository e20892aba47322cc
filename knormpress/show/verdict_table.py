"""Verdicts as text for a terminal, and as Markdown for the summary of a CI job."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence

from knormpress.compare.verdicts import THRESHOLDS, Verdict, worst

__all__ = ["count_words", "fill", "verdict_lines", "verdict_markdown", "worst_first"]

_WIDTH = 80
_INDENT = " " * 13
_METRIC = max(map(len, THRESHOLDS)) + 1


def verdict_lines(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Lines of at most 80 columns, except for long names: the count of each word, then all tests, the worst first."""
    yield count_words(verdicts)
    for verdict in worst_first(verdicts):
        yield f"{verdict.word:<13}{verdict.test}"
        yield from textwrap.wrap(verdict.reason, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)
        for finding in verdict.findings:
            change = "" if finding.change is None else f"  {finding.change} ({finding.change.interval})"
            line = f"{_INDENT}{finding.metric:<{_METRIC}}{finding.word:<13}{' -> '.join(finding.figures)}"
            if len(line + change) <= _WIDTH:
                yield line + change
            else:
                yield from (line, f"{_INDENT}{' ' * (_METRIC + 13)}{change.strip()}")


def verdict_markdown(verdicts: Sequence[Verdict]) -> str:
    """A table of all tests, the worst first, and below it a folded table of all figures."""
    lines = [f"**{count_words(verdicts)}**", "", "| verdict | test | why |", "| --- | --- | --- |"]
    for verdict in worst_first(verdicts):
        lines.append(f"| {verdict.word} | {_cell(verdict.test)} | {_cell(verdict.reason)} |")
    lines += ["", "<details><summary>Every figure</summary>", ""]
    lines += ["| test | metric | verdict | before | now | change |", "| --- | --- | --- | --- | --- | --- |"]
    for verdict in verdicts:
        for finding in verdict.findings:
            change = "" if finding.change is None else f"{finding.change} ({finding.change.interval})"
            cells = (verdict.test, finding.metric, finding.word, *finding.figures, change)
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join([*lines, "", "</details>", ""])


def fill(text: str) -> str:
    """``text`` in lines of at most 80 columns, except for long names."""
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def worst_first(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts, sorted with the worst first."""
    words = {verdict.word for verdict in verdicts}
    order = []
    while words:
        order.append(worst(list(words)))
        words.discard(order[-1])
    return sorted(verdicts, key=lambda verdict: (order.index(verdict.word), verdict.test))


def count_words(verdicts: Sequence[Verdict]) -> str:
    """The number of verdicts with each word, the worst first: ``1 regressed, 5 ok``."""
    counts = Counter(verdict.word for verdict in worst_first(verdicts))
    return ", ".join(f"{count} {word}" for word, count in counts.items())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

"""The table of results as a picture, with a verdict on each of the guide's targets and claims."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from knormpress.compare.promises import UNSURE, Judgement, judge_claims, judge_targets
from knormpress.records.schema import Record
from knormpress.show.pictures.style import GREY, WIDTH, add_footer, add_heading, new_figure, pretty, three_digits
from knormpress.show.sweep_table import below_the_cache

__all__ = ["draw_table"]

_DARK_GREEN, _DARK_RED = "#00714F", "#B34700"

# In pixels. For a column of figures this is its right edge, for a column of verdicts its middle.
_LEFT, _RIGHT = 48, WIDTH - 48
_TOP, _HEAD, _ROW, _LINE, _FOOT = 112, 92, 54, 23, 76
_FIGURES = (112, 200, 335, 475, 612, 750, 840)
_TARGETS, _CLAIMS = (918, 1032, 1142), (1292, 1400, 1504)
_WHAT = ("TTFT", "throughput", "PPL")
_WRAP = 155  # characters


def draw_table(records: Sequence[Record], left_out: str, beside: Sequence[Record] = ()) -> Figure:
    """Draw a row for each keep ratio: changes with intervals, the cache, and a verdict on each target and claim."""
    targets, claims = judge_targets(records), judge_claims(records, beside)
    notes = _notes([*targets, *claims], records)
    figure = new_figure(_TOP + _HEAD + _ROW * len(records) + _LINE * len(notes) + 16 + _FOOT)
    add_heading(figure, "Results by keep ratio", _full_cache(records))
    page = _Page(figure)
    right = _header(page, bool(targets), bool(claims))
    top = _TOP + _HEAD
    for record in records:
        _row(page, top, record)
        for verdict in (*targets, *claims):
            if verdict.keep_ratio == record.keep_ratio:
                _verdict(page, top, verdict)
        top += _ROW
        page.rule(top, _LEFT, right)
    top += 10
    for note in notes:
        top += _LINE
        page.write(_LEFT, top, note, horizontalalignment="left", fontsize=8, color=GREY)
    add_footer(figure, records, left_out)
    return figure


class _Page:
    """Writes on a figure, with positions in pixels from the top left."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.height = figure.get_figheight() * figure.dpi

    def write(self, x: float, y: float, text: str, **style: Any) -> None:
        style = {"horizontalalignment": "right", "verticalalignment": "center", "fontsize": 8.5, **style}
        self.figure.text(x / WIDTH, 1 - y / self.height, text, **style)

    def rule(self, y: float, left: float, right: float, width: float = 0.6) -> None:
        height = 1 - y / self.height
        line = Line2D((left / WIDTH, right / WIDTH), (height, height), color="#AAAAAA", linewidth=width)
        self.figure.add_artist(line)


def _header(page: _Page, targets: bool, claims: bool) -> float:
    """Write the column heads; returns the right end of the last column."""
    names = ("keep\nratio", "compr.\n(%)", *(f"{name}\n(%)" for name in ("TTFT", "throughput", "TPOT", "PPL")))
    for edge, name in zip(_FIGURES, (*names, "cache\n(MB)"), strict=True):
        page.write(edge, _TOP + 58, name)
    groups = [("change, 95 % interval below", (_FIGURES[1] + 25, _FIGURES[5]))]
    if targets:
        groups.append(("the guide's targets", (_TARGETS[0] - 48, _TARGETS[-1] + 48)))
        for middle, what, limit in zip(_TARGETS, _WHAT, ("<= -80 %", ">= -10 %", "+-5 %"), strict=True):
            page.write(middle, _TOP + 58, f"{what}\n{pretty(limit)}", horizontalalignment="center")
    if claims:
        groups.append(("the guide's claims", (_CLAIMS[0] - 48, _RIGHT)))
        for middle, what in zip(_CLAIMS, _WHAT, strict=True):
            page.write(middle, _TOP + 58, f"{what}\n", horizontalalignment="center")
    for name, (left, right) in groups:
        page.write((left + right) / 2, _TOP + 12, name, horizontalalignment="center", fontweight="bold")
        page.rule(_TOP + 28, left, right)
    end = max(_FIGURES[-1], *(right for _, (_, right) in groups))
    page.rule(_TOP + _HEAD - 4, _LEFT, end, 1.2)
    return end


def _row(page: _Page, top: float, record: Record) -> None:
    for line, word in enumerate(record.row.split()):
        page.write(_FIGURES[0], top + 17 + 22 * line, word, fontweight="bold")
    page.write(_FIGURES[1], top + 17, f"{(1.0 - record.keep_ratio) * 100:.3g}")
    changes = (record.latency.ttft, record.latency.throughput, record.latency.tpot, record.quality.ppl)
    for edge, change in zip(_FIGURES[2:6], changes, strict=True):
        page.write(edge, top + 17, pretty(str(change).removesuffix(" %")))
        page.write(edge, top + 39, pretty(change.interval), fontsize=7.5, color=GREY)
    page.write(_FIGURES[6], top + 17, f"{record.memory.candidate_cache_bytes / 1e6:,.1f}")
    decoded = record.memory.candidate_decoded_bytes
    if decoded is not None:
        page.write(_FIGURES[6], top + 39, f"{decoded / 1e6:,.1f}", fontsize=7.5, color=GREY)


def _verdict(page: _Page, top: float, verdict: Judgement) -> None:
    word = {
        "horizontalalignment": "center",
        "fontsize": 7.0,  # so that "not met ~" stays in its column
        "fontweight": "bold",
        "color": _DARK_GREEN if verdict.met else _DARK_RED,
    }
    if verdict.kind == "target":
        page.write(_TARGETS[_WHAT.index(verdict.what)], top + 17, verdict.word, **word)
        return
    middle = _CLAIMS[_WHAT.index(verdict.what)]
    page.write(middle, top + 17, verdict.word, **word)
    page.write(middle, top + 39, pretty(verdict.promised), horizontalalignment="center", fontsize=7.5, color=GREY)


def _full_cache(records: Sequence[Record]) -> str:
    speeds = [record.latency.baseline_speed for record in records]
    ttft = statistics.median(speed.ttft_s for speed in speeds)
    tpot = statistics.median(speed.tpot_s for speed in speeds)
    throughput = statistics.median(speed.throughput for speed in speeds)
    figures = (
        f"{records[0].memory.baseline_cache_bytes / 1e6:,.1f} MB",
        f"TTFT {three_digits(ttft)} s",
        f"TPOT {three_digits(tpot * 1e3)} ms",
        f"{three_digits(throughput)} tokens/s",
        f"PPL {three_digits(records[0].quality.baseline_ppl)}",
    )
    return f"The full cache, measured in the same run: {', '.join(figures)}"


def _notes(verdicts: Sequence[Judgement], records: Sequence[Record]) -> list[str]:
    notes = below_the_cache(records)
    if not all(verdict.is_sure for verdict in verdicts):
        notes.append(UNSURE)
    reasons = dict.fromkeys(verdict.why for verdict in verdicts if verdict.why is not None)
    for reason in reasons:
        notes += textwrap.wrap(pretty(reason), _WRAP)
    return notes

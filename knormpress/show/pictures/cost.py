"""Counted cost over the keep ratio, and how far it agrees with the time."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Final

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from knormpress.records.figures import Counted, Phase
from knormpress.records.schema import Record
from knormpress.show.pictures.style import (
    BLUE,
    DPI,
    GREEN,
    GREY,
    HALO,
    ORANGE,
    RED,
    add_footer,
    add_heading,
    add_legend,
    keep_ratio_axis,
    labelled_places,
    new_figure,
    panel_figure,
    pretty,
    ratio_colours,
    room_for_labels,
    three_digits,
    uniform_and_plans,
)
from knormpress.stats.ranks import rank_correlation

__all__ = ["COUNTED", "PHASES", "agreement", "counted_ratio", "draw_agreement_panel", "draw_cost", "draw_cost_panels"]

COUNTED: Final[dict[Counted, str]] = {
    "ops": "operators",
    "moved": "bytes moved",
    "flops": "FLOPs",
    "allocated": "bytes allocated",
    "host_reads": "host reads",
}
"""The figures of a counted cost, with their names."""

PHASES: Final[dict[Phase, str]] = {"decode": "A decoded token", "prefill": "The prefill"}
"""The parts of a generation that are counted apart, with their names."""

# Colour, marker and size in points: a later line is finer, so that lines in the same place are all seen.
_LINES: tuple[tuple[Counted, str, str, float], ...] = (
    ("ops", ORANGE, "s", 9.0),
    ("allocated", GREEN, "D", 7.0),
    ("flops", RED, "^", 5.5),
    ("moved", BLUE, "o", 3.5),
)
_FEWEST = 3  # points, of which any order means anything
_MARKERS = "osD^vPX*"
_MOST_NAMED = 8
_TOP = (1, 3)  # host reads are often many times those of the full cache: they have a scale of their own


def draw_cost(records: Sequence[Record], timed: Sequence[Record], left_out: str) -> Figure:
    """Draw the counted cost of a decoded token and of the prefill, as ratios to the full cache, over the keep ratio.

    Beside it TPOT over the bytes moved, if there are at least 3 points for that.

    Args:
        records: records with a cost that differ only in the ratios, from the highest keep ratio down.
        timed: records with a cost that differ only in keep ratio and prompt length.
        left_out: a note about records that are not shown.
    """
    figure, told = new_figure(), agreement(timed)
    prompt = f"{records[0].conditions.prompt_tokens:,}"
    add_heading(
        figure,
        "Counted cost by keep ratio",
        f"Ratio to the full cache behind a prompt of {prompt} tokens. Counted, not timed: without an interval, and the "
        "same on every machine.",
    )
    grid = figure.add_gridspec(
        2,
        3 if told else 2,
        left=0.065,
        right=0.985,
        top=0.845,
        bottom=0.165,
        wspace=0.2,
        hspace=0.16,
        height_ratios=_TOP,
    )
    add_legend(figure, _draw_phases(figure, grid, records))
    if told:
        above, axes = figure.add_subplot(grid[0, 2]), figure.add_subplot(grid[1, 2])
        above.set_axis_off()
        above.set_title("Counted and timed")
        above.legend(
            handles=_draw_points(axes, timed),
            title=textwrap.fill(told, 50),
            loc="upper left",
            bbox_to_anchor=(-0.03, 1.06),
            ncols=3,
            alignment="left",
            fontsize=7.0,
            title_fontsize=7.5,
            columnspacing=0.8,
            handlelength=1.0,
            handletextpad=0.4,
        )
    add_footer(figure, list({id(record): record for record in (*records, *timed)}.values()), left_out)
    return figure


def draw_cost_panels(records: Sequence[Record]) -> Figure:
    """Draw the counted cost alone, without heading and footer."""
    figure = Figure(figsize=(8.2, 3.9), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    handles = _draw_phases(figure, figure.add_gridspec(2, 2, height_ratios=_TOP), records)
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), handlelength=1.2)
    return figure


def draw_agreement_panel(records: Sequence[Record]) -> Figure:
    """Draw TPOT over the bytes moved by a decoded token as one small panel; for ``records`` see ``draw_cost``."""
    figure, axes = panel_figure()
    handles = _draw_points(axes, records)
    figure.legend(handles=handles, loc="outside lower left", ncols=4, fontsize=7.0, columnspacing=1.0, handlelength=1.2)
    return figure


def agreement(records: Sequence[Record]) -> str:
    """How far the bytes that a decoded token moves and TPOT agree, in a sentence; empty for fewer than 3 records."""
    if len(records) < _FEWEST:
        return ""
    value = rank_correlation(*zip(*map(_point, records), strict=True))
    rank = "none, as one of them never differs" if math.isnan(value) else pretty(f"{value:.2f}")
    return f"Rank correlation of TPOT with the bytes that a decoded token moves, over {len(records)} points: {rank}."


def counted_ratio(record: Record, phase: Phase, name: Counted) -> float:
    """A counted figure of a record as ratio to the full cache; NaN where there is none."""
    return record.cost.ratio(phase, name) if record.cost else math.nan


def _draw_phases(figure: Figure, grid: GridSpec, records: Sequence[Record]) -> list[Artist]:
    """Draw a column for each phase, host reads above the rest; returns what a legend needs."""
    for column, (phase, title) in enumerate(PHASES.items()):
        top = figure.add_subplot(grid[0, column])
        top.set_title(title)
        _host_reads(top, records, phase)
        _ratios(figure.add_subplot(grid[1, column]), records, phase)
    handles: list[Artist] = [
        Line2D([], [], color=colour, marker=marker, markersize=size, label=COUNTED[name])
        for name, colour, marker, size in _LINES
    ]
    if any(record.policy.layer_keep_ratios for record in records):
        handles.append(Line2D([], [], color=GREY, marker="o", linestyle="", markerfacecolor="none", label="a plan"))
    return handles


def _host_reads(axes: Axes, records: Sequence[Record], phase: Phase) -> None:
    values = [counted_ratio(record, phase, "host_reads") for record in records]
    labelled = keep_ratio_axis(axes, records)
    axes.set_xlabel("")
    axes.tick_params(labelbottom=False)
    axes.set_ylabel("host reads")
    axes.bar(range(len(values)), values, width=0.62, color=GREY)
    for place in labelled:
        if math.isfinite(values[place]):
            axes.annotate(
                three_digits(values[place]),
                (place, values[place]),
                xytext=(0, 3),
                textcoords="offset points",
                horizontalalignment="center",
                fontsize=7.0,
                path_effects=HALO,
            )
    axes.set_ylim(0.0, 1.45 * max([1.0, *filter(math.isfinite, values)]))
    axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))


def _ratios(axes: Axes, records: Sequence[Record], phase: Phase) -> None:
    """The figures other than host reads: a line over the keep ratios, and a hollow point for a plan."""
    keep_ratio_axis(axes, records)
    axes.set_ylabel("ratio to the full cache")
    axes.axhline(1.0, color=GREY, linewidth=0.8)
    uniform, plans = uniform_and_plans(records)
    reach = [0.98, 1.02]
    for name, colour, marker, size in _LINES:
        values = [counted_ratio(record, phase, name) for record in records]
        for places, line, face in ((uniform, "-", colour), (plans, "", "none")):
            axes.plot(
                places,
                [values[place] for place in places],
                linestyle=line,
                linewidth=size / 3,
                color=colour,
                marker=marker,
                markersize=size,
                markerfacecolor=face,
            )
        reach += filter(math.isfinite, values)
    room_for_labels(axes, reach, below=0.06, above=0.06)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.5g}")


def _point(record: Record) -> tuple[float, float]:
    return counted_ratio(record, "decode", "moved"), _as_ratio(record.latency.tpot.percent)


def _as_ratio(percent: float) -> float:
    return 1.0 + percent / 100.0


def _draw_points(axes: Axes, records: Sequence[Record]) -> list[Artist]:
    """Draw a point for each record, its colour by keep ratio and its shape by length; returns what a legend needs."""
    ratios = sorted({record.keep_ratio: record for record in records}.values(), key=lambda one: -one.keep_ratio)
    colours = {one.keep_ratio: colour for one, colour in zip(ratios, ratio_colours(ratios), strict=True)}
    lengths = sorted({record.conditions.prompt_tokens for record in records})
    shapes = {length: _MARKERS[place % len(_MARKERS)] for place, length in enumerate(lengths)}
    axes.axline((1.0, 1.0), slope=1.0, linestyle="--", color=GREY, linewidth=1.0)
    for record in records:
        x, y = _point(record)
        low, high = map(_as_ratio, record.latency.tpot.ends)
        axes.errorbar(
            x,
            y,
            yerr=[[y - low], [high - y]],
            fmt=shapes[record.conditions.prompt_tokens],
            markersize=5,
            color=colours[record.keep_ratio],
            ecolor=GREY,
            elinewidth=0.9,
            capsize=2.0,
            markeredgecolor="black",
            markeredgewidth=0.5,
        )
    axes.set_xlabel("bytes moved by a decoded token / full cache")
    axes.set_ylabel("TPOT / full cache")
    axes.margins(0.08)
    axes.grid()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(lambda value, _: f"{value:.5g}")
    handles: list[Artist] = [
        Line2D(
            [],
            [],
            marker="o",
            linestyle="",
            color=colours[ratios[place].keep_ratio],
            label=f"keep {ratios[place].label}",
        )
        for place in labelled_places(ratios, _MOST_NAMED)
    ]
    if len(lengths) > 1:
        step = math.ceil(len(lengths) / _MOST_NAMED)
        handles += [
            Line2D([], [], marker=shapes[length], linestyle="", color=GREY, label=f"{length:,} tokens")
            for length in lengths[::step]
        ]
    return [*handles, Line2D([], [], linestyle="--", color=GREY, linewidth=1.0, label="equal")]

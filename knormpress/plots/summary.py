"""All changes of a sweep side by side as bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from knormpress.compare import Row
from knormpress.intervals import Change
from knormpress.plots.style import (
    GREY,
    HALO,
    add_footer,
    add_heading,
    add_legend,
    labelled_places,
    new_figure,
    pretty,
    ratio_colours,
    room_for_labels,
)

__all__ = ["draw_summary"]

_CUT = 150.0  # %; a PPL many times the baseline's would flatten every other bar
_UPRIGHT_UP_TO = 4
_MOST_LABELS = 10


def draw_summary(rows: Sequence[Row], left_out: str) -> Figure:
    """One group of bars for each metric, one bar for each keep ratio: changes in % with their intervals."""
    metrics = {
        "TTFT\nlower is better": [row.ttft for row in rows],
        "TPOT\nlower is better": [row.tpot for row in rows],
        "throughput\nhigher is better": [row.throughput for row in rows],
        "PPL\nlower is better": [row.ppl for row in rows],
        "cache memory\nlower is better": [row.cache for row in rows],
    }
    reach = [end for changes in metrics.values() for change in changes for end in change.ends]
    figure = new_figure()
    axes = figure.add_axes((0.065, 0.15, 0.92, 0.71))
    add_heading(
        figure,
        "Change against the full cache, by keep ratio",
        "Measured in the same run as the full cache; whiskers are 95 % intervals."
        + (f" Above {_CUT:.0f} % bars and whiskers are cut off (white stroke)." if max(reach) > _CUT else ""),
    )
    width = min(0.84 / len(rows), 0.28)
    upright = len(rows) <= _UPRIGHT_UP_TO
    named = labelled_places(rows, _MOST_LABELS)
    colours = ratio_colours(rows)
    for group, changes in enumerate(metrics.values()):
        for index, change in enumerate(changes):
            place = group + (index - (len(rows) - 1) / 2) * width
            _bar(axes, place, change, width * 0.92, colours[index])
            if index in named:
                _value(axes, place, change, upright=upright)
    axes.axhline(0.0, color=GREY, linewidth=0.8)
    axes.grid(axis="y")
    axes.set_xlim(-0.55, len(metrics) - 0.45)
    axes.set_xticks(range(len(metrics)), list(metrics), fontsize=9)
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("change (%)")
    room = 0.07 if upright else 0.1
    room_for_labels(axes, [0.0, *(min(end, _CUT) for end in reach)], below=room, above=room)
    add_legend(figure, [Patch(color=colours[index], label=f"keep {rows[index].label}") for index in named])
    add_footer(figure, rows, left_out)
    return figure


def _bar(axes: Axes, place: float, change: Change, width: float, colour: Any) -> None:
    low, high = (min(end, _CUT) for end in change.ends)
    height = min(change.percent, _CUT)
    axes.bar(place, height, width, color=colour)
    if change.percent > _CUT:
        axes.plot([place - width / 2, place + width / 2], [_CUT * 0.93, _CUT * 0.96], color="white", linewidth=3)
    elif low < high:
        axes.vlines(place, low, high, color="black", linewidth=1.2)


def _value(axes: Axes, place: float, change: Change, *, upright: bool) -> None:
    low, high = (min(end, _CUT) for end in change.ends)
    down = change.percent < 0
    axes.annotate(
        pretty(str(change).removesuffix(" %")),
        (place, low if down else high),
        xytext=(0, -4 if down else 4),
        textcoords="offset points",
        horizontalalignment="center",
        verticalalignment="top" if down else "bottom",
        rotation=0 if upright else 90,
        fontsize=7.0,
        path_effects=HALO,
    )

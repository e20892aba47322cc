"""All changes of a sweep as bars, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from knormpress.records.schema import Record
from knormpress.show.pictures.style import (
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
    short_name,
)
from knormpress.stats.intervals import Change

__all__ = ["draw_summary"]

_CUT = 150.0  # %; a bar for a huge PPL would make all other bars flat
_UPRIGHT_UP_TO = 4
_MOST_LABELS = 10


def draw_summary(records: Sequence[Record], left_out: str) -> Figure:
    """Draw a group of bars for each metric, with a bar for each keep ratio: changes in % with their intervals."""
    metrics = {
        "TTFT\nlower is better": [record.latency.ttft for record in records],
        "TPOT\nlower is better": [record.latency.tpot for record in records],
        "throughput\nhigher is better": [record.latency.throughput for record in records],
        "PPL\nlower is better": [record.quality.ppl for record in records],
        "cache memory\nlower is better": [record.memory.change for record in records],
    }
    asked = [record.retrieval for record in records if record.retrieval and record.retrieval.items]
    if len(asked) == len(records):
        metrics["items found\nhigher is better"] = [retrieval.change for retrieval in asked]
    reach = [end for changes in metrics.values() for change in changes for end in change.ends]
    figure = new_figure()
    axes = figure.add_axes((0.065, 0.15, 0.92, 0.71))
    add_heading(
        figure,
        "Change against the full cache, by keep ratio",
        "Measured in the same run as the full cache; whiskers are 95 % intervals."
        + (f" Above {_CUT:.0f} % bars and whiskers are cut off (white stroke)." if max(reach) > _CUT else ""),
    )
    width = min(0.84 / len(records), 0.28)
    upright = len(records) <= _UPRIGHT_UP_TO
    named = labelled_places(records, _MOST_LABELS)
    colours = ratio_colours(records)
    for group, changes in enumerate(metrics.values()):
        for index, change in enumerate(changes):
            place = group + (index - (len(records) - 1) / 2) * width
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
    add_legend(figure, [Patch(color=colours[index], label=short_name(records[index])) for index in named])
    add_footer(figure, records, left_out)
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

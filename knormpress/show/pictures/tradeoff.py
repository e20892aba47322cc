"""Speed against quality: one point per keep ratio."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from knormpress.records.schema import Record
from knormpress.show.pictures.style import (
    BAND,
    DPI,
    GREY,
    HALO,
    add_band,
    add_footer,
    add_heading,
    add_legend,
    new_figure,
    panel_figure,
    ratio_colours,
    room_for_labels,
    scale_for,
    uniform_and_plans,
)

__all__ = ["draw_tradeoff", "draw_tradeoff_panel"]

_Extents = NDArray[np.float64]  # x0, y0, x1, y1 in pixels

_MARKER = 9.0  # points


def draw_tradeoff(records: Sequence[Record], left_out: str) -> Figure:
    """Draw the change of PPL over the change of TPOT, with intervals of both, and the target for PPL shaded."""
    figure = new_figure()
    axes = figure.add_axes((0.075, 0.15, 0.905, 0.71))
    logarithmic = _draw_points(axes, records)
    add_heading(
        figure,
        "What speed costs in quality",
        "A point for each keep ratio or plan, against the full cache of the same run; whiskers are 95 % intervals."
        + (" The PPL axis is logarithmic beyond 10 %." if logarithmic else ""),
    )
    points = Line2D(
        [],
        [],
        marker="o",
        linestyle="",
        color=GREY,
        label="keep ratio, or plan, written beside each point",
    )
    add_legend(figure, [points, Patch(color=BAND, label="target: PPL within \N{PLUS-MINUS SIGN}5 %")])
    add_footer(figure, records, left_out)
    _label_points(axes, records)
    return figure


def draw_tradeoff_panel(records: Sequence[Record]) -> Figure:
    """Draw the same as one small panel, without heading, legend and footer."""
    figure, axes = panel_figure()
    _draw_points(axes, records)
    # Labels are placed in pixels, which are known after the layout.
    figure.draw_without_rendering()
    _label_points(axes, records)
    return figure


def _draw_points(axes: Axes, records: Sequence[Record]) -> bool:
    """Draw everything except the labels; returns whether the axis of PPL is logarithmic."""
    changes = [(record.latency.tpot, record.quality.ppl) for record in records]
    reach = [end for _, ppl in changes for end in ppl.ends]
    logarithmic = scale_for(axes, reach)
    add_band(axes)
    axes.axhline(0.0, color=GREY, linewidth=0.8)
    axes.axvline(0.0, color=GREY, linewidth=0.8)
    uniform, plans = uniform_and_plans(records)
    if uniform:
        joined = [_place(records[place]) for place in uniform]
        axes.plot(*zip(*joined, strict=True), color=GREY, linewidth=1, zorder=1)
    for place, ((tpot, ppl), colour) in enumerate(zip(changes, ratio_colours(records), strict=True)):
        (left, right), (low, high) = tpot.ends, ppl.ends
        across, up = tpot.percent, ppl.percent
        axes.errorbar(
            across,
            up,
            xerr=[[across - left], [right - across]],
            yerr=[[up - low], [high - up]],
            fmt="D" if place in plans else "o",
            markersize=_MARKER,
            color=colour,
            ecolor="black",
            elinewidth=1.1,
            markeredgecolor="black",
            markeredgewidth=0.6,
        )
    span = [0.0, *(end for tpot, _ in changes for end in tpot.ends)]
    margin = 0.08 * (max(span) - min(span) or 1.0)
    axes.set_xlim(min(span) - margin, max(span) + margin)
    room_for_labels(axes, [-5.0, 5.0, *reach], below=0.08, above=0.12)
    axes.grid()
    axes.set_xlabel("TPOT change (%), lower is better")
    axes.set_ylabel("PPL change (%), lower is better")
    return logarithmic


def _place(record: Record) -> tuple[float, float]:
    return record.latency.tpot.percent, record.quality.ppl.percent


def _label_points(axes: Axes, records: Sequence[Record]) -> None:
    """Label every point, at the nearest place free of points, whiskers, lines and other labels."""
    taken = [box for record in records for box in _point_boxes(axes, record)] + _line_boxes(
        axes, [records[place] for place in uniform_and_plans(records)[0]]
    )
    frame = np.array(axes.get_window_extent().extents)
    for record in records:
        label = axes.annotate(
            record.row,
            _place(record),
            xytext=(0, 0),
            textcoords="offset points",
            horizontalalignment="center",
            verticalalignment="center",
            fontsize=10,
            fontweight="bold",
            path_effects=HALO,
        )
        at_point = np.array(label.get_window_extent().padded(4).extents)
        area = float(np.prod(at_point[2:] - at_point[:2]))
        costs, spots = [], list(_spots())
        for spot in spots:
            box = at_point + np.tile(np.multiply(spot, DPI / 72), 2)
            costs.append(_overlap(box, np.array(taken)) + area - _overlap(box, frame[None]))
        best = int(np.argmin(np.round(costs)))
        label.set_position(spots[best])
        taken.append(at_point + np.tile(np.multiply(spots[best], DPI / 72), 2))


def _spots() -> Iterator[tuple[float, float]]:
    for distance in (16.0, 24.0, 34.0, 46.0, 60.0):
        for degrees in (45, 135, -45, -135, 90, -90, 0, 180):
            yield distance * math.cos(math.radians(degrees)) * 1.2, distance * math.sin(math.radians(degrees))


def _point_boxes(axes: Axes, record: Record) -> list[_Extents]:
    (left, right), (low, high) = record.latency.tpot.ends, record.quality.ppl.ends
    x, y = axes.transData.transform(_place(record))
    (x0, y0), (x1, y1) = axes.transData.transform([(left, low), (right, high)])
    half = _MARKER / 2 * DPI / 72
    return [
        np.array((x - half, y - half, x + half, y + half)),
        np.array((x0 - 2, y - 7, x1 + 2, y + 7)),
        np.array((x - 7, y0 - 2, x + 7, y1 + 2)),
    ]


def _line_boxes(axes: Axes, records: Sequence[Record]) -> list[_Extents]:
    places = axes.transData.transform(list(map(_place, records))) if records else ()
    boxes: list[_Extents] = []
    for start, end in itertools.pairwise(places):
        steps = 1 + int(max(abs(end - start)) / 6)
        boxes += [np.array((x - 3, y - 3, x + 3, y + 3)) for x, y in np.linspace(start, end, steps)]
    return boxes


def _overlap(box: _Extents, others: _Extents) -> float:
    """The summed area that a box shares with other boxes, each (x0, y0, x1, y1)."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return float(np.prod(np.clip(sides, 0.0, None), axis=1).sum())

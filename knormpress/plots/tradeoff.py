"""Speed against quality: one point a keep ratio."""

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

from knormpress.compare import Row
from knormpress.plots.style import (
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
)

__all__ = ["draw_tradeoff", "draw_tradeoff_panel"]

_Extents = NDArray[np.float64]  # x0, y0, x1, y1 in pixels

_MARKER = 9.0  # points


def draw_tradeoff(rows: Sequence[Row], left_out: str) -> Figure:
    """The change in TPOT across, the change in PPL upward, with intervals both ways and the target for PPL shaded."""
    figure = new_figure()
    axes = figure.add_axes((0.075, 0.15, 0.905, 0.71))
    logarithmic = _draw_points(axes, rows)
    add_heading(
        figure,
        "What speed costs in quality",
        "Each point is one keep ratio against the full cache measured in the same run; whiskers are 95 % intervals."
        + (" The PPL axis is logarithmic beyond 10 %." if logarithmic else ""),
    )
    points = Line2D([], [], marker="o", linestyle="", color=GREY, label="keep ratio, written beside each point")
    add_legend(figure, [points, Patch(color=BAND, label="target: PPL within \N{PLUS-MINUS SIGN}5 %")])
    add_footer(figure, rows, left_out)
    _label_points(axes, rows)
    return figure


def draw_tradeoff_panel(rows: Sequence[Row]) -> Figure:
    """The same as one small panel, without heading, legend and footer."""
    figure, axes = panel_figure()
    _draw_points(axes, rows)
    # Labels look for room in pixels, which the layout decides.
    figure.draw_without_rendering()
    _label_points(axes, rows)
    return figure


def _draw_points(axes: Axes, rows: Sequence[Row]) -> bool:
    """Everything but the labels; returns whether the axis of PPL is logarithmic."""
    reach = [end for row in rows for end in row.ppl.ends]
    logarithmic = scale_for(axes, reach)
    add_band(axes)
    axes.axhline(0.0, color=GREY, linewidth=0.8)
    axes.axvline(0.0, color=GREY, linewidth=0.8)
    axes.plot([row.tpot.percent for row in rows], [row.ppl.percent for row in rows], color=GREY, linewidth=1, zorder=1)
    for row, colour in zip(rows, ratio_colours(rows), strict=True):
        (left, right), (low, high) = row.tpot.ends, row.ppl.ends
        across, up = row.tpot.percent, row.ppl.percent
        axes.errorbar(
            across,
            up,
            xerr=[[across - left], [right - across]],
            yerr=[[up - low], [high - up]],
            fmt="o",
            markersize=_MARKER,
            color=colour,
            ecolor="black",
            elinewidth=1.1,
            markeredgecolor="black",
            markeredgewidth=0.6,
        )
    span = [0.0, *(end for row in rows for end in row.tpot.ends)]
    margin = 0.08 * (max(span) - min(span) or 1.0)
    axes.set_xlim(min(span) - margin, max(span) + margin)
    room_for_labels(axes, [-5.0, 5.0, *reach], below=0.08, above=0.12)
    axes.grid()
    axes.set_xlabel("TPOT change (%), further left is faster")
    axes.set_ylabel("PPL change (%), lower is better")
    return logarithmic


def _label_points(axes: Axes, rows: Sequence[Row]) -> None:
    """Name every point, each label at the nearest spot that is clear of points, whiskers, lines and other labels."""
    taken = [box for row in rows for box in _point_boxes(axes, row)] + _line_boxes(axes, rows)
    frame = np.array(axes.get_window_extent().extents)
    for row in rows:
        label = axes.annotate(
            row.label,
            (row.tpot.percent, row.ppl.percent),
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


def _point_boxes(axes: Axes, row: Row) -> list[_Extents]:
    (left, right), (low, high) = row.tpot.ends, row.ppl.ends
    x, y = axes.transData.transform((row.tpot.percent, row.ppl.percent))
    (x0, y0), (x1, y1) = axes.transData.transform([(left, low), (right, high)])
    half = _MARKER / 2 * DPI / 72
    return [
        np.array((x - half, y - half, x + half, y + half)),
        np.array((x0 - 2, y - 7, x1 + 2, y + 7)),
        np.array((x - 7, y0 - 2, x + 7, y1 + 2)),
    ]


def _line_boxes(axes: Axes, rows: Sequence[Row]) -> list[_Extents]:
    places = axes.transData.transform([(row.tpot.percent, row.ppl.percent) for row in rows])
    boxes: list[_Extents] = []
    for start, end in itertools.pairwise(places):
        steps = 1 + int(max(abs(end - start)) / 6)
        boxes += [np.array((x - 3, y - 3, x + 3, y + 3)) for x, y in np.linspace(start, end, steps)]
    return boxes


def _overlap(box: _Extents, others: _Extents) -> float:
    """The area that a box shares with others, each (x0, y0, x1, y1): summed over them."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return float(np.prod(np.clip(sides, 0.0, None), axis=1).sum())

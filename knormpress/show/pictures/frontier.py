"""The cost of each policy of a plan's frontier: perplexity, and what is found if asked, over the mean keep ratio."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from knormpress.records.plan import Plan, Point
from knormpress.show.pictures.plan_footer import add_plan_footer, target_words
from knormpress.show.pictures.style import (
    BAND,
    BLUE,
    DPI,
    GREEN,
    GREY,
    HALO,
    ORANGE,
    RED,
    add_heading,
    new_figure,
    plain,
    pretty,
    room_for_labels,
    scale_for,
    shortened,
)

__all__ = ["draw_frontier"]

_SKY, _PURPLE, _DARK = "#56B4E9", "#CC79A7", "#004466"
_LOOKS = {
    "tuned": (BLUE, "o", "-"),
    "tuned for perplexity": (_SKY, "s", "--"),
    "uniform": (ORANGE, "D", "-"),
    "random": (GREY, "X", ":"),
    "recent-window": ("#8C6D1F", "^", "--"),
    "keydiff": (_PURPLE, "v", "-"),
    "highest-norm": (RED, "P", ":"),
}
_OTHER_LOOKS = list(zip((_PURPLE, RED, _SKY, ORANGE, GREY, BLUE), itertools.cycle("<>phd"), itertools.repeat("-.")))
_MOST_LETTERS = 24
_LEFT, _WIDTH = 0.07, 0.71
# Possible places of the star's label: points from the star to the label's middle, best first.
_SPOTS = [
    (x * far, y * far)
    for far in (1.0, 1.5, 2.2, 3.2)
    for x, y in ((-36, -13), (36, 13), (36, -13), (-36, 13), (0, -20), (0, 20))
]

_Looks = dict[str, tuple[str, str, str]]


def draw_frontier(plan: Plan, points: Sequence[Point]) -> Figure:
    """Draw the change of perplexity over the mean keep ratio, a line for each name; below it the share that is found.

    The targets are drawn too, and the plan itself as a star. ``points`` are the plan's points, at least one.
    """
    looks = _looks_of(points)
    tested = [point for point in points if point.found and point.found[1]]
    own = _of_plan(plan, points)
    figure = new_figure()
    axes = figure.add_axes((_LEFT, 0.385, _WIDTH, 0.5) if tested else (_LEFT, 0.13, _WIDTH, 0.755))
    handles: list[Line2D] = []
    logarithmic = _draw_perplexity(axes, points, looks, plan.targets.ppl, handles)
    lowest = axes
    if tested:
        lowest = figure.add_axes((_LEFT, 0.13, _WIDTH, 0.205), sharex=axes)
        axes.tick_params(labelbottom=False)
        _draw_found(lowest, tested, looks, plan)
    lowest.set_xlabel("mean keep ratio (further left: a smaller cache)")
    label = "target: " + "\nand ".join(target_words(plan))
    handles.append(Line2D([], [], color=GREEN, linestyle="--", linewidth=1.2, label=label))
    if own is not None:
        handles.append(_draw_star(axes, own.mean_keep, own.ppl[0], label=_own_words(own)))
        if own in tested:
            _draw_star(lowest, own.mean_keep, _found_percent(own), label="")
        _name_star(axes, own, points)
    add_heading(
        figure,
        "What a smaller cache costs, by policy",
        "Each point is one policy against the full cache, on documents that the search did not use; "
        "whiskers are 95 % intervals." + (" The PPL axis is logarithmic beyond 10 %." if logarithmic else ""),
    )
    legend = figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.79, 0.9), fontsize=8.5, labelspacing=0.9, handlelength=2.4
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    add_plan_footer(figure, plan)
    return figure


def _looks_of(points: Sequence[Point]) -> _Looks:
    """Colour, marker and dashes of each name, in the order of the legend; known names look the same in all plans."""
    names = dict.fromkeys(point.name for point in points)
    others = zip((name for name in names if name not in _LOOKS), itertools.cycle(_OTHER_LOOKS), strict=False)
    return {**{name: look for name, look in _LOOKS.items() if name in names}, **dict(others)}


def _of_plan(plan: Plan, points: Sequence[Point]) -> Point | None:
    """The plan's own point, even if other methods were measured with the same policy."""
    own = [point for point in points if point.press == plan.press]
    return next((point for name in _LOOKS for point in own if point.name == name), own[0] if own else None)


def _found_percent(point: Point) -> float:
    return 100.0 * point.share


def _own_words(own: Point) -> str:
    percent, low, high = (f"{value:+.1f}" for value in own.ppl)
    lines = [f"this plan: keeps {own.mean_keep:.3f}", f"PPL {percent} %", f"({low} to {high})"]
    if own.found:
        lines.append(f"found {own.found[0]} of {own.found[1]}")
    return pretty("\n".join(lines))


def _draw_perplexity(axes: Axes, points: Sequence[Point], looks: _Looks, target: float, handles: list[Line2D]) -> bool:
    """Draw lines, whiskers and target, and add to ``handles``; returns whether the axis is logarithmic."""
    reach = [0.0, *(end for point in points for end in point.ppl), target]
    logarithmic = scale_for(axes, reach)
    if not logarithmic:
        axes.yaxis.set_major_formatter(lambda value, _: pretty(f"{value:g}"))
    # The plan's own line is drawn last, over the others.
    for name, look in reversed(looks.items()):
        named = _named(points, name)
        keeps = [point.mean_keep for point in named]
        middles = [(point.ppl[1] + point.ppl[2]) / 2 for point in named]
        halves = [abs(point.ppl[2] - point.ppl[1]) / 2 for point in named]
        axes.errorbar(keeps, middles, yerr=halves, fmt="none", ecolor=look[0], elinewidth=1.1, zorder=2)
        handles.insert(0, _draw_line(axes, name, keeps, [point.ppl[0] for point in named], look))
    keeps = [point.mean_keep for point in points]
    margin = 0.05 * (max(keeps) - min(keeps)) or 0.05
    axes.set_xlim(min(keeps) - margin, max(keeps) + margin)
    room_for_labels(axes, reach, below=0.1, above=0.05)
    axes.axhline(0.0, color=GREY, linewidth=0.8, zorder=1)
    _draw_target(axes, target, axes.get_ylim()[0])
    axes.set_ylabel("PPL change (%), lower is better")
    axes.grid()
    return logarithmic


def _draw_found(axes: Axes, points: Sequence[Point], looks: _Looks, plan: Plan) -> None:
    for name, look in reversed(looks.items()):
        named = _named(points, name)
        keeps = [point.mean_keep for point in named]
        _draw_line(axes, name, keeps, list(map(_found_percent, named)), look)
        for point in named:
            if point.ends:
                low, high = (100 * end for end in point.ends)
                axes.vlines(point.mean_keep, low, high, look[0], linewidth=1.1, zorder=2)
    axes.set_ylim(-6.0, 106.0)
    axes.set_yticks([0, 25, 50, 75, 100])
    if plan.targets.retrieval is not None:
        _draw_target(axes, 100 * plan.targets.retrieval, 106.0)
    axes.set_ylabel(f"{plan.items} found (%)")
    axes.grid()


def _named(points: Sequence[Point], name: str) -> list[Point]:
    return sorted((point for point in points if point.name == name), key=lambda point: point.mean_keep)


def _draw_line(
    axes: Axes, name: str, across: Sequence[float], up: Sequence[float], look: tuple[str, str, str]
) -> Line2D:
    colour, marker, dashes = look
    label = shortened(plain(name), _MOST_LETTERS)
    (line,) = axes.plot(
        across,
        up,
        marker=marker,
        linestyle=dashes,
        color=colour,
        linewidth=1.4,
        markersize=6.0,
        markeredgecolor="white",
        markeredgewidth=0.6,
        zorder=3,
        # matplotlib leaves labels that begin with an underscore out of the legend.
        label=f" {label}" if label.startswith("_") else label,
    )
    return line


def _draw_target(axes: Axes, target: float, best: float) -> None:
    axes.axhspan(target, best, color=BAND, zorder=0, linewidth=0)
    axes.axhline(target, color=GREEN, linestyle="--", linewidth=1.2, zorder=1.5)


def _draw_star(axes: Axes, keep: float, height: float, label: str) -> Line2D:
    style: dict[str, Any] = {"markersize": 15.0, "markeredgecolor": "white", "markeredgewidth": 0.9, "zorder": 4}
    (star,) = axes.plot([keep], [height], "*", color=_DARK, label=label, **style)
    return star


def _name_star(axes: Axes, own: Point, points: Sequence[Point]) -> None:
    """Write a label beside the star, at the first place free of lines, whiskers and the frame."""
    label = axes.annotate(
        "this plan",
        (own.mean_keep, own.ppl[0]),
        xytext=(0, 0),
        textcoords="offset points",
        horizontalalignment="center",
        verticalalignment="center",
        fontsize=9.5,
        fontweight="bold",
        color=_DARK,
        path_effects=HALO,
    )
    drawn = _drawn_places(axes, points)
    low, high = axes.get_window_extent().get_points()
    corners = label.get_window_extent().padded(4).get_points()

    def overlap(spot: tuple[float, float]) -> int:
        first, last = corners + np.multiply(spot, DPI / 72)
        outside = (first < low).any() or (last > high).any()
        return int(((drawn > first) & (drawn < last)).all(axis=1).sum()) + len(drawn) * int(outside)

    label.set_position(min(_SPOTS, key=overlap))


def _drawn_places(axes: Axes, points: Sequence[Point]) -> NDArray[np.float64]:
    """Closely spaced pixels along every line and whisker, (places, 2)."""
    ends = [((point.mean_keep, point.ppl[1]), (point.mean_keep, point.ppl[2])) for point in points]
    for name in dict.fromkeys(point.name for point in points):
        places = [(point.mean_keep, point.ppl[0]) for point in _named(points, name)]
        ends += [(place, place) for place in places] + list(itertools.pairwise(places))
    pixels = axes.transData.transform(np.array(ends).reshape(-1, 2)).reshape(-1, 2, 2)
    return np.concatenate([np.linspace(start, end, 1 + int(abs(end - start).max() / 4)) for start, end in pixels])

"""One figure of every test over the stored runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from knormpress.show.pictures.style import BLUE, GREEN, GREY, HALO, ORANGE, RED, panel_figure, plain, pretty

__all__ = ["Course", "draw_history"]

_COLOURS = (BLUE, ORANGE, GREEN, "#56B4E9", "#CC79A7")
_MARKERS = "os^Dv"
_MOST_LABELS = 6


@dataclass(frozen=True)
class Course:
    """One test: its number, a value for each run (NaN if it has none), and the runs where it regressed or stepped."""

    number: int
    values: Sequence[float]
    regressed: Collection[int]
    steps: Collection[int] = ()


def draw_history(courses: Sequence[Course], runs: Sequence[str], label: str, level: float) -> Figure:
    """Draw a line for each test over ``runs``, with its number at its end, rings at regressed points and bars at steps.

    Args:
        courses: the tests, each with at least one finite value.
        runs: a short name for each run, oldest first.
        label: the name of the figure.
        level: the value that means no difference to the full cache.
    """
    figure, axes = panel_figure()
    axes.axhline(level, color=GREY, linewidth=0.8, linestyle="--")
    for place, course in enumerate(courses):
        look = f"{_MARKERS[place // len(_COLOURS) % len(_MARKERS)]}-"
        colour = _COLOURS[place % len(_COLOURS)]
        measured = [run for run, value in enumerate(course.values) if math.isfinite(value)]
        axes.plot(measured, [course.values[run] for run in measured], look, color=colour, linewidth=1.2, markersize=3.5)
        bad = [run for run in measured if run in course.regressed]
        axes.plot(bad, [course.values[run] for run in bad], "o", markersize=10, markerfacecolor="none", color=RED)
        steps = [run for run in measured if run in course.steps]
        axes.plot(steps, [course.values[run] for run in steps], "|", markersize=16, markeredgewidth=1.5, color=colour)
    step = math.ceil(len(runs) / _MOST_LABELS)
    axes.set_xticks(range(0, len(runs), step), [plain(run) for run in runs[::step]])
    axes.set_xlim(-0.5, (len(runs) - 1) * 1.08 + 0.5)
    axes.set_title(label)
    axes.set_xlabel("commit, oldest first; ringed: regressed; bar: a step")
    axes.grid(axis="y")
    axes.margins(y=0.12)
    axes.yaxis.set_major_formatter(lambda value, _: pretty(f"{value:g}"))
    figure.draw_without_rendering()
    _number_ends(axes, courses)
    return figure


def _number_ends(axes: Axes, courses: Sequence[Course]) -> None:
    """Write each line's number at its end; lines that end at the same place share a label."""
    ends = []
    for course in courses:
        run = max(run for run, value in enumerate(course.values) if math.isfinite(value))
        x, y = axes.transData.transform((run, course.values[run]))
        ends.append((float(np.round(x)), float(y), course.number))
    to_data = axes.transData.inverted()
    for _, at_run in itertools.groupby(sorted(ends), key=lambda end: end[0]):
        together: list[list[tuple[float, float, int]]] = []
        for end in at_run:
            if together and end[1] - together[-1][-1][1] < 16:
                together[-1].append(end)
            else:
                together.append([end])
        for group in together:
            x, y = to_data.transform((group[0][0], sum(end[1] for end in group) / len(group)))
            numbers = ", ".join(str(number) for number in sorted(end[2] for end in group))
            axes.annotate(
                numbers if len(group) <= 4 else f"{len(group)} tests",
                (x, y),
                xytext=(6, 0),
                textcoords="offset points",
                verticalalignment="center",
                fontsize=7.5,
                path_effects=HALO,
            )

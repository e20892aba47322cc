"""The four pictures of a sweep and the three of a plan.

Drawn without pyplot: no window is opened, and the user's own style stays as it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from matplotlib import style as matplotlib_style
from matplotlib.figure import Figure

from knormpress.compare import Row, differences, group_rows, setting
from knormpress.errors import KnormError
from knormpress.plan import Plan
from knormpress.plots.comprehensive import draw_comprehensive
from knormpress.plots.frontier import draw_frontier
from knormpress.plots.kept import draw_kept
from knormpress.plots.sensitivities import draw_sensitivities
from knormpress.plots.style import DPI, STYLE
from knormpress.plots.summary import draw_summary
from knormpress.plots.table import draw_table
from knormpress.plots.tradeoff import draw_tradeoff

__all__ = ["draw_all", "draw_plan", "select"]

_NEVER_MIXED = ("model", "dtype", "text", "device", "threads")


def draw_all(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Draw the four pictures into ``folder`` and return their paths.

    Each is 1600 pixels wide and 1000 high, but for the table, whose height follows its rows. A picture is written
    beside its place and renamed, so that a file of that name is always whole.

    Raises:
        KnormError: there are no rows, or rows that can't share a picture; nothing is written.
    """
    rows = list(rows)
    shown, left_out = select(rows)
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib_style.context(["default", STYLE]):
        pictures = {
            "knormpress_comprehensive.png": draw_comprehensive(shown, left_out),
            "knormpress_summary.png": draw_summary(shown, left_out),
            "knormpress_tradeoff.png": draw_tradeoff(shown, left_out),
            "knormpress_table.png": draw_table(shown, left_out, beside=rows),
        }
        return [_save(picture, folder / name) for name, picture in pictures.items()]


def draw_plan(plan: Plan, folder: Path) -> list[Path]:
    """Draw what ``plan`` holds into ``folder`` and return the paths: frontier, sensitivities and kept tokens.

    Each is 1600 pixels wide and 1000 high, and written as ``draw_all`` does. What the plan lacks has no picture.

    Raises:
        KnormError: the plan holds none of them, or its policy does not fit its layers; nothing is written.
    """
    with matplotlib_style.context(["default", STYLE]):
        pictures = {}
        if plan.frontier:
            pictures["knormpress_frontier.png"] = draw_frontier(plan, plan.frontier)
        if plan.sensitivities and plan.sensitivities.text:
            pictures["knormpress_sensitivities.png"] = draw_sensitivities(plan, plan.sensitivities)
        if plan.kept and plan.kept.tokens:
            pictures["knormpress_kept.png"] = draw_kept(plan, plan.kept)
        if not pictures:
            raise KnormError("the plan holds nothing that was measured, so there is nothing to draw: knormpress tune")
        folder.mkdir(parents=True, exist_ok=True)
        return [_save(picture, folder / name) for name, picture in pictures.items()]


def select(rows: Iterable[Row]) -> tuple[list[Row], str]:
    """The rows that the pictures show, falling in keep ratio, and a note of what they leave out.

    Of several methods ``knorm`` is shown, of several kinds of ratio the one for all layers, of several prompt lengths
    the longest.

    Raises:
        KnormError: there are no rows, or they differ in anything else.
    """
    rows = list(rows)
    if not rows:
        raise KnormError("there are no records to draw; measure first, for example with: knormpress sweep")
    _refuse({name: values for name, values in differences(rows).items() if name in _NEVER_MIXED})
    notes = []
    for name, best in (
        ("method", lambda value: (value == "knorm", value != "full")),
        ("kind of ratio", lambda value: value == "one for all layers"),
        ("prompt tokens", lambda value: value),
    ):
        values = differences(rows).get(name, [])
        if values:
            chosen = max(values, key=best)
            rows = [row for row in rows if setting(row)[name] == chosen]
            notes.append(f"{name} {', '.join(str(value) for value in values if value != chosen)}")
    _refuse(differences(rows))
    return group_rows(rows)[0], f"measured but not shown: {'; '.join(notes)}" if notes else ""


def _refuse(mixed: dict[str, list[object]]) -> None:
    if mixed:
        found = "; ".join(f"{name}: {' and '.join(map(str, values))}" for name, values in mixed.items())
        raise KnormError(
            f"the records differ in more than the keep ratio ({found}), and one picture can't show both; "
            "draw from a file that holds the records of one setting, or start over with --fresh"
        )


def _save(figure: Figure, path: Path) -> Path:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(beside, format="png", dpi=DPI)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path

"""The four pictures of a sweep and the three of a plan.

Drawn without pyplot: no window is opened, and the user's own style stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib import style as matplotlib_style
from matplotlib.figure import Figure

from knormpress.compare import Row, differences, group_rows, setting
from knormpress.errors import KnormError
from knormpress.files import replacing
from knormpress.plan import Plan
from knormpress.plots.comprehensive import draw_comprehensive
from knormpress.plots.frontier import draw_frontier
from knormpress.plots.kept import draw_kept
from knormpress.plots.scaling import draw_scaling
from knormpress.plots.sensitivities import draw_sensitivities
from knormpress.plots.style import DPI, STYLE
from knormpress.plots.summary import draw_summary
from knormpress.plots.table import draw_table
from knormpress.plots.tradeoff import draw_tradeoff

__all__ = ["draw_all", "draw_plan", "select", "select_lengths"]

_NEVER_MIXED = ("model", "dtype", "text", "device", "threads")
# The most tokens that can be scored may follow from the length, so one with fewer is still comparable in its times.
_FOLLOWS_LENGTH = ("prompt tokens", "context tokens", "scored tokens")


def draw_all(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Draw the pictures into ``folder`` and return their paths: four, and a fifth of records of several prompt lengths.

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
        lengths, left_out = select_lengths(rows)
        if lengths:
            pictures["knormpress_scaling.png"] = draw_scaling(lengths, left_out)
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
    rows, notes = _of_one_method(rows)
    longest = max(map(_length, rows))
    shorter = sorted({_length(row) for row in rows} - {longest})
    rows = [row for row in rows if _length(row) == longest]
    _refuse(differences(rows))
    return group_rows(rows)[0], _note(notes, shorter)


def select_lengths(rows: Iterable[Row]) -> tuple[list[Row], str]:
    """The rows of every prompt length that ``draw_scaling`` shows, and a note of what it leaves out.

    They are those that ``select`` finds at the longest length, and those of other lengths that differ from them in
    nothing but the length and how many tokens could be scored behind it. No rows where that leaves a single length.

    Raises:
        KnormError: as ``select``.
    """
    rows = list(rows)
    wanted = _beside_length(select(rows)[0][0])
    rows, notes = _of_one_method(rows)
    cells = {
        (_length(row), row.record.policy.layer_keep_ratios or row.keep_ratio): row
        for row in rows
        if _beside_length(row) == wanted
    }
    shown = {length for length, _ in cells}
    others = sorted({_length(row) for row in rows} - shown)
    return (list(cells.values()), _note(notes, others)) if len(shown) > 1 else ([], "")


def _of_one_method(rows: Iterable[Row]) -> tuple[list[Row], list[str]]:
    """The rows of the method and the kind of ratio that are shown, and a note for each that is not."""
    rows = list(rows)
    if not rows:
        raise KnormError("there are no records to draw; measure first, for example with: knormpress sweep")
    _refuse({name: values for name, values in differences(rows).items() if name in _NEVER_MIXED})
    notes = []
    for name, best in (
        ("method", lambda value: (value == "knorm", value != "full")),
        ("kind of ratio", lambda value: value == "one for all layers"),
    ):
        values = differences(rows).get(name, [])
        if values:
            chosen = max(values, key=best)
            rows = [row for row in rows if setting(row)[name] == chosen]
            notes.append(f"{name} {', '.join(str(value) for value in values if value != chosen)}")
    return rows, notes


def _length(row: Row) -> int:
    return row.record.conditions.prompt_tokens


def _beside_length(row: Row) -> dict[str, object]:
    return {name: value for name, value in setting(row).items() if name not in _FOLLOWS_LENGTH}


def _note(notes: Sequence[str], lengths: Sequence[int]) -> str:
    if lengths:
        notes = [*notes, f"prompt tokens {', '.join(map(str, lengths))}"]
    return f"measured but not shown: {'; '.join(notes)}" if notes else ""


def _refuse(mixed: dict[str, list[object]]) -> None:
    if mixed:
        found = "; ".join(f"{name}: {' and '.join(map(str, values))}" for name, values in mixed.items())
        raise KnormError(
            f"the records differ in more than the keep ratio ({found}), and one picture can't show both; "
            "draw from a file that holds the records of one setting, or start over with --fresh"
        )


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=DPI)
    return path

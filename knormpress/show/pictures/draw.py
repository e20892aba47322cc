"""Draw the pictures of a sweep and of a plan.

This does not use pyplot, so it opens no window and does not change the user's style.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib import style as matplotlib_style
from matplotlib.figure import Figure

from knormpress.compare.settings import differences, group_records, newest, setting
from knormpress.errors import KnormError
from knormpress.files import make_folder, writing
from knormpress.records.plan import Plan
from knormpress.records.schema import Record
from knormpress.show.pictures.comprehensive import draw_comprehensive
from knormpress.show.pictures.cost import draw_cost
from knormpress.show.pictures.frontier import draw_frontier
from knormpress.show.pictures.kept import draw_kept
from knormpress.show.pictures.retrieval import draw_retrieval
from knormpress.show.pictures.scaling import draw_scaling
from knormpress.show.pictures.sensitivities import draw_sensitivities
from knormpress.show.pictures.style import DPI, STYLE
from knormpress.show.pictures.summary import draw_summary
from knormpress.show.pictures.table import draw_table
from knormpress.show.pictures.tradeoff import draw_tradeoff

__all__ = ["draw_all", "draw_plan", "select", "select_counted", "select_lengths", "select_with_plans"]

_NEVER_MIXED = ("model", "dtype", "text", "device", "threads")
# The number of scored tokens may depend on the length; records that differ in it still have comparable times.
_FOLLOWS_LENGTH = ("prompt tokens", "context tokens", "scored tokens")


def draw_all(records: Iterable[Record], folder: Path) -> list[Path]:
    """Draw the pictures into ``folder`` and return their paths.

    There are four; one more if something was asked (retrieval), one if there are several prompt lengths, and one if
    the cost was counted.

    Each is 1600 pixels wide and 1000 high, except for the table, whose height depends on its records. A file is never
    left half written.

    Raises:
        KnormError: there are no records, or records that can't share a picture; nothing is written.
    """
    records = list(records)
    shown, left_out = select_with_plans(records)
    make_folder(folder)
    with matplotlib_style.context(["default", STYLE]):
        pictures = {
            "knormpress_comprehensive.png": draw_comprehensive(shown, left_out),
            "knormpress_summary.png": draw_summary(shown, left_out),
            "knormpress_tradeoff.png": draw_tradeoff(shown, left_out),
            "knormpress_table.png": draw_table(shown, left_out, beside=records),
        }
        if any(record.retrieval and record.retrieval.items for record in shown):
            pictures["knormpress_retrieval.png"] = draw_retrieval(shown, left_out)
        lengths, left_out = select_lengths(records)
        if lengths:
            pictures["knormpress_scaling.png"] = draw_scaling(lengths, left_out)
        counted, timed, left_out = select_counted(records)
        if counted:
            pictures["knormpress_cost.png"] = draw_cost(counted, timed, left_out)
        return [_save(picture, folder / name) for name, picture in pictures.items()]


def draw_plan(plan: Plan, folder: Path) -> list[Path]:
    """Draw frontier, sensitivities and kept tokens of ``plan`` into ``folder``, and return the paths.

    Each is 1600 pixels wide and 1000 high. There is no picture of what the plan does not contain.

    Raises:
        KnormError: the plan contains none of them, or its policy has the wrong number of layers; nothing is written.
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
            raise KnormError("the plan has no measurements to draw; make it again: knormpress tune")
        make_folder(folder)
        return [_save(picture, folder / name) for name, picture in pictures.items()]


def select(records: Iterable[Record]) -> tuple[list[Record], str]:
    """The records to show, from the highest keep ratio down, and a note about records that are left out.

    Of several methods ``knorm`` is shown; of several kinds of ratio, the one for all layers; of several ways of the
    prompt, the full cache's; of several prompt lengths, the longest.

    Raises:
        KnormError: there are no records, or they differ in anything else.
    """
    records, notes = _of_one_method(records)
    longest = max(map(_length, records))
    shorter = sorted({_length(record) for record in records} - {longest})
    records = [record for record in records if _length(record) == longest]
    _refuse(differences(records))
    return group_records(records)[0], _note(notes, shorter)


def select_with_plans(records: Iterable[Record]) -> tuple[list[Record], str]:
    """The records of ``select``, and after them the plans that were measured beside them; a note as ``select``.

    Raises:
        KnormError: as ``select``.
    """
    records = newest(records)
    shown, left_out = select(records)
    beside = next(group for group in group_records(records) if any(record is shown[0] for record in group))
    plans = [record for record in beside if record.policy.layer_keep_ratios and not record.way]
    plans = [plan for plan in plans if all(plan is not record for record in shown)]
    if not plans:
        return shown, left_out
    rest = [record for record in records if all(record is not plan for plan in plans)]
    return [*shown, *plans], select(rest)[1]


def select_lengths(records: Iterable[Record]) -> tuple[list[Record], str]:
    """The records of all prompt lengths that ``draw_scaling`` shows, and a note about records that are left out.

    These are the records of ``select``, and those that differ from them only in length and in the number of scored
    tokens. There are none if only one length is left.

    Raises:
        KnormError: as ``select``.
    """
    records = list(records)
    wanted = _without_length(select(records)[0][0])
    records, notes = _of_one_method(records)
    cells = {
        (_length(record), record.policy.layer_keep_ratios or record.keep_ratio): record
        for record in records
        if _without_length(record) == wanted
    }
    shown = {length for length, _ in cells}
    others = sorted({_length(record) for record in records} - shown)
    return (list(cells.values()), _note(notes, others)) if len(shown) > 1 else ([], "")


def select_counted(records: Iterable[Record]) -> tuple[list[Record], list[Record], str]:
    """The records whose counted cost is shown, those whose cost is compared with their time, and a note as ``select``.

    Compared are the records of ``select_lengths``, or of ``select`` if there is one length, that have a cost. Those of
    the longest prompt are shown, from the highest keep ratio down, with the plans that were counted beside them. There
    are none if no cost was counted.

    Raises:
        KnormError: as ``select``.
    """
    records = list(records)
    timed = [record for record in select_lengths(records)[0] or select(records)[0] if record.cost]
    if not timed:
        return [], [], ""
    longest = max(timed, key=_length)
    beside = next(group for group in group_records(records) if any(record is longest for record in group))
    shown = [record for record in beside if record.cost]
    plans = {id(record) for record in shown} - set(map(id, timed))
    rest = [record for record in records if id(record) not in plans]
    lengths, left_out = select_lengths(rest)
    return shown, timed, left_out if lengths else select(rest)[1]


def _of_one_method(records: Iterable[Record]) -> tuple[list[Record], list[str]]:
    """The records of the method and the kind of ratio to show, and a note for each that is left out."""
    records = newest(records)
    if not records:
        raise KnormError("there are no records to draw; measure first, for example with: knormpress sweep")
    _refuse({name: values for name, values in differences(records).items() if name in _NEVER_MIXED})
    notes = []
    for name, best in (
        ("method", lambda value: (value == "knorm", value != "full")),
        ("way of the prompt", lambda value: value == "whole"),
        ("kind of ratio", lambda value: value == "one for all layers"),
    ):
        values = differences(records).get(name, [])
        if values:
            chosen = max(values, key=best)
            records = [record for record in records if setting(record)[name] == chosen]
            notes.append(f"{name} {', '.join(str(value) for value in values if value != chosen)}")
    return records, notes


def _length(record: Record) -> int:
    return record.conditions.prompt_tokens


def _without_length(record: Record) -> dict[str, object]:
    return {name: value for name, value in setting(record).items() if name not in _FOLLOWS_LENGTH}


def _note(notes: Sequence[str], lengths: Sequence[int]) -> str:
    if lengths:
        notes = [*notes, f"prompt tokens {', '.join(map(str, lengths))}"]
    return f"measured but not shown: {'; '.join(notes)}" if notes else ""


def _refuse(mixed: dict[str, list[object]]) -> None:
    if mixed:
        named = "; ".join(f"{name}: {' and '.join(map(str, values))}" for name, values in mixed.items())
        raise KnormError(
            f"the records differ in more than the keep ratio ({named}), and one picture can't show both; "
            "draw from a file with the records of one setting, or start over with --fresh"
        )


def _save(figure: Figure, path: Path) -> Path:
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)
    return path

"""Counted cost on the page: a table, a chart for each method, and how far it agrees with the time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from knormpress.errors import KnormError
from knormpress.records.schema import Record
from knormpress.show.page.parts import Block, Chart, Charts, Table, Words
from knormpress.show.pictures.cost import (
    COUNTED,
    PHASES,
    agreement,
    counted_ratio,
    draw_agreement_panel,
    draw_cost_panels,
)
from knormpress.show.pictures.draw import select_counted
from knormpress.show.pictures.style import three_digits

__all__ = ["agreement_blocks", "cost_charts", "cost_tables"]


def cost_tables(records: Sequence[Record]) -> Iterator[Block]:
    """The counted figures of those records that have a cost, a row for each part of a generation."""
    rows = tuple(
        (record.row, record.policy.method, *row) for record in records if record.cost for row in _figures(record)
    )
    if rows:
        yield Table(
            "Counted cost as ratio to the full cache",
            ("Keep ratio", "Method", "Part", *(name[0].upper() + name[1:] for name in COUNTED.values())),
            rows,
            row_heads=3,
            note="Counted, not timed: without an interval. Of decoded tokens the mean, a pruning among them.",
            folded=True,
        )


def cost_charts(records: Sequence[Record]) -> Iterator[Chart]:
    """The counted cost over the keep ratio, if it was counted; ``records`` differ only in the ratios."""
    counted = [record for record in records if record.cost]
    if counted:
        names = ", ".join(COUNTED.values())
        values = "; ".join(
            f"keep ratio {record.row}, {part.lower()}: {', '.join(figures)}"
            for record in counted
            for part, *figures in _figures(record)
        )
        words = f"Ratios to the full cache of {names}, by keep ratio. {values}."
        yield Chart("Counted cost as ratio to the full cache", draw_cost_panels(counted), words, themed=True)


def agreement_blocks(records: Sequence[Record]) -> Iterator[Block]:
    """TPOT over the bytes that a decoded token moves, if both were measured for 3 records that can share a picture."""
    try:
        _, timed, _ = select_counted(records)
    except KnormError:  # no records, or records that can't share a picture
        return
    told = agreement(timed)
    if told:
        yield Charts(
            (Chart("Counted and timed cost", draw_agreement_panel(timed), f"{told} {_points(timed)}.", themed=True),)
        )
        yield Words(told)


def _points(records: Sequence[Record]) -> str:
    return "; ".join(
        f"keep ratio {record.label}, {record.conditions.prompt_tokens:,} tokens: bytes moved "
        f"{_text(counted_ratio(record, 'decode', 'moved'))}, TPOT {record.latency.tpot}"
        for record in records
    )


def _figures(record: Record) -> Iterator[tuple[str, ...]]:
    for phase, part in PHASES.items():
        yield (part, *(_text(counted_ratio(record, phase, name)) for name in COUNTED))


def _text(ratio: float) -> str:
    """A ratio with three decimals, or with three digits if it is large; a dash if the full cache has none."""
    if math.isnan(ratio):
        return "-"
    return f"{ratio:.3f}" if ratio < 10 else three_digits(ratio)

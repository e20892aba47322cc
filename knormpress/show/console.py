"""The terminal for tables and progress."""

from __future__ import annotations

import os
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

__all__ = ["StackingTable", "make_console"]


def make_console(*, stderr: bool = False) -> Console:
    """A console on stdout or ``stderr``. If ``NO_COLOR`` is set, it has no colours and no bold or dim text."""
    # With NO_COLOR alone, rich keeps bold and dim text with their escape codes.
    return Console(stderr=stderr, color_system=None if os.environ.get("NO_COLOR") else "auto")


class StackingTable(Table):
    """A table that stacks the cells of each row where they don't fit beside each other, so that none is cut short.

    Stacked, a row has a line for each cell, with the column's header before it. Cells of columns without a header are
    a heading above their row.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table, or the rows stacked if it is too wide."""
        unlimited = options.update(max_width=2**16)
        if Measurement.get(console, unlimited, _bare(self)).maximum <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        if self.title:
            yield Text(str(self.title), style=self.title_style or "")
        for row in self._stacked():
            yield Padding(row, (1, 0, 0, 0))
        if self.caption:
            yield ""
            yield Text(str(self.caption), style="table.caption")

    def _stacked(self) -> Iterator[Group]:
        for row, *cells in zip(self.rows, *(column.cells for column in self.columns), strict=True):
            headings = [str(cell) for column, cell in zip(self.columns, cells, strict=True) if not column.header]
            grid = Table.grid(padding=(0, 2, 0, 0))
            for column, cell in zip(self.columns, cells, strict=True):
                if column.header and str(cell):
                    grid.add_row(" ".join(str(column.header).split()), cell, style=row.style)
            heading = Text(" ".join(filter(None, headings)), style="bold")
            yield Group(heading, grid) if heading else Group(grid)


def _bare(table: Table) -> Table:
    """``table`` without its title and its caption, which may be broken into lines."""
    bare = Table(box=table.box, show_edge=table.show_edge, pad_edge=table.pad_edge, padding=table.padding)
    bare.columns, bare.rows = table.columns, table.rows
    return bare

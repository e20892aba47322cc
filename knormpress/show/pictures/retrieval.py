"""What is found behind a pruned cache: by depth and length of the text, and by task."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from knormpress.records.retrieval import Item
from knormpress.records.schema import Record
from knormpress.show.pictures.style import (
    add_footer,
    add_heading,
    labelled_places,
    new_figure,
    short_name,
    uniform_and_plans,
)

__all__ = ["draw_retrieval"]

_MOST_COLUMNS = 5
_DEPTHS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.01)
_MOST_LENGTHS = 4
_DARK = 0.55  # white text is easier to read on shares below this one


def draw_retrieval(records: Sequence[Record], left_out: str) -> Figure:
    """Draw, for each keep ratio, a map of the share found by depth and length, and below it the share for each task.

    Args:
        records: records that differ only in keep ratio; those without retrieval are left out.
        left_out: a note about records that are not shown.
    """
    asked = [(record, record.retrieval) for record in records if record.retrieval]
    uniform, plans = uniform_and_plans([record for record, _ in asked])
    named = labelled_places([asked[place][0] for place in uniform], max(1, _MOST_COLUMNS - len(plans)))
    shown = [asked[place] for place in (*(uniform[place] for place in named), *plans)]
    items = asked[0][1].items
    solved = asked[0][1].share.known
    figure = new_figure()
    add_heading(
        figure,
        "What is found behind the pruned cache",
        f"Share of the {solved} items that the full cache finds too (of {sum(asked[0][1].asked.values())} asked); "
        "the questions come after pruning. A cell shows found / items.",
    )
    grid = figure.add_gridspec(
        2, len(shown), left=0.115, right=0.985, top=0.82, bottom=0.14, hspace=0.32, wspace=0.08, height_ratios=(3, 2)
    )
    lengths = _bins(sorted({item.length for item in items}))
    depths = list(pairwise(_DEPTHS))
    tasks = list(asked[0][1].asked)
    for column, (record, retrieval) in enumerate(shown):
        top, bottom = figure.add_subplot(grid[0, column]), figure.add_subplot(grid[1, column])
        cells = [
            [
                [item for item in retrieval.items if low <= item.depth < high and item.length in length]
                for length in lengths
            ]
            for low, high in depths
        ]
        _heat(top, cells)
        share = retrieval.share
        name = f"{short_name(record)}: {share}"
        top.set_title(f"{name} ({share.ends})" if len(shown) <= 3 else name)
        top.set_xticks(range(len(lengths)), [_span(length) for length in lengths])
        top.set_xlabel("text (tokens)")
        _heat(bottom, [[list(retrieval.of(task).items)] for task in tasks])
        bottom.set_xticks([])
        for axes, labels in (
            (top, [f"{100 * low:.0f} to {min(100, 100 * high):.0f} %" for low, high in depths]),
            (bottom, tasks),
        ):
            axes.set_yticks(range(len(labels)), labels if column == 0 else [""] * len(labels))
        if column == 0:
            top.set_ylabel("depth of the answer")
            bottom.set_ylabel("task")
    add_footer(figure, records, left_out)
    return figure


def _bins(lengths: Sequence[int]) -> list[range]:
    """At most four ranges of ``lengths``, with about as many of them in each."""
    parts = np.array_split(np.array(lengths), min(len(lengths), _MOST_LENGTHS))
    return [range(int(part[0]), int(part[-1]) + 1) for part in parts]


def _span(length: range) -> str:
    return f"{length[0]:,}" if len(length) == 1 else f"{length[0]:,} to\n{length[-1]:,}"


def _heat(axes: Axes, cells: Sequence[Sequence[Sequence[Item]]]) -> None:
    """Draw the share of found items of each cell as a colour, with the counts; a cell without items stays empty."""
    shares = [[_share(items) for items in row] for row in cells]
    axes.imshow(shares, cmap=colormaps["viridis"], vmin=0.0, vmax=1.0, aspect="auto")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for y, row in enumerate(cells):
        for x, items in enumerate(row):
            if items:
                found = sum(item.candidate.found for item in items)
                colour = "white" if found / len(items) < _DARK else "black"
                axes.text(x, y, f"{found}/{len(items)}", color=colour, ha="center", va="center", fontsize=8)


def _share(items: Sequence[Item]) -> float:
    return sum(item.candidate.found for item in items) / len(items) if items else float("nan")

"""Time over the length of the context: TTFT of the prompt, and TPOT of the tokens after it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from knormpress.records.schema import Record
from knormpress.show.pictures.style import (
    GREY,
    add_footer,
    add_heading,
    add_legend,
    labelled_places,
    new_figure,
    ratio_colours,
    three_digits,
)
from knormpress.stats.intervals import Change

__all__ = ["draw_scaling"]

_MOST_NAMED = 8
_DECADE = 10.0
_TICK_ROOM = 80.0  # pixels that the label of a length takes


def draw_scaling(records: Iterable[Record], left_out: str) -> Figure:
    """Draw TTFT (left) and TPOT (right) over the prompt length, with a line for each keep ratio and the full cache.

    The full cache was measured with every ratio: its line is the median over these cells. The line of a keep ratio is
    this median plus the change measured in pairs, so a slower machine in one cell does not separate the lines. The
    floor of TPOT is the time per token with an almost empty cache. It was timed in every cell and does not depend on
    the length, so the median over all cells is drawn.

    Args:
        records: records that differ only in prompt length and keep ratio, see ``pictures.draw.select_lengths``.
        left_out: a note about records that are not shown.
    """
    lengths: dict[int, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.conditions.prompt_tokens, -record.keep_ratio)):
        lengths.setdefault(record.conditions.prompt_tokens, []).append(record)
    shown = [record for group in lengths.values() for record in group]
    cells: dict[object, list[Record]] = {}
    for record in shown:
        cells.setdefault(record.policy.layer_keep_ratios or record.keep_ratio, []).append(record)
    lines = sorted(cells.values(), key=lambda line: -line[0].keep_ratio)
    ratios = [line[0] for line in lines]
    weights = [time for record in shown if (time := record.latency.weights_tpot_s) is not None]
    figure = new_figure()
    whiskers = any(change.low is not None for record in shown for change in (record.latency.ttft, record.latency.tpot))
    add_heading(
        figure,
        "Time by length of the context",
        "Full cache: the median of the runs. Keep ratios: this median plus the change measured in pairs"
        + ("; whiskers: 95 % interval." if whiskers else "; too few runs for an interval."),
    )
    grid = figure.add_gridspec(1, 2, left=0.055, right=0.985, top=0.84, bottom=0.15, wspace=0.14)
    ttft, tpot = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    colours = ratio_colours(ratios)
    for axes, full, change, unit in (
        (ttft, lambda record: record.latency.baseline_speed.ttft_s, lambda record: record.latency.ttft, 1.0),
        (tpot, lambda record: record.latency.baseline_speed.tpot_s, lambda record: record.latency.tpot, 1e3),
    ):
        middles = {n: unit * statistics.median(map(full, group)) for n, group in lengths.items()}
        axes.plot(list(middles), list(middles.values()), "s-", color=GREY, markersize=6, linewidth=2.2)
        for line, colour in zip(lines, colours, strict=True):
            _line(axes, line, middles, change, colour)
    _finish(ttft, list(lengths), "TTFT (s)")
    _finish(tpot, list(lengths), "TPOT (ms)")
    handles = [Line2D([], [], marker="s", color=GREY, linewidth=2.2, label="full cache")]
    handles += [
        Line2D([], [], marker="o", color=colours[place], label=f"keep {ratios[place].label}")
        for place in labelled_places(ratios, _MOST_NAMED)
    ]
    if weights:
        floor = 1e3 * statistics.median(weights)
        label = f"weights alone: {three_digits(floor)} ms"
        handles.append(tpot.axhline(floor, linestyle="--", color="black", linewidth=1.2, label=label))
    add_legend(figure, handles)
    add_footer(figure, shown[::-1], left_out)
    return figure


def _line(
    axes: Axes,
    records: Sequence[Record],
    full: dict[int, float],
    change: Callable[[Record], Change],
    colour: tuple[float, float, float, float],
) -> None:
    places = [record.conditions.prompt_tokens for record in records]
    values, lows, highs = (
        [full[place] * (1.0 + percent / 100.0) for place, percent in zip(places, percents, strict=True)]
        for percents in (
            [change(record).percent for record in records],
            [change(record).ends[0] for record in records],
            [change(record).ends[1] for record in records],
        )
    )
    below = [value - low for value, low in zip(values, lows, strict=True)]
    above = [high - value for value, high in zip(values, highs, strict=True)]
    axes.errorbar(places, values, yerr=[below, above], fmt="o-", color=colour, markersize=5, linewidth=1.4)


def _finish(axes: Axes, lengths: Sequence[int], title: str) -> None:
    """Set up the axes: lengths on a log scale; times from 0, or on a log scale if they span more than a decade."""
    low, high = axes.dataLim.y0, axes.dataLim.y1
    logarithmic = high > _DECADE * low
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0.0, 1.08 * high)
    axes.set_title(f"{title.removesuffix(')')}, log scale)" if logarithmic else title)
    axes.set_title("lower is better", loc="right", fontsize=7.0, fontweight="normal", color=GREY)
    axes.set_xscale("log", base=2)
    axes.margins(x=0.08)
    axes.set_xticks(lengths, [""] * len(lengths))
    axes.minorticks_off()
    right = float("inf")
    labels = []
    for length in reversed(lengths):
        place = axes.transData.transform((length, high))[0]
        labels.append(f"{length:,}" if place <= right - _TICK_ROOM else "")
        right = place if labels[-1] else right
    axes.set_xticklabels(labels[::-1])
    axes.set_xlabel("tokens of context (log scale)")
    axes.grid()

"""Six panels with every figure of a sweep over the keep ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpecFromSubplotSpec
from matplotlib.ticker import MaxNLocator

from knormpress.records.schema import Record
from knormpress.show.pictures.style import (
    BLUE,
    GREEN,
    GREY,
    HALO,
    ORANGE,
    RED,
    add_band,
    add_footer,
    add_heading,
    keep_ratio_axis,
    new_figure,
    panel_figure,
    pretty,
    room_for_labels,
    scale_for,
    three_digits,
    uniform_and_plans,
)
from knormpress.stats.intervals import Change

__all__ = ["draw_comprehensive", "draw_panels"]

_VALUE_SIZE = 7.0
_ON_GREEN = "#111111"  # white is hard to read on this green


def draw_comprehensive(records: Sequence[Record], left_out: str) -> Figure:
    """Draw TTFT, TPOT, throughput and PPL as changes with intervals; cache memory; agreement with the full cache."""
    figure = new_figure()
    without = any(
        change.low is None
        for record in records
        for change in (record.latency.ttft, record.latency.tpot, record.latency.throughput, record.quality.ppl)
    )
    latencies = [record.latency for record in records]
    add_heading(
        figure,
        "Speed, memory and quality by keep ratio",
        "Change against the full cache, measured in the same run; whiskers: 95 % interval"
        + (" (hollow: too few runs or documents for one)" if without else "")
        + "; shaded: target for PPL, \N{PLUS-MINUS SIGN}5 %.",
    )
    grid = figure.add_gridspec(2, 3, left=0.055, right=0.985, top=0.865, bottom=0.145, wspace=0.2, hspace=0.46)
    _changes(figure.add_subplot(grid[0, 0]), records, [latency.ttft for latency in latencies], "TTFT change (%)")
    _changes(figure.add_subplot(grid[0, 1]), records, [latency.tpot for latency in latencies], "TPOT change (%)")
    rates, axes = [latency.throughput for latency in latencies], figure.add_subplot(grid[0, 2])
    _changes(axes, records, rates, "Throughput change (%)", better="higher is better")
    _perplexity(figure.add_subplot(grid[1, 0]), records)
    _memory(figure.add_subplot(grid[1, 1]), records)
    halves = GridSpecFromSubplotSpec(2, 1, subplot_spec=grid[1, 2], hspace=0.5, height_ratios=(3, 2))
    _agreement(figure.add_subplot(halves[0]), figure.add_subplot(halves[1]), records)
    add_footer(figure, records, left_out)
    return figure


def draw_panels(records: Sequence[Record]) -> dict[str, Figure]:
    """Draw each panel as a separate small picture; returns them by the name of the figure."""

    def changes(name: str, of: Sequence[Change], better: str = "lower is better") -> Figure:
        figure, axes = panel_figure()
        _changes(axes, records, of, f"{name} change (%)", better=better)
        return figure

    panels = {
        "TTFT": changes("TTFT", [record.latency.ttft for record in records]),
        "TPOT": changes("TPOT", [record.latency.tpot for record in records]),
        "throughput": changes("Throughput", [record.latency.throughput for record in records], "higher is better"),
    }
    drawn = [("PPL", _perplexity), ("cache", _memory), ("top-1", _top1), ("KL", _divergence)]
    if all(record.retrieval and record.retrieval.items for record in records):
        drawn.append(("found", _found))
    for name, draw in drawn:
        panels[name], axes = panel_figure()
        draw(axes, records)
    return panels


def _title(axes: Axes, title: str, note: str) -> None:
    axes.set_title(title)
    axes.set_title(note, loc="right", fontsize=7.0, fontweight="normal", color=GREY)


def _changes(
    axes: Axes,
    records: Sequence[Record],
    changes: Sequence[Change],
    title: str,
    *,
    colour: str = BLUE,
    better: str = "lower is better",
) -> None:
    _title(axes, title, better)
    labelled = keep_ratio_axis(axes, records)
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.axhline(0.0, color=GREY, linewidth=0.8)
    uniform, plans = uniform_and_plans(records)
    axes.plot(uniform, [changes[place].percent for place in uniform], color=colour, linewidth=1.0, alpha=0.5)
    for place, change in enumerate(changes):
        low, high = change.ends
        marker = "D" if place in plans else "o"
        if change.low is None:
            axes.plot(place, change.percent, marker, markersize=5, color=colour, markerfacecolor="white")
        else:
            whiskers = [[change.percent - low], [high - change.percent]]
            axes.errorbar(place, change.percent, yerr=whiskers, fmt=marker, markersize=5, color=colour, linewidth=1.4)
        if place in labelled:
            _value(axes, place, high, pretty(str(change).removesuffix(" %")))
    room_for_labels(axes, [0.0, *(end for change in changes for end in change.ends)])


def _value(axes: Axes, place: float, top: float, text: str) -> None:
    axes.annotate(
        text,
        (place, top),
        xytext=(0, 5),
        textcoords="offset points",
        horizontalalignment="center",
        verticalalignment="bottom",
        fontsize=_VALUE_SIZE,
        path_effects=HALO,
    )


def _perplexity(axes: Axes, records: Sequence[Record]) -> None:
    changes = [record.quality.ppl for record in records]
    reach = [end for change in changes for end in change.ends]
    logarithmic = scale_for(axes, reach)
    _changes(axes, records, changes, "PPL change (%, log scale)" if logarithmic else "PPL change (%)", colour=RED)
    add_band(axes)
    room_for_labels(axes, [-5.0, 5.0, *reach], below=0.05)


def _memory(axes: Axes, records: Sequence[Record]) -> None:
    full = records[0].memory.baseline_cache_bytes
    unit, divisor = ("GB", 1e9) if full >= 1e9 else ("MB", 1e6)
    decoded = [record.memory.candidate_decoded_bytes for record in records]
    _title(axes, f"Cache memory ({unit})", "lower is better")
    labelled = keep_ratio_axis(axes, records)
    if any(decoded):
        axes.set_xlabel("keep ratio; line: after decoding")
    sizes = [record.memory.candidate_cache_bytes / divisor for record in records]
    axes.bar(range(len(records)), sizes, width=0.62, color=GREEN)
    for place, size in enumerate(decoded):
        if size is not None:
            axes.hlines(size / divisor, place - 0.31, place + 0.31, color="black", linewidth=1.2)
    axes.axhline(full / divisor, color=GREY, linewidth=1.0, linestyle="--")
    axes.set_ylim(0.0, max(full / divisor, *sizes) * 1.2)
    axes.annotate(
        f"full cache {three_digits(full / divisor)} {unit}",
        (1.0, full / divisor),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        horizontalalignment="right",
        fontsize=_VALUE_SIZE,
        color=GREY,
        path_effects=HALO,
    )
    for place in labelled:
        inside = sizes[place] > 0.2 * full / divisor and len(labelled) == len(records)
        axes.annotate(
            three_digits(sizes[place]),
            (place, sizes[place]),
            xytext=(0, -4 if inside else 3),
            textcoords="offset points",
            horizontalalignment="center",
            verticalalignment="top" if inside else "bottom",
            fontsize=_VALUE_SIZE,
            color=_ON_GREEN if inside else "black",
            path_effects=None if inside else HALO,
        )


def _agreement(top: Axes, bottom: Axes, records: Sequence[Record]) -> None:
    """What is found above the divergence; where nothing was asked, the first choices take its place."""
    (_found if all(record.retrieval and record.retrieval.items for record in records) else _top1)(top, records)
    top.set_xlabel("")
    top.tick_params(labelbottom=False)
    _divergence(bottom, records)


def _top1(axes: Axes, records: Sequence[Record]) -> None:
    _title(axes, "Top-1 agreement (%)", "higher is better")
    _points(axes, records, [record.quality.top1 * 100 for record in records], best=100.0, most=100.0, decimals=1)


def _found(axes: Axes, records: Sequence[Record]) -> None:
    _title(axes, "Items found (%)", "higher is better")
    shares = [record.retrieval.share for record in records if record.retrieval]
    labelled = keep_ratio_axis(axes, records)
    values = [100 * share.value for share in shares]
    whiskers = [
        [100 * (share.value - share.low) for share in shares],
        [100 * (share.high - share.value) for share in shares],
    ]
    axes.errorbar(range(len(values)), values, yerr=whiskers, fmt="none", ecolor=ORANGE, elinewidth=1.0)
    _joined(axes, records, values)
    for place in labelled:
        _value(axes, place, 100 * shares[place].high, str(shares[place]))
    room_for_labels(axes, [0.0, 100.0], below=0.05, above=0.25)
    axes.set_yticks([0, 50, 100])


def _joined(axes: Axes, records: Sequence[Record], values: Sequence[float]) -> None:
    """A line over the keep ratios, and a point apart for a plan."""
    for places, style in zip(uniform_and_plans(records), ("o-", "D"), strict=True):
        axes.plot(places, [values[place] for place in places], style, color=ORANGE, markersize=4, linewidth=1.0)


def _divergence(axes: Axes, records: Sequence[Record]) -> None:
    _title(axes, "KL divergence (nats)", "lower is better")
    _points(axes, records, [record.quality.kl for record in records], best=0.0, most=math.inf, decimals=3)


def _points(
    axes: Axes,
    records: Sequence[Record],
    values: Sequence[float],
    *,
    best: float,
    most: float,
    decimals: int,
) -> None:
    labelled = keep_ratio_axis(axes, records)
    _joined(axes, records, values)
    for place in labelled:
        _value(axes, place, values[place], f"{values[place]:.{decimals}f}")
    room_for_labels(axes, [best, *values], below=0.12, above=0.35)
    ticks = MaxNLocator(3, steps=[1, 2, 5, 10]).tick_values(*axes.get_ylim())
    # The axis has room for labels above 100 %, but no share is larger, so there is no tick.
    axes.set_yticks([tick for tick in ticks if axes.get_ylim()[0] <= tick <= min(axes.get_ylim()[1], most)])

"""Shared by all pictures: size, colours, number formats, axes with room for labels, heading and footer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patheffects import withStroke

from knormpress.records.schema import Record

__all__ = [
    "BAND",
    "BLUE",
    "DPI",
    "GREEN",
    "GREY",
    "HALO",
    "ORANGE",
    "RED",
    "STYLE",
    "WIDTH",
    "add_band",
    "add_footer",
    "add_footer_lines",
    "add_heading",
    "add_legend",
    "keep_ratio_axis",
    "labelled_places",
    "layer_axis",
    "new_figure",
    "panel_figure",
    "plain",
    "pretty",
    "ratio_colours",
    "room_for_labels",
    "scale_for",
    "short_name",
    "shortened",
    "three_digits",
    "uniform_and_plans",
]

WIDTH, HEIGHT, DPI = 1600, 1000, 150

# The colours of Okabe and Ito (2008), which can be distinguished with any kind of colour vision.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
BAND = "#D9EEE6"
HALO = [withStroke(linewidth=2.5, foreground="white")]

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.axisbelow": True,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "errorbar.capsize": 3.0,
}

_LINEAR_UP_TO = 40.0
_LOG_BEYOND = 10.0
_MOST_LABELS = 8
_LAYER_LABEL = 20.0  # pixels


def new_figure(height: int = HEIGHT) -> Figure:
    """An empty picture, 1600 pixels wide."""
    figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def panel_figure() -> tuple[Figure, Axes]:
    """An empty picture with one panel and no heading or footer, which can be read on a phone."""
    figure = Figure(figsize=(4.0, 2.9), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def pretty(text: str) -> str:
    """A number or a limit with typographic signs, as matplotlib writes them on its axes."""
    text = text.replace("+-", "\N{PLUS-MINUS SIGN}").replace("-", "\N{MINUS SIGN}")
    return text.replace("<=", "\N{LESS-THAN OR EQUAL TO}").replace(">=", "\N{GREATER-THAN OR EQUAL TO}")


def three_digits(value: float) -> str:
    """A positive figure with three significant digits; as a whole number from 1,000 on."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:#.3g}".rstrip(".")


def plain(text: str) -> str:
    """A text that can be drawn: line ends, and characters that the font lacks, become question marks."""
    font = get_font(findfont("DejaVu Sans"))
    return "".join(character if font.get_char_index(ord(character)) else "?" for character in text)


def uniform_and_plans(records: Sequence[Record]) -> tuple[list[int], list[int]]:
    """The places of the records with one ratio for all layers, which a line can join, and of the plans."""
    plans = [place for place, record in enumerate(records) if record.policy.layer_keep_ratios]
    return [place for place in range(len(records)) if place not in plans], plans


def ratio_colours(records: Sequence[Record]) -> list[tuple[float, float, float, float]]:
    """One colour per record, from light to dark as less is kept, in even steps of lightness; orange for a plan."""
    uniform, _ = uniform_and_plans(records)
    steps = np.linspace(0.0, 1.0, len(uniform)) if len(uniform) > 1 else [0.5] * len(uniform)
    colours = {place: colormaps["viridis_r"](0.08 + 0.84 * step) for place, step in zip(uniform, steps, strict=True)}
    return [colours.get(place, to_rgba(ORANGE)) for place in range(len(records))]


def short_name(record: Record) -> str:
    """``keep 0.9`` or ``plan 0.42``."""
    return record.row if record.policy.layer_keep_ratios else f"keep {record.label}"


def labelled_places(records: Sequence[Record], most: int) -> list[int]:
    """The indices of at most ``most`` records to label: every record, every second, ..."""
    return list(range(0, len(records), math.ceil(len(records) / most)))


def keep_ratio_axis(axes: Axes, records: Sequence[Record]) -> list[int]:
    """Set up an axis with evenly spaced keep ratios; returns the indices that have room for a label."""
    labelled = labelled_places(records, _MOST_LABELS)
    axes.set_xticks(labelled, [records[place].row.replace(" ", "\n") for place in labelled])
    margin = 0.5 + 0.04 * len(records)
    axes.set_xlim(-margin, len(records) - 1 + margin)
    axes.set_xlabel("keep ratio")
    axes.tick_params(length=2)
    axes.grid(axis="y")
    return labelled


def layer_axis(axes: Axes, layers: int) -> None:
    """Set up an axis with one row per layer, the first on top; labels as many layers as there is room for."""
    axes.set_ylim(layers - 0.5, -0.5)
    axes.set_yticks(range(0, layers, math.ceil(layers * _LAYER_LABEL / axes.bbox.height)))
    axes.tick_params(length=0)
    axes.set_ylabel("layer")


def scale_for(axes: Axes, values: Sequence[float]) -> bool:
    """Make the y axis logarithmic beyond 10 % if there are large ``values`` in %; returns whether it did."""
    if max(map(abs, values)) <= _LINEAR_UP_TO:
        return False
    decades = math.ceil(math.log10(max(map(abs, values))))
    axes.set_yscale("symlog", linthresh=_LOG_BEYOND, linscale=max(1.0, 0.4 * decades))
    powers = [10.0**power for power in range(1, 1 + decades, math.ceil(decades / 5))]
    if decades <= 2:
        powers += [20.0, 50.0]
    ticks = [-5.0, 0.0, 5.0, *powers, *(-power for power in powers if -power >= min(values))]
    axes.set_yticks(ticks, [pretty(_tick(tick)) for tick in ticks])
    axes.minorticks_off()
    return True


def _tick(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e6 if letter == 'M' else 1e3):g}{letter}"
    return f"{value:,.0f}"


def room_for_labels(axes: Axes, values: Sequence[float], below: float = 0.1, above: float = 0.2) -> None:
    """Set the y limits so that shares of the axis stay free ``below`` and ``above`` ``values``, on any scale."""
    transform = axes.yaxis.get_transform()
    low, high = transform.transform(np.array([min(values), max(values)]))
    spread = high - low or 1.0
    share = spread / (1.0 - below - above)
    bottom, top = transform.inverted().transform(np.array([low - below * share, high + above * share]))
    axes.set_ylim(bottom, top)


def add_band(axes: Axes) -> None:
    """Shade the target for PPL, +-5 %."""
    axes.axhspan(-5.0, 5.0, color=BAND, zorder=0, linewidth=0)


def add_heading(figure: Figure, title: str, subtitle: str) -> None:
    """Write title and subtitle at the top left, at the same distance from the edge in every picture."""
    height = figure.get_figheight() * DPI
    figure.text(0.03, 1 - 22 / height, title, fontsize=13, fontweight="bold", verticalalignment="top")
    figure.text(0.03, 1 - 58 / height, subtitle, fontsize=8.5, color=GREY, verticalalignment="top")


def add_legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Add a legend in one line, between the heading and the axes."""
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.025, 0.925),
        ncols=len(handles),
        columnspacing=1.4,
        handlelength=1.2,
        fontsize=8.5,
    )


def add_footer(figure: Figure, records: Sequence[Record], left_out: str) -> None:
    """Write model, text, device, date and settings in two lines at the bottom left."""
    record = records[0]
    policy, conditions, environment = record.policy, record.conditions, record.environment
    chunk = "" if conditions.prefill_chunk is None else f" in chunks of {conditions.prefill_chunk:,}"
    prompts = _span([record.conditions.prompt_tokens for record in records])
    scored = _span([record.conditions.scored_tokens for record in records])
    lines = (
        [
            f"{_short(record.model.name)}, {record.model.dtype}",
            f"text: {_short(record.text.name)}",
            f"{environment.device} ({_short(environment.device_name)}), threads: {environment.threads}",
            *([_short(environment.device_map)] if environment.device_map else []),
            max(record.created for record in records)[:10],
            f"knormpress {environment.knormpress}",
        ],
        [
            f"{policy.method}, prune_after {policy.prune_after:,}",
            f"prompt of {prompts} tokens{chunk}, {conditions.new_tokens:,} new",
            f"pairs of runs: {_span([record.latency.pairs for record in records])}",
            f"{conditions.samples:,} samples, {scored} tokens scored in each",
            *([left_out] if left_out else []),
        ],
    )
    add_footer_lines(figure, lines)


def add_footer_lines(figure: Figure, lines: Sequence[Sequence[str]]) -> None:
    """Write two lines of facts at the bottom left."""
    height = figure.get_figheight() * DPI
    for place, line in zip((38, 18), lines, strict=True):
        text = shortened(plain("  |  ".join(line)), 190)
        figure.text(0.03, place / height, text, fontsize=7, color=GREY, verticalalignment="center", parse_math=False)


def _span(counts: Sequence[int]) -> str:
    return " to ".join(dict.fromkeys((f"{min(counts):,}", f"{max(counts):,}")))


def _short(name: str) -> str:
    return name if len(name) <= 36 else f"...{name[-33:]}"


def shortened(text: str, most: int) -> str:
    """``text``, cut at its end if it has more than ``most`` characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."

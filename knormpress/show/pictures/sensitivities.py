"""The damage of pruning one layer alone, and the ratio and the score that the plan gives it."""

from __future__ import annotations

import math

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from knormpress.records.plan import Plan, Sensitivities
from knormpress.show.pictures.plan_footer import add_plan_footer
from knormpress.show.pictures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    add_heading,
    layer_axis,
    new_figure,
    plain,
    pretty,
    shortened,
)

__all__ = ["draw_sensitivities"]

_MOST_DECADES = 3
_BOTTOM, _HEIGHT = 0.225, 0.645
_LAYER_ROOM, _LETTER_ROOM = 15.0, 9.0  # pixels: the height of a number in a cell, and the width of a letter
_SCORES, _WHOLE = (BLUE, ORANGE, GREEN, RED, GREY), "#CCCCCC"
_MOST_LETTERS = 14
_COLOURS = ListedColormap(colormaps["magma_r"](np.linspace(0.0, 0.88, 256)), name="pale to dark")


def draw_sensitivities(plan: Plan, sensitivities: Sensitivities) -> Figure:
    """Draw a row for each layer: the loss on the text and on the items at each ratio, in nats, and the plan's choice.

    Colours are logarithmic; values of zero and below, where pruning costs nothing, have the palest colour.

    Raises:
        KnormError: the plan's policy is for another number of layers.
    """
    ratios = plan.press.ratios(len(sensitivities.text))
    figure = new_figure()
    panels = [
        ("Text", "nats per token", sensitivities.text),
        (plan.items.capitalize(), "nats per answer", sensitivities.answers),
    ]
    panels = [panel for panel in panels if any(panel[2])]
    width = 0.73 / len(panels) - 0.05
    for place, (title, unit, values) in enumerate(panels):
        left = 0.055 + place * (width + 0.05)
        axes = figure.add_axes((left, _BOTTOM, width, _HEIGHT))
        axes.set_title(title)
        bar = figure.add_axes((left, 0.132, width, 0.016))
        _draw_heat(axes, bar, np.array(values, dtype=float), unit)
        axes.set_xticks(range(len(sensitivities.ratios)), [f"{ratio:g}" for ratio in sensitivities.ratios])
        axes.set_xlabel("keep ratio of this layer alone, others unpruned")
        layer_axis(axes, len(sensitivities.text))
        if place:
            axes.set_ylabel("")
    axes = figure.add_axes((0.79, _BOTTOM, 0.18, _HEIGHT))
    axes.set_title("The plan")
    _draw_ratios(axes, ratios, plan.press.scores(len(ratios)))
    add_heading(
        figure,
        "What pruning one layer alone costs",
        "Rise in nats against the full cache, on the text that the search used; "
        "zero and below, which cost nothing, have the palest colour.",
    )
    add_plan_footer(figure, plan)
    return figure


def _draw_heat(axes: Axes, bar: Axes, values: NDArray[np.float64], unit: str) -> None:
    highest = values.max() if values.max() > 0 else 1.0
    lowest = np.clip(min(values[values > 0], default=0.0), highest / 10**_MOST_DECADES, highest / 10)
    norm = LogNorm(lowest, highest, clip=True)
    # The logarithm masks values that are not above zero, and a masked value has no colour.
    mesh = axes.pcolormesh(
        np.arange(values.shape[1] + 1) - 0.5,
        np.arange(values.shape[0] + 1) - 0.5,
        np.maximum(values, lowest),
        norm=norm,
        cmap=_COLOURS,
        edgecolors="white",
        linewidth=0.5,
    )
    axes.spines[:].set_visible(False)
    colourbar = axes.figure.colorbar(mesh, cax=bar, orientation="horizontal", extend="min", extendfrac=0.04)
    colourbar.set_label(f"{unit} (logarithmic)")
    colourbar.outline.set_visible(False)
    colourbar.minorticks_off()
    decimals = min(6, max(0, 3 - math.ceil(math.log10(highest))))
    width, height = axes.bbox.width / values.shape[1], axes.bbox.height / values.shape[0]
    if height < _LAYER_ROOM or width < _LETTER_ROOM * (decimals + 3):
        return
    # Adding 0.0 turns -0.0 into 0.0.
    for (row, column), value in np.ndenumerate(np.round(values, decimals) + 0.0):
        red, green, blue, _ = _COLOURS(norm(max(value, lowest)))
        dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5
        axes.text(
            column,
            row,
            pretty(f"{value:.{decimals}f}"),
            horizontalalignment="center",
            verticalalignment="center_baseline",
            fontsize=6.5,
            color="white" if dark else "#222222",
        )


def _draw_ratios(axes: Axes, ratios: tuple[float, ...], scores: tuple[str, ...]) -> None:
    used = list(dict.fromkeys(score for score, ratio in zip(scores, ratios, strict=True) if ratio < 1.0))
    colours = {score: _SCORES[min(place, len(_SCORES) - 1)] for place, score in enumerate(used)}
    named = [colours[score] if ratio < 1.0 else _WHOLE for score, ratio in zip(scores, ratios, strict=True)]
    axes.barh(range(len(ratios)), ratios, height=0.78, color=named)
    layer_axis(axes, len(ratios))
    axes.set_ylabel("")
    axes.set_xlim(0.0, 1.0)
    axes.set_xticks([0.0, 0.5, 1.0], ["0", "0.5", "1"])
    axes.set_xlabel("keep ratio")
    mean = sum(ratios) / len(ratios)
    axes.axvline(mean, color=GREY, linewidth=1.0, linestyle="--")
    axes.set_title(f"mean {mean:.3f}", loc="right", fontsize=7.5, fontweight="normal", color=GREY)
    axes.grid(axis="x")
    shown = [
        Patch(color=colours[score], label=shortened(plain(score), _MOST_LETTERS)) for score in used[: len(_SCORES)]
    ]
    if len(used) > len(_SCORES):
        shown[-1].set_label(f"{len(used) - len(_SCORES) + 1} others")
    if _WHOLE in named:
        shown.append(Patch(color=_WHOLE, label="kept whole"))
    axes.legend(
        handles=shown,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.072),
        ncols=2,
        fontsize=7,
        handlelength=1.0,
        columnspacing=1.0,
        labelspacing=0.3,
    )

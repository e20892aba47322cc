"""Which tokens of a short text each layer keeps."""

from __future__ import annotations

from itertools import islice

import numpy as np
from matplotlib.figure import Figure

from knormpress.records.plan import KeptTokens, Plan
from knormpress.show.pictures.plan_footer import add_plan_footer
from knormpress.show.pictures.style import DPI, add_heading, layer_axis, new_figure, plain, shortened

__all__ = ["draw_kept"]

_MOST_TOKENS = 100
_MOST_LETTERS = 16
_TOP = 0.845
_FOOTER = 70  # pixels, with the space above it
_SIGNS = str.maketrans({"\n": "\N{RETURN SYMBOL}", "\r": "\N{RETURN SYMBOL}", "\t": "\N{RIGHTWARDS ARROW TO BAR}"})


def draw_kept(plan: Plan, kept: KeptTokens) -> Figure:
    """Draw a row for each layer and a column for each token; darker cells are kept by more key-value heads.

    A long text is cut so that all tokens can be read, and the heading says so. ``kept`` has at least one token and one
    layer.
    """
    tokens = list(islice(kept.tokens, _MOST_TOKENS))
    shares = np.array([layer[: len(tokens)] for layer in kept.layers], dtype=float)
    figure = new_figure()
    axes = figure.add_axes((0.04, 0.2, 0.945, _TOP - 0.2))
    mesh = axes.pcolormesh(
        np.arange(len(tokens) + 1) - 0.5,
        np.arange(len(shares) + 1) - 0.5,
        100 * shares,
        cmap="Blues",
        vmin=0.0,
        vmax=100.0,
        edgecolors="#DDDDDD",
        linewidth=0.4,
    )
    size = 6.2 if len(tokens) > 60 else 7.5
    axes.set_xticks(range(len(tokens)), map(_label, tokens), rotation=90, fontsize=size, parse_math=False)
    axes.tick_params(axis="x", pad=2)
    longest = max(label.get_window_extent().height for label in axes.get_xticklabels())
    bottom = (_FOOTER + longest) / (figure.get_figheight() * DPI)
    axes.set_position((0.04, bottom, 0.945, _TOP - bottom))
    layer_axis(axes, len(shares))
    bar = figure.add_axes((0.74, 0.885, 0.235, 0.016))
    colourbar = figure.colorbar(mesh, cax=bar, orientation="horizontal")
    colourbar.set_ticks([0, 25, 50, 75, 100])
    colourbar.set_label("key-value heads that keep the token (%)")
    bar.xaxis.set_label_position("top")
    bar.tick_params(length=0)
    left_out = len(kept.tokens) - len(tokens)
    add_heading(
        figure,
        "Which tokens each layer keeps",
        "A part of a text under the plan. White: dropped by all heads of the layer; dark blue: kept by all heads."
        + (f" The first {len(tokens)} of {len(kept.tokens):,} tokens." if left_out else ""),
    )
    add_plan_footer(figure, plan)
    return figure


def _label(token: str) -> str:
    """A token as visible text: line ends and tabs become signs, outer spaces are cut, and only spaces become boxes."""
    text = token.translate(_SIGNS)
    text = text.strip(" ") or "\N{OPEN BOX}" * len(text)
    return shortened(plain("".join(letter if letter.isprintable() else "?" for letter in text)), _MOST_LETTERS)

"""The pictures of the pages that the benchmarks draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

from matplotlib import style as matplotlib_style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from knormpress.show.pictures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    STYLE,
    add_heading,
    add_legend,
    new_figure,
    pretty,
    three_digits,
)
from knormpress.stats.intervals import Change
from knormpress.stats.shares import Share
from tests.perf.clocks import PARTS, Spent

__all__ = ["Course", "Peer", "draw_decoded_token", "draw_long_decode", "draw_peers"]

_COLOURS = dict(zip(PARTS, (GREY, BLUE, ORANGE, "#BBBBBB"), strict=True))
_PIXELS_A_BAR = 55
# A shorter part has no room for its number.
_LEAST_LABELLED = 0.03


class Course(NamedTuple):
    """Seconds, and bytes of the cache, of each token of a decode."""

    seconds: Sequence[float]
    nbytes: Sequence[int]


class Peer(NamedTuple):
    """What was measured of a policy or press; ``held`` is its share of the full cache's bytes, the rest as recorded."""

    name: str
    mean_keep: float
    held: float
    ttft: Change
    tpot: Change
    ppl: Change
    found: Share
    nll_rise: float


def draw_decoded_token(cases: Mapping[str, Mapping[str, Spent]], *, bandwidth: float) -> Figure:
    """Draw one bar of time for each context and cache, by parts, with the time that reading its bytes takes at least.

    Args:
        cases: by context, then by cache.
        bandwidth: bytes a second.
    """
    bars = [(f"{context}\n{cache}", spent) for context, caches in cases.items() for cache, spent in caches.items()]
    longest = max(sum(spent.seconds.values()) for _, spent in bars)
    with matplotlib_style.context(["default", STYLE]):
        figure = new_figure(170 + _PIXELS_A_BAR * len(bars))
        height = figure.bbox.height
        axes = figure.add_axes((0.14, 60 / height, 0.84, 1 - 180 / height))
        for place, (_, spent) in enumerate(bars):
            left = 0.0
            for part in PARTS:
                seconds = spent.seconds[part]
                axes.barh(place, 1e3 * seconds, left=1e3 * left, height=0.62, color=_COLOURS[part])
                if seconds > _LEAST_LABELLED * longest:
                    text = three_digits(1e3 * seconds)
                    colour = "white" if part in {"weights", "attention"} else "black"
                    middle = 1e3 * (left + seconds / 2)
                    axes.text(middle, place, text, color=colour, ha="center", va="center", fontsize=7.5)
                left += seconds
            axes.text(1e3 * left, place, f"  {three_digits(1e3 * left)} ms", va="center", fontweight="bold")
            limit = 1e3 * spent.read / bandwidth
            axes.plot([limit, limit], [place - 0.42, place + 0.42], color=RED, linewidth=2.5)
        axes.set_yticks(range(len(bars)), [name for name, _ in bars])
        axes.set_xlim(0, 1.1e3 * longest)
        axes.set_xlabel("ms of one decoded token")
        axes.invert_yaxis()
        axes.grid(axis="x")
        add_heading(
            figure,
            "Where the time of a decoded token goes",
            f"The line: reading the weights, keys and values once, at the {bandwidth / 1e9:.1f} GB/s of this machine.",
        )
        limit_line = Line2D([], [], color=RED, linewidth=2.5, label="read once")
        add_legend(figure, [*(Patch(color=_COLOURS[part], label=part) for part in PARTS), limit_line])
        figure.legends[0].set_bbox_to_anchor((0.025, 1 - 80 / height))
    return figure


def draw_long_decode(courses: Mapping[str, Course], *, prompt: int, slot: int) -> Figure:
    """Draw time (left) and bytes (right) of a decode over its tokens, a line for each schedule.

    Args:
        courses: by schedule, of equal length.
        prompt: tokens before the decode.
        slot: bytes that the full cache holds for a token.
    """
    with matplotlib_style.context(["default", STYLE]):
        figure = new_figure(640)
        add_heading(
            figure,
            "A long decode",
            f"Behind a prompt of {prompt:,} tokens. Each point of the left panel is the median of its neighbours.",
        )
        grid = figure.add_gridspec(1, 2, left=0.055, right=0.985, top=0.76, bottom=0.12, wspace=0.14)
        time, held = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
        handles = []
        for (schedule, course), colour in zip(courses.items(), (BLUE, GREEN), strict=True):
            tokens = len(course.seconds)
            window = max(1, tokens // 80)
            starts = range(0, tokens - window + 1, window)
            middles = [1e3 * median(course.seconds[start : start + window]) for start in starts]
            (line,) = time.plot([start + window / 2 for start in starts], middles, color=colour, label=schedule)
            handles.append(line)
            held.plot(range(tokens), [nbytes / 1e6 for nbytes in course.nbytes], color=colour)
        full = [(prompt + token) * slot / 1e6 for token in (0, tokens)]
        handles += held.plot([0, tokens], full, color=GREY, linestyle="--", label="full cache")
        for axes, title in ((time, "time of a token (ms)"), (held, "bytes of the cache (MB)")):
            axes.set_title(title)
            axes.set_ylim(0, 1.08 * axes.dataLim.y1)
            axes.set_xlabel("tokens decoded")
            axes.grid()
        add_legend(figure, handles)
        figure.legends[0].set_bbox_to_anchor((0.025, 1 - 80 / figure.bbox.height))
    return figure


def draw_peers(peers: Sequence[Peer]) -> Figure:
    """Draw a row for each policy and press: its bytes, what is found, perplexity, TTFT and TPOT, with intervals."""
    columns = {
        "bytes": [(100 * peer.held, (100 * peer.held,) * 2) for peer in peers],
        "items found": [(100 * peer.found.value, (100 * peer.found.low, 100 * peer.found.high)) for peer in peers],
        "PPL": [(peer.ppl.percent, peer.ppl.ends) for peer in peers],
        "TTFT": [(100 + peer.ttft.percent, [100 + end for end in peer.ttft.ends]) for peer in peers],
        "TPOT": [(100 + peer.tpot.percent, [100 + end for end in peer.tpot.ends]) for peer in peers],
    }
    with matplotlib_style.context(["default", STYLE]):
        figure = new_figure(190 + 46 * len(peers))
        height = figure.bbox.height
        add_heading(
            figure,
            "What plans, uniform ratios and presses of kvpress cost, and what they find",
            "In % of the full cache; PPL: its change. Bars: 95 % intervals. Blue: this library. "
            "*: made to see the question, which here comes after pruning.",
        )
        grid = figure.add_gridspec(
            1, len(columns), left=0.175, right=0.985, top=1 - 115 / height, bottom=50 / height, wspace=0.12
        )
        for number, (title, points) in enumerate(columns.items()):
            axes = figure.add_subplot(grid[number])
            for place, (peer, (value, (low, high))) in enumerate(zip(peers, points, strict=True)):
                colour = GREY if peer.name.startswith("kvpress") else BLUE
                axes.plot([low, high], [place, place], color=colour, linewidth=1.5)
                axes.plot([value], [place], color=colour, marker="o", markersize=5)
                text = f"{value:+.1f}" if title == "PPL" else f"{value:.0f}"
                axes.annotate(
                    pretty(text),
                    (value, place),
                    (0, 4),
                    textcoords="offset points",
                    fontsize=7,
                    ha="center",
                    va="bottom",
                )
            if title == "PPL":
                axes.set_xscale("symlog", linthresh=5)
                axes.set_xticks([0, 2, 5, 20, 100], ["0", "2", "5", "20", "100"])
                axes.minorticks_off()
            axes.margins(x=0.14)
            if title in {"bytes", "items found"}:
                axes.set_xlim(0, 112)
            axes.axvline(0 if title == "PPL" else 100, color="#BBBBBB", linewidth=1, zorder=0)
            axes.set_yticks(range(len(peers)), [peer.name for peer in peers] if number == 0 else [])
            axes.set_ylim(len(peers) - 0.5, -0.7)
            axes.tick_params(length=0)
            axes.set_title(title)
            axes.grid(axis="x")
    return figure

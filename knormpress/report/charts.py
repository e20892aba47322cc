"""The charts of measured rows, and any chart as SVG that can stand in a page among others."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence

from markupsafe import Markup

from knormpress.compare import Row
from knormpress.errors import KnormError
from knormpress.intervals import Change
from knormpress.plots import select_lengths
from knormpress.plots.comprehensive import draw_panels
from knormpress.plots.scaling import draw_scaling
from knormpress.plots.style import BAND, GREY, STYLE
from knormpress.plots.tradeoff import draw_tradeoff_panel
from knormpress.report.parts import Block, Chart, Charts, Heading
from knormpress.report.settings import Family
from knormpress.report.words import interval

__all__ = ["CHART_STYLE", "chart_blocks", "inline_svg", "is_large", "scaling_blocks"]

CHART_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "knormpress"}
"""Text stays text; and what is drawn twice is drawn alike."""

# The colours of themed charts that are no data, each with the name of the page's own.
_THEMED = {
    "#ffffff": "card",
    "#000000": "ink",
    GREY.lower(): "muted",
    STYLE["axes.edgecolor"].lower(): "muted",
    STYLE["grid.color"].lower(): "grid",
    BAND.lower(): "band",
}
_LARGE = 400.0  # points; wider ones can't be read when they are shrunk to a phone


def chart_blocks(found: Sequence[Family]) -> Iterator[Block]:
    """For each family and method: what speed costs in quality, and every figure against the keep ratio."""
    groups = [(family, group) for family in found for group in family.methods]
    for family, group in groups:
        if len(groups) > 1:
            yield Heading(", ".join(filter(None, (group[0].record.policy.method, family.title))))
        yield Charts((_tradeoff(group), *_panels(group)))


def scaling_blocks(rows: Sequence[Row]) -> Iterator[Block]:
    """How TTFT and TPOT grow with the context, where several lengths were measured alike."""
    try:
        shown, left_out = select_lengths(rows)
    except KnormError:  # no rows, or rows that share no picture
        return
    if shown:
        points = [
            f"{row.record.conditions.prompt_tokens:,} tokens, keep ratio {row.label}: {row.candidate.ttft_s:.3g} s and "
            f"{row.candidate.tpot_s * 1e3:.3g} ms"
            for row in shown
        ]
        words = f"TTFT and TPOT by length of the context. {'; '.join(points)}."
        yield Charts((Chart("Time by length of the context", draw_scaling(shown, left_out), words),))


def _tradeoff(rows: Sequence[Row]) -> Chart:
    points = [f"keep ratio {row.label}: TPOT {_said(row.tpot)}, PPL {_said(row.ppl)}" for row in rows]
    words = f"PPL change over TPOT change, against the full cache. {'; '.join(points)}."
    return Chart("What speed costs in quality", draw_tradeoff_panel(rows), words, themed=True)


def _panels(rows: Sequence[Row]) -> Iterator[Chart]:
    panels = draw_panels(rows)
    for name, title, said in _PANELS:
        values = "; ".join(f"keep ratio {row.label}: {said(row)}" for row in rows)
        yield Chart(title, panels[name], f"{title} by keep ratio, against the full cache. {values}.", themed=True)


def _said(change: Change) -> str:
    return f"{change} ({interval(change)})"


_PANELS: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    ("PPL", "Perplexity", lambda row: _said(row.ppl)),
    ("TPOT", "Time per output token", lambda row: _said(row.tpot)),
    ("TTFT", "Time to first token", lambda row: _said(row.ttft)),
    ("throughput", "Throughput", lambda row: _said(row.throughput)),
    ("cache", "Cache memory", lambda row: f"{row.cache_bytes / 1e6:,.1f} MB, {row.cache}"),
    ("KL", "KL divergence", lambda row: f"{row.kl:.3f} nats"),
    ("top-1", "Top-1 agreement", lambda row: f"{row.top1 * 100:.1f} %"),
)


def is_large(chart: Chart) -> bool:
    """Whether a chart is too wide to be shrunk to a phone."""
    return float(chart.figure.get_figwidth() * 72) > _LARGE


def inline_svg(chart: Chart, identifier: str) -> Markup:
    """A chart as an ``<svg>`` element, whose ids all begin with ``identifier``: no two of a page may be equal."""
    written = io.StringIO()
    chart.figure.savefig(written, format="svg", transparent=chart.themed)
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<style [^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{identifier}-", svg)
    if chart.themed:
        svg = re.sub("|".join(_THEMED), lambda found: f"var(--{_THEMED[found[0]]})", svg)
    head, rest = svg.split(">", 1)
    head = re.sub(r' (?:width|height|version|xmlns(?::xlink)?)="[^"]*"', "", head)
    labels = Markup('role="img" aria-labelledby="{0}-title" aria-describedby="{0}-words"').format(identifier)
    # matplotlib escapes all text that it writes into a picture.
    return Markup(f"{head} {labels}>{rest.rstrip()}")

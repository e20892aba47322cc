"""The charts of measured records, and SVG of any chart for use in a page with other charts."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence

from markupsafe import Markup

from knormpress.errors import KnormError
from knormpress.records.schema import Record
from knormpress.show.page.cost import cost_charts
from knormpress.show.page.parts import Block, Chart, Charts, Heading
from knormpress.show.page.settings import Family
from knormpress.show.page.words import interval
from knormpress.show.pictures.comprehensive import draw_panels
from knormpress.show.pictures.draw import select_lengths
from knormpress.show.pictures.retrieval import draw_retrieval
from knormpress.show.pictures.scaling import draw_scaling
from knormpress.show.pictures.style import BAND, GREY, STYLE
from knormpress.show.pictures.tradeoff import draw_tradeoff_panel
from knormpress.stats.intervals import Change

__all__ = ["CHART_STYLE", "chart_blocks", "inline_svg", "is_large", "scaling_blocks"]

CHART_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "knormpress"}
"""Keeps text as text, and gives the same SVG for the same chart."""

# The colours of themed charts that do not show data, with the names of the page's own colours.
_THEMED = {
    "#ffffff": "card",
    "#000000": "ink",
    GREY.lower(): "muted",
    STYLE["axes.edgecolor"].lower(): "muted",
    STYLE["grid.color"].lower(): "grid",
    BAND.lower(): "band",
}
_LARGE = 400.0  # points; a wider chart can't be read when it is shrunk to the width of a phone


def chart_blocks(families: Sequence[Family]) -> Iterator[Block]:
    """For each family and method: speed against quality, and every figure against the keep ratio."""
    # Where only the way of the prompt differs, points would lie on each other.
    whole = (
        (family, [record for record in group if not record.way]) for family in families for group in family.methods
    )
    groups = [(family, group) for family, group in whole if group]
    for family, group in groups:
        if len(groups) > 1:
            yield Heading(", ".join(filter(None, (group[0].policy.method, family.title))))
        yield Charts((_tradeoff(group), *_panels(group), *cost_charts(group), *_found(group)))


def scaling_blocks(records: Sequence[Record]) -> Iterator[Block]:
    """How TTFT and TPOT grow with the context, if several lengths were measured under the same settings."""
    try:
        shown, left_out = select_lengths(records)
    except KnormError:  # no records, or records that can't share a picture
        return
    if shown:
        words = f"TTFT and TPOT by length of the context. {'; '.join(map(_times, shown))}."
        yield Charts((Chart("Time by length of the context", draw_scaling(shown, left_out), words),))


def _times(record: Record) -> str:
    speed = record.latency.candidate_speed
    where = f"{record.conditions.prompt_tokens:,} tokens, keep ratio {record.label}"
    return f"{where}: {speed.ttft_s:.3g} s and {speed.tpot_s * 1e3:.3g} ms"


def _tradeoff(records: Sequence[Record]) -> Chart:
    points = [
        f"keep ratio {record.label}: TPOT {_change_text(record.latency.tpot)}, PPL {_change_text(record.quality.ppl)}"
        for record in records
    ]
    words = f"PPL change over TPOT change, against the full cache. {'; '.join(points)}."
    return Chart("What speed costs in quality", draw_tradeoff_panel(records), words, themed=True)


def _panels(records: Sequence[Record]) -> Iterator[Chart]:
    panels = draw_panels(records)
    for name, title, figure_text in _PANELS:
        if name not in panels:  # nothing was asked
            continue
        values = "; ".join(f"keep ratio {record.label}: {figure_text(record)}" for record in records)
        yield Chart(title, panels[name], f"{title} by keep ratio, against the full cache. {values}.", themed=True)


def _found(records: Sequence[Record]) -> Iterator[Chart]:
    asked = [record for record in records if record.retrieval and record.retrieval.items]
    if asked:
        words = "; ".join(f"keep ratio {record.label}: {_share_text(record)}" for record in asked)
        words = f"Share of the full cache's items that are found, by depth, length and task. {words}."
        yield Chart("What is found, by depth and length", draw_retrieval(asked, ""), words)


def _share_text(record: Record) -> str:
    share = record.retrieval.share if record.retrieval else None
    return "nothing was asked" if share is None else f"{share}, {share.percent}"


def _change_text(change: Change) -> str:
    return f"{change} ({interval(change)})"


_PANELS: tuple[tuple[str, str, Callable[[Record], str]], ...] = (
    ("PPL", "Perplexity", lambda record: _change_text(record.quality.ppl)),
    ("found", "Items found", _share_text),
    ("TPOT", "Time per output token", lambda record: _change_text(record.latency.tpot)),
    ("TTFT", "Time to first token", lambda record: _change_text(record.latency.ttft)),
    ("throughput", "Throughput", lambda record: _change_text(record.latency.throughput)),
    (
        "cache",
        "Cache memory",
        lambda record: f"{record.memory.candidate_cache_bytes / 1e6:,.1f} MB, {record.memory.change}",
    ),
    ("KL", "KL divergence", lambda record: f"{record.quality.kl:.3f} nats"),
    ("top-1", "Top-1 agreement", lambda record: f"{record.quality.top1 * 100:.1f} %"),
)


def is_large(chart: Chart) -> bool:
    """Whether a chart is too wide to be shrunk to the width of a phone."""
    return float(chart.figure.get_figwidth() * 72) > _LARGE


def inline_svg(chart: Chart, identifier: str) -> Markup:
    """A chart as an ``<svg>`` element. All its ids begin with ``identifier``, since ids must be unique in a page."""
    written = io.StringIO()
    chart.figure.savefig(written, format="svg", transparent=chart.themed)
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<style [^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{identifier}-", svg)
    if chart.themed:
        svg = re.sub("|".join(_THEMED), lambda colour: f"var(--{_THEMED[colour[0]]})", svg)
    head, rest = svg.split(">", 1)
    head = re.sub(r' (?:width|height|version|xmlns(?::xlink)?)="[^"]*"', "", head)
    labels = Markup('role="img" aria-labelledby="{0}-title" aria-describedby="{0}-words"').format(identifier)
    # matplotlib escapes all text in a picture.
    return Markup(f"{head} {labels}>{rest.rstrip()}")

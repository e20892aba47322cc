"""One page from any set of records: verdicts first, then tables, charts, controls and the raw numbers. Torch-free.

The page is a single file that loads nothing and runs no script; its Markdown form is for the summary of a CI job.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib import style as matplotlib_style

from knormpress.compare import group_rows, summarize
from knormpress.errors import KnormError
from knormpress.files import replacing
from knormpress.history import History
from knormpress.plan import Plan
from knormpress.plots.style import STYLE
from knormpress.progress import Progress, ticking
from knormpress.records import Record
from knormpress.report import past, words
from knormpress.report.charts import CHART_STYLE, chart_blocks, inline_svg, is_large, scaling_blocks
from knormpress.report.markdown import render_markdown
from knormpress.report.numbers import downloads
from knormpress.report.parts import Chart, Charts, Section
from knormpress.report.plans import plan_blocks
from knormpress.report.settings import describe_differences, environment_blocks, families
from knormpress.verdicts import THRESHOLDS

__all__ = ["build_sections", "render_page", "write_report"]

_PAGE = "page.html.j2"
_IN_SUMMARY = ("verdicts", "results", "plans", "controls")


def write_report(
    records: Sequence[Record],
    history: History,
    page: Path,
    markdown: Path | None = None,
    *,
    thresholds: Mapping[str, float] = THRESHOLDS,
    plans: Sequence[Plan] = (),
    progress: Progress | None = None,
) -> None:
    """Write the page, and where asked for its Markdown form; each beside its place first, then renamed.

    Args:
        records, history, thresholds, plans: see ``build_sections``.
        page, markdown: the files.
        progress: told of every chart.

    Raises:
        KnormError: there is nothing to report, a record is not sound, or a file can't be written; nothing is written.
    """
    sections = build_sections(records, history, thresholds, plans)
    for path in filter(None, (page, markdown)):
        if path.is_dir():
            raise KnormError(f"{path} is a folder; name a file to write to")
    texts = {page: render_page(sections, progress)}
    if markdown is not None:
        texts[markdown] = render_markdown([one for one in sections if one.identifier in _IN_SUMMARY])
    try:
        _write_whole(texts)
    except OSError as error:
        raise KnormError(f"{error.filename} can't be written ({error.strerror}); name another place") from error


def _write_whole(texts: Mapping[Path, str]) -> None:
    for path in texts:
        path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for path, text in texts.items():
            stack.enter_context(replacing(path)).write_text(text, encoding="utf-8")


def build_sections(
    records: Sequence[Record],
    history: History,
    thresholds: Mapping[str, float] = THRESHOLDS,
    plans: Sequence[Plan] = (),
) -> list[Section]:
    """All that a report says, in order; sections that have nothing to say are left out.

    Args:
        records: of two of one cell the later one stands.
        history: the stored runs.
        thresholds: see ``verdicts.THRESHOLDS``.
        plans: what ``knormpress tune`` found.

    Raises:
        KnormError: there is no record, no stored run and no plan, or a record is not sound.
    """
    if not records and not history.entries and not plans:
        raise KnormError("there is nothing to report; measure first, for example with: knormpress sweep")
    # Of two records of one cell the later one stands.
    rows = [row for group in group_rows(map(summarize, records)) for row in group]
    found = families(rows)
    verdicts, note = past.judge(history, thresholds)
    with matplotlib_style.context(["default", STYLE, CHART_STYLE]):
        charts = (*chart_blocks(found), *scaling_blocks(rows))
        plan_parts = tuple(plan_blocks(plans))
        history_blocks = tuple(past.past_blocks(history, verdicts))
    sections = [
        Section(
            "verdicts",
            "Verdicts",
            (*past.verdict_blocks(verdicts, note), *words.verdict_blocks(found, rows)),
        ),
        Section("results", "Results", (*describe_differences(rows), *words.table_blocks(found))),
        Section("plans", "A ratio per layer", plan_parts),
        Section("charts", "Charts", charts),
        Section("history", "History over commits", history_blocks),
        Section("controls", "Controls", tuple(words.control_blocks(found, rows)) if rows else ()),
        Section("environment", "Environment", tuple(environment_blocks(rows)) if rows else ()),
        Section("definitions", "What the numbers mean", (words.DEFINITIONS,)),
        Section("numbers", "Raw numbers", tuple(downloads(records, rows, history))),
    ]
    return [section for section in sections if section.blocks]


def render_page(sections: Sequence[Section], progress: Progress | None = None) -> str:
    """The page as HTML; ``progress`` is told of every chart."""
    blocks = [block for section in sections for block in section.blocks]
    charts = sum(len(block.charts) for block in blocks if isinstance(block, Charts))
    tick = ticking(progress or Progress(), charts, "drawing the charts")

    def drawn(chart: Chart, identifier: str) -> Markup:
        svg = inline_svg(chart, identifier)
        tick()
        return svg

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(svg=drawn, large=is_large, base64=_base64)
    template = environment.from_string(resources.files(__name__).joinpath(_PAGE).read_text(encoding="utf-8"))
    with matplotlib_style.context(["default", STYLE, CHART_STYLE]):
        return template.render(sections=sections)


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()

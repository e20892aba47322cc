"""One page from records, plans and stored runs: verdicts first, then tables, charts, controls and raw numbers.

The page is a single file that loads nothing and runs no script. Its Markdown form is for the summary of a CI job.
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

from knormpress.compare.settings import group_records
from knormpress.compare.verdicts import THRESHOLDS
from knormpress.errors import KnormError
from knormpress.files import room_for, writing
from knormpress.progress import Progress, ticking
from knormpress.records.checks import sound
from knormpress.records.history import History
from knormpress.records.plan import Plan
from knormpress.records.schema import Entry, Record
from knormpress.show.page import past, words
from knormpress.show.page.charts import CHART_STYLE, chart_blocks, inline_svg, is_large, scaling_blocks
from knormpress.show.page.cost import agreement_blocks
from knormpress.show.page.followed import tests_of
from knormpress.show.page.markdown import render_markdown
from knormpress.show.page.numbers import downloads
from knormpress.show.page.parts import Chart, Charts, Section
from knormpress.show.page.plans import plan_blocks
from knormpress.show.page.settings import describe_differences, environment_blocks, families
from knormpress.show.page.tasks import task_blocks
from knormpress.show.page.trends import follow, trend_blocks
from knormpress.show.pictures.style import STYLE

__all__ = ["build_sections", "render_page", "write_report"]

_PAGE = "page.html.j2"
_IN_SUMMARY = ("verdicts", "results", "plans", "tasks", "controls")


def write_report(
    records: Sequence[Record],
    history: History,
    page: Path,
    markdown: Path | None = None,
    *,
    thresholds: Mapping[str, float] = THRESHOLDS,
    plans: Sequence[Plan] = (),
    tasks: Sequence[Entry] = (),
    progress: Progress | None = None,
) -> None:
    """Write the page, and its Markdown form if wanted; no file is ever left half written.

    Args:
        records, history, thresholds, plans, tasks: see ``build_sections``.
        page, markdown: the files to write; None for no Markdown.
        progress: gets a step for each chart.

    Raises:
        KnormError: there is nothing to report, a record is unusable, or a file can't be written; nothing is written.
    """
    sections = build_sections(records, history, thresholds, plans, tasks)
    with ExitStack() as stack:  # all files or none
        stack.enter_context(room_for(*filter(None, (page, markdown))))
        texts = {page: render_page(sections, progress)}
        if markdown is not None:
            texts[markdown] = render_markdown([section for section in sections if section.identifier in _IN_SUMMARY])
        for path, text in texts.items():
            stack.enter_context(writing(path)).write_text(text, encoding="utf-8")


def build_sections(
    records: Sequence[Record],
    history: History,
    thresholds: Mapping[str, float] = THRESHOLDS,
    plans: Sequence[Plan] = (),
    tasks: Sequence[Entry] = (),
) -> list[Section]:
    """The sections of a report, in order, without empty ones.

    Args:
        records: of two records of the same cell, the later one is used.
        history: the stored runs.
        thresholds: see ``verdicts.THRESHOLDS``.
        plans: plans from ``knormpress tune``.
        tasks: runs of ``knormpress lm-eval``; those of stored runs are shown too.

    Raises:
        KnormError: there is no record, no stored run, no plan and no task, or a record is unusable.
    """
    if not records and not history.entries and not plans and not tasks:
        raise KnormError("there is nothing to report; measure first, for example with: knormpress sweep")
    cells = [record for group in group_records(map(sound, records)) for record in group]
    grouped = families(cells)
    verdicts, note = past.judge(history, thresholds)
    followed = list(follow(tests_of(history.entries)))
    with matplotlib_style.context(["default", STYLE, CHART_STYLE]):
        charts = (*chart_blocks(grouped), *scaling_blocks(cells), *agreement_blocks(cells))
        plan_parts = tuple(plan_blocks(plans))
        history_blocks = tuple(past.past_blocks(history, verdicts, followed))
    sections = [
        Section(
            "verdicts",
            "Verdicts",
            (
                *past.verdict_blocks(verdicts, note),
                *trend_blocks(followed),
                *past.decided_blocks(history),
                *words.verdict_blocks(grouped, cells),
            ),
        ),
        Section("results", "Results", (*describe_differences(cells), *words.table_blocks(grouped))),
        Section("plans", "A ratio per layer", plan_parts),
        Section("tasks", "Tasks of lm-evaluation-harness", tuple(task_blocks([*history.entries, *tasks]))),
        Section("charts", "Charts", charts),
        Section("history", "History over commits", history_blocks),
        Section("controls", "Controls", tuple(words.control_blocks(grouped, cells)) if cells else ()),
        Section("environment", "Environment", tuple(environment_blocks(cells)) if cells else ()),
        Section("definitions", "What the numbers mean", (words.DEFINITIONS,)),
        Section("numbers", "Raw numbers", tuple(downloads(records, cells, history))),
    ]
    return [section for section in sections if section.blocks]


def render_page(sections: Sequence[Section], progress: Progress | None = None) -> str:
    """The page as HTML; ``progress`` gets a step for each chart."""
    blocks = [block for section in sections for block in section.blocks]
    charts = sum(len(block.charts) for block in blocks if isinstance(block, Charts))
    tick = ticking(progress or Progress(), charts, "drawing the charts")

    def draw(chart: Chart, identifier: str) -> Markup:
        svg = inline_svg(chart, identifier)
        tick()
        return svg

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(svg=draw, large=is_large, base64=_base64)
    template = environment.from_string(
        resources.files("knormpress.show.page").joinpath(_PAGE).read_text(encoding="utf-8")
    )
    with matplotlib_style.context(["default", STYLE, CHART_STYLE]):
        return template.render(sections=sections)


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()

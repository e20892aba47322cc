"""The report as one HTML page: well formed, harmless, the same each time, whole in itself, and never half written."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import Markup
from matplotlib.figure import Figure

from knormpress.records.history import History
from knormpress.records.jsonl import read_records
from knormpress.records.schema import Record
from knormpress.show.page import report
from knormpress.show.page.charts import chart_blocks, inline_svg, is_large
from knormpress.show.page.markdown import render_markdown
from knormpress.show.page.parts import Chart, Charts, Section
from knormpress.show.page.report import build_sections, render_page, write_report
from knormpress.show.page.settings import families
from tests.entry_factory import make_entry
from tests.plan_factory import make_plan
from tests.record_factory import make_planned, make_record, make_records

HOSTILE = "</script><b onclick=x>\"'&`|*_[a](http://b)@c\u2028"
NOTHING = History(())


class Outline(HTMLParser):
    """Headings, identifiers, references to them, and tables without a caption."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.references: set[str] = set()
        self.tags: list[str] = []
        self.scopes: list[str | None] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "th":
            self.scopes.append(dict(attributes).get("scope"))
        for name, value in attributes:
            assert not name.startswith("on"), (tag, name)
            if name == "id":
                self.ids.append(str(value))
            if name in ("aria-labelledby", "aria-describedby"):
                self.references |= set(str(value).split())
            if name in ("href", "xlink:href") and str(value).startswith("#"):
                self.references.add(str(value)[1:])


@pytest.fixture
def _quick_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts take most of a page's time; many a test needs none."""
    monkeypatch.setattr(report, "inline_svg", lambda chart, identifier: Markup("<svg></svg>"))


def stored(*tpots: float) -> History:
    entries = (
        make_entry(run=f"r{n}", commit=None, created=f"2026-01-0{n + 1}", noise=0.002, tpot=tpot)
        for n, tpot in enumerate(tpots)
    )
    return History(tuple(entries))


def page_of(records: list[Record], history: History = NOTHING) -> str:
    return render_page(build_sections(records, history))


def test_the_page_is_well_formed_for_those_who_hear_it() -> None:
    records = [*make_records([1.0, 0.9, 0.5]), make_record(0.9, prompt_tokens=512), make_record(0.5, method="random")]
    outline = Outline(page_of(records, stored(-20.0, 10.0)))
    assert outline.headings[0] == 1
    assert outline.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(outline.headings, outline.headings[1:], strict=False))
    assert len(outline.ids) == len(set(outline.ids))
    assert outline.references <= set(outline.ids)
    assert outline.tags.count("caption") == outline.tags.count("table") > 4
    assert set(outline.scopes) == {"col", "row"}
    assert outline.tags.count("main") == outline.tags.count("nav") == outline.tags.count("header") == 1
    assert outline.tags.count("svg") > 12
    assert "script" not in outline.tags


def test_charts_have_a_plan_once() -> None:
    (charts,) = chart_blocks(families([*make_records([0.9], prompt_tokens=4096), *make_planned()]))
    assert isinstance(charts, Charts)
    *measured, counted = charts.charts
    assert [chart.words.count("keep ratio 0.4:") for chart in measured] == [1] * len(measured)
    assert counted.words.count("keep ratio plan 0.40, a decoded token:") == 1


def test_equal_records_give_equal_pages() -> None:
    first, second = page_of([make_record(0.9)]), page_of([make_record(0.9)])
    assert first == second
    assert first.count("<svg") == 9


def test_hostile_names_stay_text() -> None:
    names = {"model_name": HOSTILE, "text_name": HOSTILE, "device_name": HOSTILE, "method": HOSTILE}
    sections = build_sections([make_record(0.9, **names)], History((make_entry(test=HOSTILE, **names),)))
    page = render_page(sections)
    assert "<b " not in page
    assert "</script" not in page
    outline = Outline(page)
    assert not {"script", "b"} & set(outline.tags)
    markdown = render_markdown(sections)
    assert "<b " not in markdown
    assert "@c" not in markdown
    assert "http://b" not in markdown
    for line in markdown.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (7, 9, 10, 11, 12), line


def download(page: str, name: str) -> str:
    link = re.search(rf'download="{re.escape(name)}" href="data:[^,]+;base64,([^"]*)"', page)
    assert link
    return base64.b64decode(link[1]).decode()


@pytest.mark.usefixtures("_quick_charts")
def test_downloads_hold_the_records_as_they_were(tmp_path: Path) -> None:
    record = make_record(0.9, model_name=HOSTILE)
    unbounded = record.latency.model_copy(update={"calibration_s": (math.nan, math.inf)})
    records = [record.model_copy(update={"latency": unbounded}), make_record(0.5, model_name="=cmd|x")]
    page = page_of(records, stored(-20.0))
    (tmp_path / "records.jsonl").write_text(download(page, "records.jsonl"))
    read = list(read_records(tmp_path / "records.jsonl"))
    assert [one.model_dump_json() for one in read] == [one.model_dump_json() for one in records]
    (past,) = csv.DictReader(io.StringIO(download(page, "history.csv"), newline=""))
    assert float(past["TPOT / full cache"]) == pytest.approx(0.8, rel=0.01)
    lines = list(csv.DictReader(io.StringIO(download(page, "results.csv"), newline="")))
    assert [line["keep_ratio"] for line in lines] == ["0.9", "0.5"]
    assert [line["model"] for line in lines] == [HOSTILE, "'=cmd|x"]
    for name, value in (
        ("ppl_change_percent", record.quality.ppl.percent),
        ("tpot_change_low", record.latency.tpot.low),
        ("cache_change_high", record.memory.change.high),
        ("full_tpot_s", record.latency.baseline_speed.tpot_s),
        ("pruned_gap_p90_s", record.latency.candidate_speed.gap_p90_s),
        ("pruned_cache_bytes", record.memory.candidate_cache_bytes),
        ("full_ppl", record.quality.baseline_ppl),
        ("pairs", record.latency.pairs),
    ):
        assert float(lines[0][name]) == value


def test_a_foreign_chart_is_shown_on_a_light_card_and_scrolls_when_large() -> None:
    figure = Figure(figsize=(10.0, 6.0))
    figure.text(0.5, 0.5, "<&>")
    chart = Chart("A map <b>", figure, "what it shows")
    svg = inline_svg(chart, "x")
    assert is_large(chart)
    assert "#ffffff" in svg
    assert "&lt;&amp;&gt;" in svg or "<path" in svg
    page = render_page([Section("charts", "Charts", (Charts((chart,)),))])
    assert '<figure class="light large">' in page
    assert "A map &lt;b&gt;" in page


@pytest.mark.usefixtures("_quick_charts")
def test_markdown_holds_the_verdicts_and_tables_but_no_chart(tmp_path: Path) -> None:
    page, markdown = tmp_path / "a" / "r.html", tmp_path / "a" / "r.md"
    write_report(make_records([1.0, 0.9]), NOTHING, page, markdown, plans=[make_plan()])
    text = markdown.read_text(encoding="utf-8")
    assert text.startswith("# KnormPress report\n\n## Verdicts\n")
    assert "| Keep ratio | Method | TTFT |" in text
    assert "(the plan)" in text
    assert "svg" not in text
    assert page.read_text(encoding="utf-8").count("<svg") == 9 + 3
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"r.html", "r.md"}


@pytest.mark.usefixtures("_quick_charts")
def test_a_kill_while_writing_leaves_the_old_files_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, markdown = tmp_path / "r.html", tmp_path / "r.md"
    page.write_text("old")
    whole = Path.write_text

    def killed(self: Path, text: str, encoding: str) -> int:
        if self.name.startswith(".r.md"):
            whole(self, text[:10], encoding=encoding)
            raise KeyboardInterrupt
        return whole(self, text, encoding=encoding)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            write_report([make_record(0.9)], NOTHING, page, markdown)
    assert page.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]

from __future__ import annotations

import base64
import csv
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from knormpress.cli import main
from knormpress.compare import summarize
from knormpress.errors import KnormError
from knormpress.history import History, store
from knormpress.plan import write_plan
from knormpress.records import Record, append_record, read_records
from knormpress.report import build_sections, render_page, write_report
from knormpress.report.charts import inline_svg, is_large
from knormpress.report.markdown import render_markdown
from knormpress.report.parts import Chart, Charts, Findings, Heading, Section, Table, Words
from knormpress.report.settings import families
from tests.entry_factory import make_entry
from tests.plan_factory import make_plan
from tests.record_factory import make_record, make_records

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


def texts(sections: list[Section], identifier: str) -> str:
    section = next(section for section in sections if section.identifier == identifier)
    return render_markdown([section])


def page_of(records: list[Record], history: History = NOTHING) -> str:
    return render_page(build_sections(records, history))


def download(page: str, name: str) -> str:
    found = re.search(rf'download="{re.escape(name)}" href="data:[^,]+;base64,([^"]*)"', page)
    assert found
    return base64.b64decode(found[1]).decode()


def history(*tpots: float, **parameters: float) -> History:
    return History(
        tuple(
            make_entry(run=f"r{n}", commit=None, created=f"2026-01-0{n + 1}", noise=0.002, tpot=tpot, **parameters)
            for n, tpot in enumerate(tpots)
        )
    )


def test_verdicts_come_first_and_in_plain_words() -> None:
    sections = build_sections(make_records([1.0, 0.9, 0.5]), NOTHING)
    assert [s.identifier for s in sections] == [
        "verdicts",
        "results",
        "charts",
        "controls",
        "environment",
        "definitions",
        "numbers",
    ]
    verdicts = texts(sections, "verdicts")
    assert "At keep ratio 0.9 perplexity rises by 1.4 % (+0.6 to +2.1): within ±5 %." in verdicts
    assert "Perplexity stays within ±5 %: met at 0.9; not met at 0.5." in verdicts
    assert "At keep ratio 0.9 the guide claims \N{MINUS SIGN}87 %; measured" in verdicts
    assert "a cache that was never pruned" in verdicts


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"ppl": 4.5}, "but the interval crosses the limit: measured again, it may end the other way."),
        ({"rounds": 2}, "from too few runs for an interval."),
        ({"ppl": -3.0, "noise": 0.0}, "perplexity falls by 3.0 %"),
        ({"ttft": 0.0, "noise": 0.0}, "time to first token does not change (0.0 to 0.0)"),
    ],
)
def test_how_sure_a_verdict_is_is_said(parameters: dict[str, float], words: str) -> None:
    sections = build_sections([make_record(0.9, **parameters)], NOTHING)  # type: ignore[arg-type]
    assert words in texts(sections, "verdicts")


def test_records_that_differ_are_grouped_and_the_difference_named() -> None:
    records = [
        *make_records([0.9, 0.5]),
        make_record(0.9, prompt_tokens=8192),
        make_record(0.9, prompt_tokens=8192, device="cuda"),
        make_record(0.5, method="random"),
    ]
    sections = build_sections(records, NOTHING)
    results = texts(sections, "results")
    assert "prompt tokens (1,024 and 8,192)" in results
    assert "method (knorm and random)" in results
    assert len(families(list(map(summarize, records)))) == 3
    tables = [block for block in sections[1].blocks if isinstance(block, Table) and not block.folded]
    assert [[(row[0], row[1]) for row in table.rows] for table in tables] == [
        [("0.9", "knorm"), ("0.5", "knorm"), ("0.5", ("random", "control"))],
        [("0.9", "knorm")],
        [("0.9", "knorm")],
    ]
    assert "The guide's targets: knorm, device cuda" in texts(sections, "verdicts")


def test_a_later_record_of_a_cell_replaces_the_earlier() -> None:
    results = texts(build_sections([make_record(0.9, ppl=3.0), make_record(0.9, ppl=4.0)], NOTHING), "results")
    assert "+4.0 %" in results
    assert "+3.0 %" not in results


@pytest.mark.parametrize(
    ("records", "word"),
    [
        ([make_record(0.7), make_record(0.7, method="random", ppl=60.0)], "seen to be worse"),
        ([make_record(0.7), make_record(0.7, method="random", ppl=2.0)], "not seen to be worse"),
        ([make_record(0.7), make_record(0.5, method="random")], "alone"),
        ([make_record(0.7), make_record(0.7, method="random", fingerprint="0" * 64)], "alone"),
        ([make_record(1.0)], "as it must be"),
        ([make_record(1.0, method="full")], "noise"),
    ],
)
def test_controls(records: list[Record], word: str) -> None:
    assert f"- **{word}**:" in texts(build_sections(records, NOTHING), "controls")


def test_broken_controls_are_called_broken() -> None:
    whole, pruned = make_record(1.0), make_record(0.5)
    scores = [
        (whole, 0.1, "broken"),
        (pruned, 0.0, "not pruned"),
    ]
    for record, kl, word in scores:
        documents = tuple(score.model_copy(update={"kl": kl}) for score in record.quality.documents)
        changed = record.model_copy(update={"quality": record.quality.model_copy(update={"documents": documents})})
        assert f"- **{word}**:" in texts(build_sections([changed], NOTHING), "controls")


def test_controls_of_several_prompt_lengths_are_told_apart() -> None:
    records = [make_record(1.0, prompt_tokens=tokens) for tokens in (512, 2048)]
    (section,) = [section for section in build_sections(records, NOTHING) if section.identifier == "controls"]
    kinds = [block.text if isinstance(block, Heading) else type(block) for block in section.blocks[:4]]
    assert kinds == [
        "With prompt tokens 512, context tokens 512",
        Findings,
        "With prompt tokens 2,048, context tokens 2,048",
        Findings,
    ]


def test_a_control_that_was_not_measured_is_missed() -> None:
    assert "knormpress sweep --method random" in texts(build_sections([make_record(0.9)], NOTHING), "controls")


def test_the_newest_run_that_regressed_is_told_of_and_marked() -> None:
    sections = build_sections([], history(-20.0, -20.0, 10.0))
    assert "1 test was compared: 1 regressed." in texts(sections, "verdicts")
    past = next(section for section in sections if section.identifier == "history")
    assert "| 1.100 (regressed) |" in texts(sections, "history")
    (charts,) = [block for block in past.blocks if isinstance(block, Charts)]
    tpot = next(chart for chart in charts.charts if chart.title.startswith("Time per output"))
    assert "Regressed: test 1 at no git (1." in tpot.words
    assert "Regressed: none." in charts.charts[0].words
    rings = [line for line in tpot.figure.axes[0].lines if line.get_markersize() == 10]
    assert [list(line.get_xdata()) for line in rings] == [[2]]  # type: ignore[arg-type]


def test_a_regression_that_an_earlier_run_found_stays_marked() -> None:
    entries = list(history(-20.0, -20.0, -20.0).entries)
    entries[1] = entries[1].model_copy(update={"verdicts": {"bytes": "regressed"}})
    assert "(regressed)" in texts(build_sections([], History(tuple(entries))), "history")


def test_a_test_measured_under_other_conditions_gets_a_line_of_its_own() -> None:
    entries = (*history(-20.0).entries, make_entry(run="r2", created="2026-01-05", commit=None, prompt_tokens=2048))
    assert "| 2 | tests/test\\_x.py" in texts(build_sections([], History(entries)), "history")


def test_entries_without_a_figure_are_drawn_as_far_as_they_go() -> None:
    entries = tuple(
        make_entry(run=f"r{n}", test=f"test_{part}", parts=(part,), commit=None)
        for n, part in enumerate(("latency", "memory", "quality"))
    )
    words = texts(build_sections([], History(entries)), "history")
    assert "none" in words
    assert "nan" not in words


def test_a_history_that_git_does_not_know_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    entries = (make_entry(run="a"), make_entry(run="b", created="2026-05-01T00:00:00+00:00"))
    assert "can't be judged: git does not know the commit" in texts(build_sections([], History(entries)), "verdicts")


def test_the_page_is_well_formed_for_those_who_hear_it() -> None:
    records = [*make_records([1.0, 0.9, 0.5]), make_record(0.9, prompt_tokens=512), make_record(0.5, method="random")]
    outline = Outline(page_of(records, history(-20.0, 10.0)))
    assert outline.headings[0] == 1
    assert outline.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(outline.headings, outline.headings[1:], strict=False))
    assert len(outline.ids) == len(set(outline.ids))
    assert outline.references <= set(outline.ids)
    assert outline.tags.count("caption") == outline.tags.count("table") > 4
    assert set(outline.scopes) == {"col", "row"}
    assert outline.tags.count("main") == outline.tags.count("nav") == outline.tags.count("header") == 1
    assert "script" not in outline.tags


def test_equal_records_give_equal_pages() -> None:
    records = make_records([0.9, 0.5])
    assert page_of(records) == page_of(records)


def test_hostile_names_stay_text() -> None:
    names = {"model_name": HOSTILE, "text_name": HOSTILE, "device_name": HOSTILE, "method": HOSTILE}
    stored = History((make_entry(test=HOSTILE, **names),))
    sections = build_sections([make_record(0.9, **names)], stored)
    page = render_page(sections)
    assert "<b " not in page
    assert "</script" not in page
    outline = Outline(page)
    assert "script" not in outline.tags
    assert "b" not in outline.tags
    markdown = render_markdown(sections)
    assert "<b " not in markdown
    assert "@c" not in markdown
    assert "http://b" not in markdown
    for line in markdown.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (7, 9, 10), line


def test_downloads_hold_the_records_as_they_were(tmp_path: Path) -> None:
    record = make_record(0.9, model_name=HOSTILE)
    unbounded = record.latency.model_copy(update={"calibration_s": (math.nan, math.inf)})
    records = [record.model_copy(update={"latency": unbounded}), make_record(0.5, model_name="=cmd|x")]
    page = page_of(records, history(-20.0))
    (tmp_path / "records.jsonl").write_text(download(page, "records.jsonl"))
    read = list(read_records(tmp_path / "records.jsonl"))
    assert [one.model_dump_json() for one in read] == [one.model_dump_json() for one in records]
    (past,) = csv.DictReader(io.StringIO(download(page, "history.csv"), newline=""))
    assert float(past["TPOT / full cache"]) == pytest.approx(0.8, rel=0.01)
    rows = list(csv.DictReader(io.StringIO(download(page, "results.csv"), newline="")))
    assert [row["keep_ratio"] for row in rows] == ["0.9", "0.5"]
    assert [row["model"] for row in rows] == [HOSTILE, "'=cmd|x"]
    assert float(rows[0]["ppl_change_percent"]) == summarize(record).ppl.percent


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


def test_markdown_holds_the_verdicts_and_tables_but_no_chart(tmp_path: Path) -> None:
    write_report(make_records([1.0, 0.9]), NOTHING, tmp_path / "a" / "r.html", tmp_path / "a" / "r.md")
    text = (tmp_path / "a" / "r.md").read_text(encoding="utf-8")
    assert text.startswith("# KnormPress report\n\n## Verdicts\n")
    assert "| Keep ratio | Method | TTFT |" in text
    assert "svg" not in text
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["r.html", "r.md"]


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


def test_the_command_takes_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    append_record(tmp_path / "results" / "results.jsonl", make_record(0.9))
    append_record(tmp_path / "results" / "baseline.jsonl", make_record(1.0, method="full"))
    store(tmp_path / ".benchmarks", make_entry(commit=None))
    assert main(["report", "--markdown", "summary.md"]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The full cache against itself" in page
    assert "History over commits" in page
    assert (tmp_path / "summary.md").is_file()
    assert main(["report", "results/results.jsonl", "--storage", "none", "--output", "one.html"]) == 0
    assert "against itself:" not in (tmp_path / "one.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to report; measure first"),
        (["missing.jsonl"], "no records can be read from missing.jsonl"),
        (["broken.jsonl"], "broken.jsonl line 1 is not a whole record"),
        (["sick.jsonl"], "the record of knorm at keep ratio 0.9, document 0, has a score of nan"),
        (["good.jsonl", "--output", "."], ". is a folder; name a file to write to"),
        (["good.jsonl", "--output", "good.jsonl/x.html"], "good.jsonl can't be written"),
    ],
)
def test_errors_are_one_line_and_write_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    sick = make_record(0.9)
    documents = (sick.quality.documents[0].model_copy(update={"kl": math.nan}),)
    append_record(Path("good.jsonl"), make_record(0.9))
    append_record(
        Path("sick.jsonl"),
        sick.model_copy(update={"quality": sick.quality.model_copy(update={"documents": documents})}),
    )
    Path("broken.jsonl").write_text("{")
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", *arguments, "--markdown", "summary.md"]) == 2
    *progress, line = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert all(told.endswith("drawing the charts") for told in progress)
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_at_all_is_refused() -> None:
    with pytest.raises(KnormError, match="nothing to report"):
        build_sections([], NOTHING)


def test_records_of_the_full_cache_alone_have_nothing_to_judge() -> None:
    sections = build_sections([make_record(1.0, method="full")], NOTHING)
    assert "there is nothing to judge" in texts(sections, "verdicts")
    assert not any(isinstance(block, Findings) for block in sections[0].blocks)
    assert any(isinstance(block, Words) for block in sections[0].blocks)


def test_a_plan_has_its_table_and_its_pictures(tmp_path):
    plan = make_plan()
    sections = build_sections([], NOTHING, plans=[plan])
    (section,) = (one for one in sections if one.identifier == "plans")
    (table,) = (block for block in section.blocks if isinstance(block, Table))
    assert len(table.rows) == len(plan.frontier)
    assert sum("(the plan)" in row[0] for row in table.rows) == 1
    (charts,) = (block for block in section.blocks if isinstance(block, Charts))
    assert len(charts.charts) == 3
    write_report([], NOTHING, tmp_path / "page.html", tmp_path / "summary.md", plans=[plan])
    assert "(the plan)" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "page.html").read_text().count("<svg") == 3


def test_several_lengths_are_drawn_against_the_context():
    records = [make_record(0.5, prompt_tokens=tokens) for tokens in (512, 2048)]
    titles = [
        chart.title
        for section in build_sections(records, NOTHING)
        for block in section.blocks
        if isinstance(block, Charts)
        for chart in block.charts
    ]
    assert titles.count("Time by length of the context") == 1
    assert "Time by length of the context" not in str(build_sections(records[:1], NOTHING))


def test_the_command_takes_plans_beside_records(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_plan(make_plan(), Path("plan.json"))
    append_record(Path("results.jsonl"), make_record(0.5))
    assert main(["report", "results.jsonl", "plan.json"]) == 0
    assert "(the plan)" in Path("report.html").read_text()

"""``knormpress report``: what it takes, what it writes and what it prints."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from markupsafe import Markup

from knormpress.cli.app import main
from knormpress.records.history import store
from knormpress.records.jsonl import append_record
from knormpress.records.plan import write_plan
from knormpress.show.page import report
from knormpress.show.progress import TerminalProgress
from tests.entry_factory import make_entry
from tests.plan_factory import make_plan
from tests.record_factory import make_record
from tests.unit.cli.conftest import Fails


@pytest.fixture(autouse=True)
def _quick_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "inline_svg", lambda chart, identifier: Markup("<svg></svg>"))


def page(name: str = "report.html") -> str:
    return Path(name).read_text(encoding="utf-8")


def test_it_takes_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    append_record(Path("results", "results.jsonl"), make_record(0.9))
    append_record(Path("results", "baseline.jsonl"), make_record(1.0, method="full"))
    write_plan(make_plan(), Path("results", "plan.json"))
    store(Path(".benchmarks"), make_entry(commit=None))
    Path(".benchmarks", "notes.json").write_text("{}")
    assert main(["report", "--markdown", "summary.md"]) == 0
    note, *written = capsys.readouterr().out.splitlines()
    assert "notes.json" in note
    assert written == ["report.html", "summary.md"]
    for part in ("The full cache against itself", "History over commits", "(the plan)"):
        assert part in page()
    assert "The full cache against itself" in page("summary.md")


def test_it_takes_what_is_named_and_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    append_record(Path("results", "results.jsonl"), make_record(0.9))
    append_record(Path("results", "baseline.jsonl"), make_record(1.0, method="full"))
    write_plan(make_plan(), Path("plan.json"))
    arguments = ["results/results.jsonl", "plan.json", "--storage", "none", "--output", "one.html"]
    assert main(["report", *arguments]) == 0
    assert capsys.readouterr().out == "one.html\n"
    assert "(the plan)" in page("one.html")
    assert "against itself:" not in page("one.html")


def test_it_tells_of_every_chart(monkeypatch: pytest.MonkeyPatch) -> None:
    append_record(Path("results.jsonl"), make_record(0.9))
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(TerminalProgress, "step", lambda self, done, total, doing: told.append((done, total)))
    assert main(["report", "results.jsonl"]) == 0
    charts = page().count("<figure")
    assert charts
    assert told == [(done, charts) for done in range(charts + 1)]


def test_ctrl_c_leaves_the_old_page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    append_record(Path("results.jsonl"), make_record(0.9))
    Path("report.html").write_text("old")
    monkeypatch.setattr(TerminalProgress, "step", interrupt)
    assert main(["report", "results.jsonl"]) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("stopped: ")
    assert page() == "old"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "knormpress sweep"),
        (["missing.jsonl"], "missing.jsonl"),
        (["missing.json"], "missing.json"),
        (["broken.jsonl"], "broken.jsonl line 1"),
        (["sick.jsonl"], "knorm at keep ratio 0.9, document 0, has a score of nan"),
        (["good.jsonl", "--output", "."], ". is a folder"),
        (["good.jsonl", "--output", "good.jsonl/x.html"], "written to good.jsonl"),
    ],
)
def test_errors_are_one_line_and_write_nothing(arguments: list[str], named: str, fails: Fails) -> None:
    sick = make_record(0.9)
    documents = (sick.quality.documents[0].model_copy(update={"kl": math.nan}),)
    quality = sick.quality.model_copy(update={"documents": documents})
    append_record(Path("good.jsonl"), make_record(0.9))
    append_record(Path("sick.jsonl"), sick.model_copy(update={"quality": quality}))
    Path("broken.jsonl").write_text("{")
    assert named in fails("report", *arguments, "--markdown", "summary.md")

"""Verdicts as text and as Markdown: all that was found, the worst first."""

from __future__ import annotations

from knormpress.compare.verdicts import THRESHOLDS, Finding, Verdict, judge
from knormpress.show.verdict_table import count_words, verdict_lines, verdict_markdown, worst_first
from knormpress.stats.intervals import Change
from tests.entry_factory import make_entry, make_tasks


def test_the_worst_comes_first_with_every_figure() -> None:
    before, now = (
        entry.model_copy(update={"lm_eval": make_tasks()}) for entry in (make_entry(), make_entry(tpot=40.0))
    )
    slower = judge([before], [now], THRESHOLDS, "against aaa")
    verdicts = [Verdict("tests/a.py::test_a", "ok", "against aaa"), slower]
    assert [verdict.word for verdict in worst_first(verdicts)] == ["regressed", "ok"]
    assert count_words(verdicts) == "1 regressed, 1 ok"
    lines = list(verdict_lines(verdicts))
    assert lines[0] == "1 regressed, 1 ok"
    assert lines[1].split() == ["regressed", "tests/test_x.py::test_x"]
    assert max(map(len, lines)) <= 80
    assert {line.split()[0] for line in lines} >= THRESHOLDS.keys()
    page = verdict_markdown(verdicts)
    assert "| regressed | tests/test_x.py::test_x |" in page
    assert page.count("| tests/test_x.py::test_x |") == 1 + len(THRESHOLDS)
    assert page.index("| regressed |") < page.index("| ok |")


def test_large_figures_fit_80_columns() -> None:
    change = Change(-1234.5, -2345.6, 12345.6)
    long = Finding("throughput", "incomparable", ("12345.6 ms", "12345.7 ms"), change, "")
    short = Finding("ppl", "ok", ("+1.0 %", "+1.0 %"), Change(0.0, 0.0, 0.0), "")
    verdict = Verdict("test_it.py::test_x", "noise", "a reason of some length " * 9, (long, short))
    lines = list(verdict_lines([verdict]))
    assert max(map(len, lines)) <= 80
    assert str(change) in " ".join(lines)
    assert change.interval in " ".join(lines)
    assert any(str(short.change) in line and "ppl" in line for line in lines)


def test_a_name_breaks_no_markdown_table() -> None:
    page = verdict_markdown([Verdict("test_it.py::test_x[a|b\nc]", "new", "no | history")])
    assert "| new | test_it.py::test_x[a\\|b c] | no \\| history |" in page

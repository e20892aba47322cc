"""What a report says: verdicts, results, controls and the history, in words. No chart is drawn for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from knormpress.records.decisions import Acceptance, Pin, Rename
from knormpress.records.history import History
from knormpress.records.plan import Plan
from knormpress.records.schema import Record
from knormpress.show.page import report
from knormpress.show.page.cost import agreement_blocks, cost_tables
from knormpress.show.page.markdown import render_markdown
from knormpress.show.page.parts import Charts, Heading, Section, Statements, Table, Words
from knormpress.show.page.report import build_sections
from knormpress.show.page.settings import families
from knormpress.show.page.words import interval
from knormpress.stats.intervals import Change
from tests.entry_factory import make_entry
from tests.plan_factory import make_plan
from tests.record_factory import make_planned, make_record, make_records, without_more
from tests.repository import Repository

NOTHING = History(())


@pytest.fixture(autouse=True)
def _no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("chart_blocks", "agreement_blocks"):
        monkeypatch.setattr(report, name, lambda records: ())


class Report:
    """The sections of a report by their identifiers, and each as Markdown."""

    def __init__(self, records: Sequence[Record] = (), history: History = NOTHING, plans: Sequence[Plan] = ()) -> None:
        self.sections = {section.identifier: section for section in build_sections(records, history, plans=plans)}

    def __getitem__(self, identifier: str) -> str:
        return render_markdown([self.sections[identifier]])


def stored(*tpots: float) -> History:
    """A run for each change of TPOT, one a day."""
    return History(
        tuple(
            make_entry(run=f"r{n}", commit=None, created=f"2026-01-0{n + 1}", noise=0.002, tpot=tpot)
            for n, tpot in enumerate(tpots)
        )
    )


def test_verdicts_come_first_and_in_plain_words() -> None:
    told = Report(make_records([1.0, 0.9, 0.5]))
    assert list(told.sections) == ["verdicts", "results", "controls", "environment", "definitions", "numbers"]
    assert "0.9 perplexity rises by 1.4 % (+" in told["verdicts"]
    assert "met at 0.9; not met at 0.5." in told["verdicts"]
    assert "\N{MINUS SIGN}87 %; measured" in told["verdicts"]
    assert "- Why: " in told["verdicts"]


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"ppl": 4.5}, "crosses the limit"),
        ({"rounds": 2}, "too few runs"),
        ({"documents": 3}, "too few documents"),
        ({"ppl": -3.0, "noise": 0.0}, "perplexity falls by 3.0 %"),
        ({"ttft": 0.0, "noise": 0.0}, "time to first token does not change (0.0 to 0.0)"),
    ],
)
def test_how_sure_a_verdict_is_is_said(parameters: dict[str, Any], named: str) -> None:
    assert named in Report([make_record(0.9, **parameters)])["verdicts"]


def test_records_of_the_full_cache_alone_have_nothing_to_judge() -> None:
    told = Report([make_record(1.0, method="full")])
    (block,) = told.sections["verdicts"].blocks
    assert isinstance(block, Words)


def test_records_that_differ_are_grouped_and_the_difference_named() -> None:
    records = [
        *make_records([0.9, 0.5]),
        make_record(0.9, prompt_tokens=8192),
        make_record(0.9, prompt_tokens=8192, device="cuda"),
        make_record(0.5, method="random"),
    ]
    told = Report(records)
    assert "prompt tokens (1,024 and 8,192)" in told["results"]
    assert "method (knorm and random)" in told["results"]
    assert len(families(records)) == 3
    tables = [block for block in told.sections["results"].blocks if isinstance(block, Table) and not block.folded]
    assert [[(row[0], row[1]) for row in table.rows] for table in tables] == [
        [("0.9", "knorm"), ("0.5", "knorm"), ("0.5", ("random", "control"))],
        [("0.9", "knorm")],
        [("0.9", "knorm")],
    ]
    assert "knorm, device cuda" in told["verdicts"]


def test_the_ways_of_a_plans_prompt_share_its_table_and_are_told_apart() -> None:
    records = [*make_records([1.0, 0.9], prompt_tokens=4096), *make_planned(found=0.9)]
    told = Report(records)
    table = next(block for block in told.sections["results"].blocks if isinstance(block, Table))
    kinds = ["a ratio per layer", "a ratio per layer, in chunks", "a ratio per layer, reused"]
    assert [row[1] for row in table.rows] == ["knorm", "knorm", *(("knorm", kind) for kind in kinds)]
    assert "last 32 tokens" in told["results"]
    assert "differ in" not in told["results"]
    assert "met at 0.4 reused; not met at 0.9, 0.4 and 0.4 in chunks." in told["verdicts"]
    assert "What shortens it is the way of the prompt" in told["verdicts"]


def test_every_figure_of_a_record_is_in_its_tables() -> None:
    record = make_record(0.9, found=0.75)
    latency, memory, quality = record.latency, record.memory, record.quality
    changes, figures, more, counted = (
        block for block in Report([record]).sections["results"].blocks if isinstance(block, Table)
    )
    shown = [cell if isinstance(cell, str) else cell[0] for cell in changes.rows[0]]
    expected = [str(change) for change in (latency.ttft, latency.tpot, latency.throughput, quality.ppl)]
    assert [text.replace("\N{MINUS SIGN}", "-") for text in shown[2:6]] == expected
    assert shown[6:] == [
        "36 of 48",
        f"{quality.kl:.3f}",
        f"{quality.top1 * 100:.1f} %",
        f"{memory.candidate_cache_bytes / 1e6:.1f}",
    ]
    pairs = [tuple(map(float, cell)) for cell in figures.rows[0][2:]]
    full, pruned = latency.baseline_speed, latency.candidate_speed
    for pair, name, unit in zip(
        pairs, ("ttft_s", "tpot_s", "gap_p50_s", "gap_p90_s", "throughput"), (1, 1e3, 1e3, 1e3, 1), strict=False
    ):
        assert pair == pytest.approx((getattr(full, name) * unit, getattr(pruned, name) * unit), rel=0.005)
    assert pairs[5] == pytest.approx((quality.baseline_ppl, quality.candidate_ppl), rel=0.005)
    assert quality.divergence is not None
    assert quality.long_range is not None
    assert more.folded
    assert more.rows[0][2:6] == tuple(f"{nats:.3f}" for nats in quality.divergence)
    assert [cell[0].replace("\N{MINUS SIGN}", "-") for cell in more.rows[0][6:]] == [
        str(quality.long_range),
        str(quality.decoded),
    ]
    assert more.rows[0][6][1].endswith(f"; {quality.long_range_tokens} tokens")
    assert counted.folded
    assert record.cost is not None
    for row, phase in zip(counted.rows, ("decode", "prefill"), strict=True):
        ratios = [record.cost.ratio(phase, name) for name in ("ops", "moved", "flops", "allocated", "host_reads")]
        assert [float(text) for text in row[3:]] == pytest.approx(ratios, abs=0.0005)


def test_the_plan_has_a_row_of_its_own_and_what_the_full_cache_lacks_has_no_ratio() -> None:
    record = make_record(0.9)
    assert record.cost is not None
    nothing = record.cost.baseline_prefill.model_copy(update={"flops": 0})
    without = record.model_copy(update={"cost": record.cost.model_copy(update={"baseline_prefill": nothing})})
    plan = make_record(0.9, plan=(1.0, 0.6))
    (counted,) = cost_tables([without, plan, make_record(0.7).model_copy(update={"cost": None})])
    assert isinstance(counted, Table)
    assert [row[0] for row in counted.rows] == ["0.9", "0.9", "plan 0.80", "plan 0.80"]
    assert [row[5] for row in counted.rows] == ["1.000", "-", "1.000", "1.000"]


def test_the_page_says_how_far_counted_and_timed_cost_agree_if_there_are_points_for_it() -> None:
    records = make_records([0.9, 0.7, 0.5])
    charts, words = agreement_blocks(records)
    assert isinstance(charts, Charts)
    assert isinstance(words, Words)
    assert words.text.endswith("over 3 points: 1.00.")
    assert charts.charts[0].words.startswith(words.text)
    uncounted = records[0].model_copy(update={"cost": None})
    assert list(agreement_blocks([uncounted, *records[1:]])) == []
    assert list(agreement_blocks([*records, make_record(0.3, device="cuda")])) == []


def test_records_of_earlier_versions_have_no_table_beyond_the_mean() -> None:
    """What one record lacks is a dash beside what others have."""
    old = without_more(make_record(0.8), "token_kl", "local_nll", "decoded_nll")
    old = old.model_copy(update={"cost": None})
    tables = [block for block in Report([old]).sections["results"].blocks if isinstance(block, Table)]
    assert len(tables) == 2
    half = without_more(make_record(0.7), "local_nll", "token_kl")
    *_, more, _ = (block for block in Report([old, half]).sections["results"].blocks if isinstance(block, Table))
    assert [row[0] for row in more.rows] == ["0.7"]
    assert more.rows[0][2:7] == ("-",) * 5


def test_a_later_record_of_a_cell_replaces_the_earlier() -> None:
    results = Report([make_record(0.9, ppl=3.0), make_record(0.9, ppl=4.0)])["results"]
    assert "+4.0 %" in results
    assert "+3.0 %" not in results


def with_kl(record: Record, kl: float) -> Record:
    documents = tuple(score.model_copy(update={"kl": kl}) for score in record.quality.documents)
    return record.model_copy(update={"quality": record.quality.model_copy(update={"documents": documents})})


@pytest.mark.parametrize(
    ("records", "word"),
    [
        ([make_record(0.7), make_record(0.7, method="random", ppl=60.0)], "seen to be worse"),
        ([make_record(0.7), make_record(0.7, method="random", ppl=2.0)], "not seen to be worse"),
        ([make_record(0.7), make_record(0.5, method="random")], "alone"),
        ([make_record(0.7), make_record(0.7, method="random", fingerprint="0" * 64)], "alone"),
        ([make_record(1.0)], "as it must be"),
        ([make_record(1.0, method="full")], "noise"),
        ([with_kl(make_record(1.0), 0.1)], "broken"),
        ([with_kl(make_record(0.5), 0.0)], "not pruned"),
    ],
)
def test_controls(records: list[Record], word: str) -> None:
    assert f"- **{word}**:" in Report(records)["controls"]


def test_controls_of_several_prompt_lengths_are_told_apart() -> None:
    told = Report([make_record(1.0, prompt_tokens=tokens) for tokens in (512, 2048)])
    blocks = told.sections["controls"].blocks
    assert [block.text if isinstance(block, Heading) else type(block) for block in blocks[:4]] == [
        "With prompt tokens 512, context tokens 512",
        Statements,
        "With prompt tokens 2,048, context tokens 2,048",
        Statements,
    ]


def test_a_control_that_was_not_measured_is_missed() -> None:
    assert "--method random" in Report([make_record(0.9)])["controls"]
    assert "--method random" not in Report([make_record(0.9), make_record(0.9, method="random")])["controls"]


def test_the_environment_names_all_that_occurs() -> None:
    environment = Report([make_record(0.9), make_record(0.9, device="cuda", prompt_tokens=2048)])["environment"]
    for part in ("cpu (Synthetic", "cuda (Synthetic", "1,024 tokens in one pass", "2,048 tokens in one pass", "f" * 12):
        assert part in environment


def test_the_newest_run_that_regressed_is_told_of_and_marked() -> None:
    told = Report(history=stored(-20.0, -20.0, 10.0))
    assert "1 regressed" in told["verdicts"]
    assert "| 1.100 (regressed) |" in told["history"]
    (charts,) = [block for block in told.sections["history"].blocks if isinstance(block, Charts)]
    tpot = next(chart for chart in charts.charts if chart.title.startswith("Time per output"))
    assert "Regressed: test 1 at no git (1." in tpot.words
    assert "Regressed: none." in charts.charts[0].words
    rings = [line for line in tpot.figure.axes[0].lines if line.get_markersize() == 10]
    assert [list(line.get_xdata()) for line in rings] == [[2]]  # type: ignore[arg-type]


def test_a_regression_that_an_earlier_run_found_stays_marked() -> None:
    entries = list(stored(-20.0, -20.0, -20.0).entries)
    assert "(regressed)" not in Report(history=History(tuple(entries)))["history"]
    entries[1] = entries[1].model_copy(update={"verdicts": {"bytes": "regressed"}})
    assert "(regressed)" in Report(history=History(tuple(entries)))["history"]


def past(sizes: Sequence[float], commits: Sequence[str] = ()) -> History:
    """A run and a commit for each size of the cache, in % of the first; git knows those that are given."""
    entries = []
    for n, size in enumerate(sizes):
        entry = make_entry(
            run=f"r{n}",
            commit=commits[n] if commits else f"{n:040x}"[::-1],
            created=f"2026-01-{n + 1:02}",
            parts=("memory",),
        )
        assert entry.memory
        grown = {"candidate_cache_bytes": round(entry.memory.candidate_cache_bytes * size / 100)}
        entries.append(entry.model_copy(update={"memory": entry.memory.model_copy(update=grown)}))
    return History(tuple(entries))


def test_a_step_is_dated_and_marked_in_the_chart() -> None:
    told = Report(history=past([100.0] * 6 + [100.4] * 4))
    assert (
        "**step**: tests/test\\_x.py::test\\_x: Bytes / full cache +0.40 % at 6000000 (2026-01-07)" in told["verdicts"]
    )
    assert "| +0.40 % at 6000000 (2026-01-07) |" in told["history"]
    (charts,) = [block for block in told.sections["history"].blocks if isinstance(block, Charts)]
    (chart,) = charts.charts
    assert "Steps: test 1 at 6000000." in chart.words
    bars = [line for line in chart.figure.axes[0].lines if line.get_marker() == "|"]
    assert [list(line.get_xdata()) for line in bars] == [[6]]  # type: ignore[arg-type]


def test_a_creep_is_told_and_a_step_that_was_taken_back_is_not() -> None:
    creeping = Report(history=past([100 + 0.1 * n for n in range(10)]))
    assert "**creep**" in creeping["verdicts"]
    assert "+0.90 % over 10 commits" in creeping["verdicts"]
    assert "| +0.10 % (+0.10 % to +0.10 %) | none |" in creeping["history"]
    repaired = Report(history=past([100.0] * 5 + [110.0] * 5 + [100.0] * 5))
    assert "**step**" not in repaired["verdicts"]
    assert "+10.00 % at 5000000 (2026-01-06); \N{MINUS SIGN}10.00 % at" in repaired["history"]
    assert "too few commits" in Report(history=past([100.0] * 6))["history"]
    assert "Slope" not in Report(history=past([100.0] * 4))["history"]


def test_a_trend_follows_the_line_of_the_newest_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Repository(tmp_path / "repository")
    monkeypatch.chdir(repository.folder)
    line = repository.line(10)
    sizes = [100.0] * 6 + [100.4] * 4
    aside = repository.line(3, start=line[2])
    # Two commits were measured late, and another branch in between.
    commits = [*line[:4], *aside, *line[6:9], line[5], line[4], line[9]]
    by_commit = {**dict(zip(line, sizes, strict=True)), **dict.fromkeys(aside, 150.0)}
    told = Report(history=past([by_commit[commit] for commit in commits], commits))["history"]
    assert "| 10 |" in told
    assert f"+0.40 % at {line[6][:7]} (2026-01-08) |" in told


def test_runs_of_one_commit_are_one_point_and_dirty_ones_none() -> None:
    history = past([100.0] * 5 + [150.0] * 5)
    again = [one.model_copy(update={"run": f"{one.run}b"}) for one in history.entries[5:]]
    assert "| 10 |" in Report(history=History((*history.entries, *again)))["history"]
    dirty = [
        one.model_copy(update={"environment": one.environment.model_copy(update={"git_dirty": True})})
        for one in history.entries[5:]
    ]
    told = Report(history=History((*history.entries[:5], *dirty)))["history"]
    assert "| 5 | 0.00 % (0.00 % to 0.00 %)" in told


def test_what_was_decided_is_in_every_report() -> None:
    history = past([100.0, 110.0])
    accepted = {
        "metric": "bytes",
        "before": "-49 %",
        "now": "-44 %",
        "why": "positions are kept",
        "who": "Ada <a@b.org>",
    }
    decisions = (
        Pin(commit="c" * 40, who="Bob", created="2026-03-01"),
        Acceptance(entry=history.entries[1], created="2026-03-02", **accepted),
        Rename(old="t.py::a", new="t.py::b", who="Cleo", created="2026-03-03"),
    )
    told = Report(history=History(history.entries, decisions=decisions))["verdicts"]
    assert "**pinned**: cccccccccccc, by Bob on 2026-03-01: " in told
    (row,) = [line for line in told.splitlines() if "positions are kept" in line]
    for part in ("**accepted**", "bytes", "\N{MINUS SIGN}49 %", "Ada &lt;a", "2026-03-02", "1000000"):
        assert part in row
    assert "**renamed**: t.py::a is t.py::b, by Cleo on 2026-03-03." in told
    assert "decided" not in Report(history=history)["verdicts"]


def test_a_test_measured_under_other_conditions_gets_a_line_of_its_own() -> None:
    other = make_entry(run="r2", created="2026-01-05", commit=None, prompt_tokens=2048)
    assert "| 2 | tests/test\\_x.py" in Report(history=History((*stored(-20.0).entries, other)))["history"]


def test_entries_without_a_figure_are_drawn_as_far_as_they_go() -> None:
    entries = tuple(
        make_entry(run=f"r{n}", test=f"test_{part}", parts=(part,), commit=None)
        for n, part in enumerate(("latency", "memory", "quality"))
    )
    told = Report(history=History(entries))["history"]
    assert "none" in told
    assert "nan" not in told


def test_a_history_that_git_does_not_know_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    entries = (make_entry(run="a"), make_entry(run="b", created="2026-05-01T00:00:00+00:00"))
    assert "can't be judged" in Report(history=History(entries))["verdicts"]


def test_a_plan_has_its_table_and_its_pictures() -> None:
    plan = make_plan()
    section: Section = Report(plans=[plan]).sections["plans"]
    (table,) = (block for block in section.blocks if isinstance(block, Table))
    assert len(table.rows) == len(plan.frontier)
    assert sum("(the plan)" in row[0] for row in table.rows) == 1
    (charts,) = (block for block in section.blocks if isinstance(block, Charts))
    assert len(charts.charts) == 3


def test_several_lengths_are_drawn_against_the_context() -> None:
    records = [make_record(0.5, prompt_tokens=tokens) for tokens in (512, 2048)]
    (charts,) = Report(records).sections["charts"].blocks
    assert isinstance(charts, Charts)
    (chart,) = charts.charts
    assert "2,048 tokens, keep ratio 0.5: " in chart.words
    assert "charts" not in Report(records[:1]).sections


def test_an_interval_is_read_aloud() -> None:
    assert interval(Change(1.0, -0.5, 2.0)) == "\N{MINUS SIGN}0.5 to +2.0"
    assert interval(Change(1.0, None, None)) == "no interval"

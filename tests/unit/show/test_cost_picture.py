"""The picture of counted cost: what it draws, which records it is of, and texts that stand apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from knormpress.records.schema import Record
from knormpress.show.pictures.cost import agreement, draw_agreement_panel, draw_cost, draw_cost_panels
from knormpress.show.pictures.draw import draw_all, select_counted
from tests.pictures import Drawn, faults, size
from tests.record_factory import make_record, make_records

PLAN = (1.0, 0.6)
MANY = tuple(round(1.0 - 0.05 * step, 2) for step in range(19))


def uncounted(record: Record) -> Record:
    return record.model_copy(update={"cost": None})


@pytest.mark.parametrize(
    ("ratios", "lengths"),
    [
        ((0.7,), (512,)),
        ((1.0, 0.9, 0.7), (512, 8000)),
        (MANY, tuple(512 * n for n in (1, 2, 4, 8, 16, 64, 128, 256, 512))),
    ],
    ids=["one", "two lengths", "many"],
)
def test_the_texts_stand_apart_in_the_picture_and_on_the_page(
    ratios: tuple[float, ...], lengths: tuple[int, ...], drawn: Drawn
) -> None:
    records = [record for length in lengths for record in make_records(ratios, prompt_tokens=length, rounds=3)]
    plan = make_record(0.9, plan=PLAN, prompt_tokens=lengths[-1], rounds=3)
    counted, timed, left_out = select_counted([*records, plan])
    figures = [draw_cost(counted, timed, left_out), draw_cost_panels(counted), draw_agreement_panel(timed)]
    for figure in figures:
        figure.draw_without_rendering()  # a layout is complete after this
        drawn.pop(figure)
        figure.canvas.draw()
    assert faults(drawn) == []
    texts = [text for text, _ in drawn[figures[0]]]
    assert {"operators", "bytes moved", "FLOPs", "bytes allocated", "a plan", "A decoded token", "The prefill"} <= set(
        texts
    )
    assert any(f"behind a prompt of {lengths[-1]:,} tokens" in text for text in texts)
    assert any(f"over {len(records)} points" in text.replace("\n", " ") for text in texts) == (len(records) > 2)


def test_lines_and_bars_are_the_counted_ratios_and_the_plan_is_on_no_line() -> None:
    records = make_records([0.9, 0.5])
    plan = make_record(0.9, plan=PLAN)
    counted, timed, _ = select_counted([plan, *records])
    assert counted == [records[0], plan, records[1]]
    assert timed == records
    axes = draw_cost_panels(counted).axes
    for (reads, rest), phase in zip((axes[:2], axes[2:]), ("decode", "prefill"), strict=True):
        costs = [record.cost for record in counted if record.cost]
        assert [bar.get_height() for bar in reads.patches] == [cost.ratio(phase, "host_reads") for cost in costs]
        drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in rest.lines[1:]]
        expected = []
        for name in ("ops", "allocated", "flops", "moved"):
            full, planned, half = (cost.ratio(phase, name) for cost in costs)
            expected += [([0, 2], [full, half]), ([1], [planned])]
        assert drawn == expected
        assert rest.get_xticklabels()[1].get_text() == "plan\n0.80"


def test_a_point_is_the_bytes_moved_and_the_tpot_with_its_interval() -> None:
    records = [*make_records([0.9, 0.5], prompt_tokens=512), make_record(0.5, prompt_tokens=8000)]
    axes = draw_agreement_panel(records).axes[0]
    for record, bars in zip(records, axes.containers, strict=True):
        point, _, (whiskers,) = bars.lines
        assert record.cost
        assert point.get_xdata() == [record.cost.ratio("decode", "moved")]
        assert point.get_ydata() == [1 + record.latency.tpot.percent / 100]
        ends = [1 + end / 100 for end in record.latency.tpot.ends]
        assert whiskers.get_segments()[0][:, 1] == pytest.approx(ends)
    shapes = [bars.lines[0].get_marker() for bars in axes.containers]
    assert shapes[0] == shapes[1] != shapes[2]


def test_how_far_count_and_time_agree_is_said_from_three_points_on() -> None:
    records = make_records([0.9, 0.7, 0.5])
    assert agreement(records).endswith("over 3 points: 1.00.")
    opposite = [make_record(ratio, tpot=tpot) for ratio, tpot in ((0.9, -30.0), (0.7, -20.0), (0.5, -10.0))]
    assert agreement(opposite).endswith("\N{MINUS SIGN}1.00.")
    assert "never differs" in agreement(make_records([0.9] * 3))
    assert agreement(records[:2]) == ""
    assert len(draw_cost(records, records, "").axes) == 6
    assert len(draw_cost(records, records[:2], "").axes) == 4


def test_there_is_a_picture_where_a_cost_was_counted_and_nowhere_else(tmp_path: Path) -> None:
    record = make_record(0.9)
    assert "knormpress_cost.png" not in [path.name for path in draw_all([uncounted(record)], tmp_path)]
    *_, path = draw_all([uncounted(record), make_record(0.7)], tmp_path)
    assert path.name == "knormpress_cost.png"
    assert size(path) == (1600, 1000)


def test_the_longest_counted_prompt_is_shown_and_what_is_not_shown_is_named() -> None:
    short, long = make_records([0.9, 0.5], prompt_tokens=512), make_records([0.9, 0.5], prompt_tokens=8000)
    plan = make_record(0.9, plan=PLAN, prompt_tokens=512)
    other = make_record(0.9, method="random", prompt_tokens=512)
    counted, timed, left_out = select_counted([*short, *map(uncounted, long), plan, other])
    assert counted == [short[0], plan, short[1]]
    assert timed == short
    assert left_out == "measured but not shown: method random"
    assert select_counted(map(uncounted, long)) == ([], [], "")

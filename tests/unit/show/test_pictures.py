"""The pictures of a sweep: their size, what they draw, which records share one, and texts that stand apart."""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from knormpress.errors import KnormError
from knormpress.records.schema import Record
from knormpress.show.pictures.draw import draw_all, select, select_lengths, select_with_plans
from knormpress.show.pictures.scaling import draw_scaling
from knormpress.show.pictures.table import draw_table
from tests.pictures import Drawn, faults, size
from tests.record_factory import make_planned, make_record, make_records

NAMES = [f"knormpress_{name}.png" for name in ("comprehensive", "summary", "tradeoff", "table")]
RATIOS = {
    1: (0.9,),
    2: (1.0, 0.7),
    4: (1.0, 0.9, 0.8, 0.7),
    7: (1.0, 0.9, 0.8, 0.7, 0.5, 0.3, 0.05),
    19: tuple(round(1.0 - 0.05 * step, 2) for step in range(19)),
}
LONG_NAMES = {
    "prompt_tokens": 131_072,
    "prefill_chunk": 4096,
    "model_name": "/home/someone/models/" + "a-very-long-folder-name/" * 6 + "checkpoint-1000",
    "text_name": "C:\\texts\\" + "long " * 30 + ".txt",
    "device": "cuda:1",
    "device_name": "NVIDIA GeForce RTX 4090 Laptop GPU with a surprisingly long name",
}


@pytest.mark.parametrize(
    ("count", "parameters"),
    [
        (1, {"ttft_cold_s": 1.7}),
        (2, {"rounds": 2, "documents": 1, "scored": 64}),
        (4, {"ttft_cold_s": 1.7, "found": 0.8}),
        (4, {"ppl": 0.0, "tpot": 0.0, "ttft": 0.0, "noise": 0.0}),
        (4, {"ppl": -3.0, "tpot": 60.0, "ttft": -85.0}),
        (7, {"ppl": 2.5e6, "tpot": -70.0, "noise": 0.2}),
        (4, {"ppl": -60.0, "tpot": 140.0, "ttft": 900.0}),
        (7, LONG_NAMES),
        (19, {"ttft_cold_s": 1.7, "found": 0.0}),
    ],
    ids=["one", "no intervals", "four", "no change", "better", "ruined", "both ways", "long names", "many"],
)
def test_four_pictures_of_the_stated_size_whose_texts_are_apart(
    count: int, parameters: dict[str, Any], tmp_path: Path, drawn: Drawn
) -> None:
    records = make_records(RATIOS[count], created="2026-05-01T10:00:00+00:00", **parameters)
    paths = draw_all(records, tmp_path)
    asked = ["knormpress_retrieval.png"] if "found" in parameters else []
    assert [path.name for path in paths] == [*NAMES, *asked, "knormpress_cost.png"]
    assert {size(path) for path in paths if path.name != NAMES[3]} == {(1600, 1000)}
    assert size(paths[3])[0] == 1600
    assert len(drawn) == len(paths)
    assert sum(map(len, drawn.values())) > 60
    assert faults(drawn) == []
    for texts in drawn.values():
        footer = " ".join(text for text, _ in texts)
        assert "threads: 2" in footer
        assert "2026-05-01" in footer
        if parameters is not LONG_NAMES:
            for part in ("SmolLM2-135M-Instruct", "WikiText-2 test", "cpu", "prompt of 1,024 tokens, 64 new"):
                assert part in footer


def test_the_overlap_check_itself_finds_overlaps(drawn: Drawn) -> None:
    figure = Figure()
    figure.text(0.5, 0.5, "one")
    figure.text(0.51, 0.5, "other")
    figure.text(0.99, 0.1, "outside")
    figure.text(0.2, 0.2, "apart")
    figure.savefig(io.BytesIO())
    assert [fault.split(" ")[0] for fault in faults(drawn)] == ["'outside'", "'one'"]


@pytest.mark.parametrize(
    ("count", "lengths"),
    [
        (1, (512, 2048)),
        (4, (512, 2048, 8000)),
        (7, (1000, 1024)),
        (19, (512, 131_072)),
        (2, (512, *range(1024, 131_073, 8192))),
    ],
    ids=["one ratio", "the standard ratios", "close lengths", "many ratios", "many lengths"],
)
def test_the_picture_of_several_prompt_lengths(count: int, lengths: tuple[int, ...], drawn: Drawn) -> None:
    records = [
        record
        for length in lengths
        for record in make_records(RATIOS[count], prompt_tokens=length, rounds=3, new_tokens=4, weights_tpot_s=0.015)
    ]
    figure = draw_scaling(*select_lengths(records))
    figure.savefig(io.BytesIO())
    texts = [text for text, _ in drawn[figure]]
    assert texts.count(f"{lengths[-1]:,}") == 2
    assert {"full cache", f"keep {RATIOS[count][0]}", "weights alone: 15.0 ms"} <= set(texts)
    assert faults(drawn) == []


def test_several_prompt_lengths_are_drawn_beside_the_other_pictures(tmp_path: Path) -> None:
    paths = draw_all([make_record(0.9), make_record(0.9, prompt_tokens=512)], tmp_path)
    assert [path.name for path in paths] == [*NAMES, "knormpress_scaling.png", "knormpress_cost.png"]
    assert size(paths[-2]) == size(paths[-1]) == (1600, 1000)


def test_the_lines_are_the_full_caches_medians_and_the_paired_changes() -> None:
    records = [
        record
        for length, tpot in ((512, 0.0), (2048, -40.0))
        for record in make_records([0.5, 0.8], prompt_tokens=length, tpot=tpot, drift=0.5)
    ]
    for at, floor in enumerate((0.015, 0.012, 0.09)):
        latency = records[at].latency.model_copy(update={"weights_tpot_s": floor})
        records[at] = records[at].model_copy(update={"latency": latency})
    shown, left_out = select_lengths(records)
    latencies = [record.latency for record in shown]
    ttft, tpot = draw_scaling(shown, left_out).axes
    full, high, low, weights = tpot.lines[0], *(bars.lines[0] for bars in tpot.containers), tpot.lines[-1]
    pairs = [latencies[:2], latencies[2:]]
    middles = [statistics.median(latency.baseline_speed.tpot_s * 1e3 for latency in pair) for pair in pairs]
    assert full.get_xdata().tolist() == [512, 2048]
    assert full.get_ydata().tolist() == pytest.approx(middles)
    for line, own in ((low, latencies[0::2]), (high, latencies[1::2])):
        expected = [middle * (1 + latency.tpot.percent / 100) for middle, latency in zip(middles, own, strict=True)]
        assert line.get_ydata().tolist() == pytest.approx(expected)
    assert weights.get_ydata() == [15.0, 15.0]
    whiskers = tpot.containers[0].lines[2][0].get_segments()
    assert whiskers[1][:, 1] == pytest.approx([middles[1] * (1 + end / 100) for end in latencies[3].tpot.ends])
    firsts = [statistics.median(latency.baseline_speed.ttft_s for latency in pair) for pair in pairs]
    assert ttft.lines[0].get_ydata().tolist() == pytest.approx(firsts)


def test_what_was_not_timed_is_not_drawn() -> None:
    records = [
        *make_records([1.0, 0.5], prompt_tokens=512),
        make_record(0.5, prompt_tokens=2048, rounds=2),
        make_record(0.5, prompt_tokens=1024, weights_tpot_s=0.015),
    ]
    tpot = draw_scaling(*select_lengths(records)).axes[1]
    assert tpot.lines[-1].get_ydata() == [15.0, 15.0]
    assert [bars.lines[0].get_xdata().tolist() for bars in tpot.containers] == [[512], [512, 1024, 2048]]
    without = draw_scaling(*select_lengths(records[:3]))
    assert not any("weights" in text.get_text() for text in without.legends[0].get_texts())


@pytest.mark.parametrize(("lengths", "scales"), [((512, 1024), ["linear", "linear"]), ((512, 8192), ["log", "linear"])])
def test_times_within_a_decade_start_at_nothing_and_others_are_drawn_in_decades(
    lengths: tuple[int, int], scales: list[str]
) -> None:
    shown, _ = select_lengths(make_record(prompt_tokens=length) for length in lengths)
    panels = draw_scaling(shown, "").axes
    assert [axes.get_yscale() for axes in panels] == scales
    assert all(axes.get_yscale() == "log" or axes.get_ylim()[0] == 0 for axes in panels)


def test_lengths_are_shown_that_differ_in_nothing_that_a_length_does_not_bring() -> None:
    short = make_records([1.0, 0.9], prompt_tokens=512, scored=200)
    again = make_record(0.9, prompt_tokens=512, scored=100)
    other = make_record(0.9, prompt_tokens=1024, new_tokens=8)
    random = make_record(0.9, method="random", prompt_tokens=4096)
    long = make_record(0.9, prompt_tokens=2048, scored=20)
    shown, left_out = select_lengths([*short, again, other, random, long])
    assert shown == [short[0], again, long]
    assert left_out == "measured but not shown: method random; prompt tokens 1024"
    assert select_lengths([other, long]) == ([], "")


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def test_the_table_shows_every_verdict() -> None:
    texts = texts_of(draw_table(make_records([0.9, 0.5]), ""))
    assert texts.count("not met") == 5
    assert texts.count("met") == 4
    assert "\N{MINUS SIGN}87 %" in texts
    assert any("\N{GREATER-THAN OR EQUAL TO} \N{MINUS SIGN}10 %" in text for text in texts)


def test_the_table_tells_of_a_cold_call_that_is_not_itself_shown() -> None:
    shown, beside = [make_record(0.9)], [make_record(0.9, prompt_tokens=512, ttft_cold_s=2.5)]
    assert any("2.5 s cold" in text for text in texts_of(draw_table(shown, "", beside=beside)))
    assert not any("2.5 s cold" in text for text in texts_of(draw_table(shown, "")))


def test_a_name_is_never_read_as_mathematics_or_drawn_as_boxes(drawn: Drawn) -> None:
    figure = draw_table([make_record(model_name="a_$x^2$_\N{CJK UNIFIED IDEOGRAPH-7EF4}\nb")], "")
    figure.savefig(io.BytesIO())
    assert any("a_$x^2$_??b" in text for text, _ in drawn[figure])


def test_the_users_own_style_neither_shows_nor_suffers(tmp_path: Path) -> None:
    records = make_records(RATIOS[1])
    plain = draw_all(records, tmp_path / "plain")
    with mpl.rc_context({"font.size": 30.0, "axes.facecolor": "black", "savefig.bbox": "tight"}):
        styled = draw_all(records, tmp_path / "styled")
        assert mpl.rcParams["font.size"] == 30.0
    assert [path.read_bytes() for path in plain] == [path.read_bytes() for path in styled]


def test_the_longest_prompt_and_the_method_itself_are_shown_and_the_rest_is_named() -> None:
    records = [
        *make_records([1.0, 0.9], prompt_tokens=512),
        *make_records([0.8, 1.0], prompt_tokens=2048),
        make_record(0.8, method="random", prompt_tokens=4096),
        make_record(0.8, method="full", prompt_tokens=2048),
        make_record(0.8, plan=(0.7, 0.9), prompt_tokens=2048),
    ]
    shown, left_out = select(records)
    assert shown == [records[3], records[2]]
    assert left_out == "measured but not shown: method random, full; kind of ratio one per layer; prompt tokens 512"


def test_of_the_ways_of_a_prompt_the_full_caches_is_drawn() -> None:
    uniform = make_records([0.9, 0.5], prompt_tokens=4096)
    assert select([*uniform, *make_planned()])[0] == uniform
    shown, left_out = select(make_planned())
    assert [record.row for record in shown] == ["plan 0.40"]
    assert "way of the prompt in chunks, reused" in left_out


def test_a_plan_stands_beside_the_keep_ratios_and_no_line_leads_to_it(tmp_path: Path, drawn: Drawn) -> None:
    uniform = make_records([1.0, 0.9, 0.5], prompt_tokens=4096, found=0.5)
    plan, chunked, reused = make_planned(found=0.9)
    control = make_record(0.5, method="random", prompt_tokens=4096)
    records = [*uniform, plan, chunked, reused, control]
    shown, left_out = select_with_plans(records)
    assert shown == [*uniform, plan]
    assert "random" in left_out
    assert "reused" in left_out
    draw_all(records, tmp_path)
    assert faults(drawn) == []
    for figure, texts in drawn.items():
        assert "plan 0.40" in " ".join(" ".join(text for text, _ in texts).split())
        lines = [line for axes in figure.axes for line in axes.lines if line.get_linestyle() == "-"]
        assert all(len(line.get_xdata()) <= len(uniform) for line in lines)


def test_a_plan_alone_is_shown_too() -> None:
    plan, *others = make_planned()
    assert select_with_plans([plan, *others])[0] == [plan]


def test_a_users_own_method_is_shown_rather_than_the_full_cache() -> None:
    shown, _ = select([make_record(1.0, method="full"), make_record(0.9, method="mine")])
    assert [record.policy.method for record in shown] == ["mine"]


def refused(records: Iterable[Record], folder: Path) -> str:
    """The message that ``records`` are refused with; nothing may be written."""
    with pytest.raises(KnormError) as caught:
        draw_all(records, folder / "new")
    assert not (folder / "new").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"model_name": "gpt2"}, ("model", "SmolLM2-135M-Instruct", "gpt2")),
        ({"text_name": "prose"}, ("text", "WikiText-2 test", "prose")),
        ({"device": "cuda"}, ("device", "cpu", "cuda")),
        ({"threads": 8}, ("threads: 2 and 8",)),
        ({"dtype": "bfloat16"}, ("dtype: float32 and bfloat16",)),
        ({"documents": 9}, ("samples: 8 and 9",)),
        # A longer prompt on another device must not quietly push the first device out.
        ({"device": "cuda", "prompt_tokens": 8192}, ("device", "cpu", "cuda")),
    ],
)
def test_what_can_not_share_a_picture_is_refused(other: dict[str, Any], named: tuple[str, ...], tmp_path: Path) -> None:
    message = refused([make_record(0.9), make_record(0.8, **other)], tmp_path)
    assert [part for part in named if part not in message] == []
    assert "--fresh" in message


def test_no_records_are_refused(tmp_path: Path) -> None:
    assert "knormpress sweep" in refused([], tmp_path)


def test_a_kill_while_drawing_leaves_the_old_picture_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        (tmp_path / name).write_bytes(b"old")

    def killed(self: Figure, target: Path, **options: Any) -> None:
        target.write_bytes(b"begun")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", killed)
    with pytest.raises(KeyboardInterrupt):
        draw_all([make_record(0.7)], tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == dict.fromkeys(NAMES, b"old")

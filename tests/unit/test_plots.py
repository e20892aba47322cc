from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from knormpress.compare import summarize
from knormpress.errors import KnormError
from knormpress.plots import draw_all, select
from knormpress.records import Record
from tests.pictures import Drawn, faults, size
from tests.record_factory import make_record, make_records

NAMES = ["comprehensive", "summary", "tradeoff", "table"]
RATIOS = {
    1: (0.9,),
    2: (1.0, 0.7),
    4: (1.0, 0.9, 0.8, 0.7),
    7: (1.0, 0.9, 0.8, 0.7, 0.5, 0.3, 0.05),
    19: tuple(round(1.0 - 0.05 * step, 2) for step in range(19)),
}


def draw(records: Iterable[Record], folder: Path) -> list[Path]:
    return draw_all(map(summarize, records), folder)


@pytest.mark.parametrize("count", RATIOS)
def test_four_pictures_of_the_stated_size_whose_texts_are_apart(count: int, tmp_path: Path, drawn: Drawn) -> None:
    paths = draw(make_records(RATIOS[count], ttft_cold_s=1.7), tmp_path)
    assert [path.name for path in paths] == [f"knormpress_{name}.png" for name in NAMES]
    assert [size(path) for path in paths[:3]] == [(1600, 1000)] * 3
    assert size(paths[3])[0] == 1600
    assert len(drawn) == 4
    assert sum(map(len, drawn.values())) > 60
    assert faults(drawn) == []


@pytest.mark.parametrize(
    "parameters",
    [
        {"rounds": 2, "documents": 1, "scored": 64},
        {"ppl": 0.0, "tpot": 0.0, "ttft": 0.0, "noise": 0.0},
        {"ppl": -3.0, "tpot": 60.0, "ttft": -85.0},
        {"ppl": 2.5e6, "tpot": -70.0, "noise": 0.2},
        {"ppl": -60.0, "tpot": 140.0, "ttft": 900.0},
        {
            "prompt_tokens": 131_072,
            "prefill_chunk": 4096,
            "model_name": "/home/someone/models/" + "a-very-long-folder-name/" * 6 + "checkpoint-1000",
            "text_name": "C:\\texts\\" + "long " * 30 + ".txt",
            "device": "cuda:1",
            "device_name": "NVIDIA GeForce RTX 4090 Laptop GPU with a surprisingly long name",
        },
    ],
    ids=["no intervals", "no change", "slower and better", "ruined", "large both ways", "long names"],
)
def test_texts_stay_apart_whatever_is_measured(parameters: dict[str, Any], tmp_path: Path, drawn: Drawn) -> None:
    draw(make_records(RATIOS[4], **parameters), tmp_path)
    assert faults(drawn) == []


def test_the_overlap_check_itself_finds_overlaps(drawn: Drawn) -> None:
    figure = Figure()
    figure.text(0.5, 0.5, "one")
    figure.text(0.51, 0.5, "other")
    figure.text(0.99, 0.1, "outside")
    figure.savefig(io.BytesIO())
    assert [fault.split(" ")[0] for fault in faults(drawn)] == ["'outside'", "'one'"]


def test_the_footer_says_what_was_measured(tmp_path: Path, drawn: Drawn) -> None:
    draw([make_record(created="2026-05-01T10:00:00+00:00")], tmp_path)
    for texts in drawn.values():
        words = " ".join(text for text, _ in texts)
        for part in ("SmolLM2-135M-Instruct", "WikiText-2 test", "cpu", "threads: 2", "prompt of 1,024 tokens, 64 new"):
            assert part in words
        assert "2026-05-01" in words


def test_the_table_shows_every_verdict(tmp_path: Path, drawn: Drawn) -> None:
    draw(make_records([0.9, 0.5]), tmp_path)
    texts = [text for text, _ in list(drawn.values())[3]]
    assert texts.count("not met") == 5
    assert texts.count("met") == 4
    assert "\N{MINUS SIGN}87 %" in texts
    assert any("\N{GREATER-THAN OR EQUAL TO} \N{MINUS SIGN}10 %" in text for text in texts)


def test_the_table_tells_of_a_cold_call_that_is_not_itself_shown(tmp_path: Path, drawn: Drawn) -> None:
    draw([make_record(0.9), make_record(0.9, prompt_tokens=512, ttft_cold_s=2.5)], tmp_path)
    assert any("2.5 s cold" in text for text, _ in list(drawn.values())[3])


def test_a_name_is_never_read_as_mathematics_or_drawn_as_boxes(tmp_path: Path, drawn: Drawn) -> None:
    draw([make_record(model_name="a_$x^2$_\N{CJK UNIFIED IDEOGRAPH-7EF4}\nb")], tmp_path)
    assert any("a_$x^2$_??b" in text for texts in drawn.values() for text, _ in texts)


def test_the_users_own_style_neither_shows_nor_suffers(tmp_path: Path) -> None:
    records = make_records(RATIOS[1])
    plain = draw(records, tmp_path / "plain")
    with mpl.rc_context({"font.size": 30.0, "axes.facecolor": "black", "savefig.bbox": "tight"}):
        styled = draw(records, tmp_path / "styled")
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
    rows, left_out = select(map(summarize, records))
    assert [(row.keep_ratio, row.record.conditions.prompt_tokens) for row in rows] == [(1.0, 2048), (0.8, 2048)]
    assert left_out == "measured but not shown: method random, full; kind of ratio one per layer; prompt tokens 512"


def test_a_users_own_method_is_shown_rather_than_the_full_cache() -> None:
    rows, _ = select(map(summarize, [make_record(1.0, method="full"), make_record(0.9, method="mine")]))
    assert [row.record.policy.method for row in rows] == ["mine"]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"model_name": "gpt2"}, r"model: SmolLM2-135M-Instruct .* and gpt2 "),
        ({"text_name": "prose"}, r"text: WikiText-2 test .* and prose "),
        ({"device": "cuda"}, r"device: cpu .* and cuda "),
        ({"threads": 8}, "threads: 2 and 8"),
        ({"dtype": "bfloat16"}, "dtype: float32 and bfloat16"),
        ({"documents": 9}, "samples: 4 and 9"),
        # A longer prompt on another device must not quietly push the first device out.
        ({"device": "cuda", "prompt_tokens": 8192}, r"device: cpu .* and cuda "),
    ],
)
def test_what_can_not_share_a_picture_is_refused(other: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(KnormError, match=f"{named}.*draw from a file"):
        draw([make_record(0.9), make_record(0.8, **other)], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_no_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KnormError, match="no records to draw"):
        draw([], tmp_path)


def test_a_kill_while_drawing_leaves_the_old_picture_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw([make_record(0.9)], tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    save = Figure.savefig

    def killed(self: Figure, target: Path, **options: Any) -> None:
        save(self, target, **options)
        target.write_bytes(target.read_bytes()[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", killed)
    with pytest.raises(KeyboardInterrupt):
        draw([make_record(0.7)], tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before

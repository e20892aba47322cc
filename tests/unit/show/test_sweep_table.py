"""The tables of a sweep as they are printed: in 80 columns, with every change, interval and verdict."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import Any

import pytest
from rich.console import Console

from knormpress.compare.promises import judge_claims
from knormpress.records.schema import Record
from knormpress.show.sweep_table import WIDTH, cautions, print_tables
from tests.record_factory import make_planned, make_record, make_records, without_more

ALL = (1.0, 0.9, 0.8, 0.7, 0.5, 0.3, 0.05)


def printed(records: Iterable[Record], **options: Any) -> str:
    file = io.StringIO()
    print_tables(records, Console(file=file, **options))
    return file.getvalue()


@pytest.mark.parametrize(("width", "ratios"), [(80, ALL), (80, (0.9,)), (132, (1.0, 0.7)), (400, ALL)])
def test_it_fits_80_columns_and_nothing_is_cut_short(width: int, ratios: tuple[float, ...]) -> None:
    text = printed(make_records(ratios, ttft_cold_s=1.7, prompt_tokens=131_072), width=width, force_terminal=True)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(map(len, plain.splitlines())) <= WIDTH
    assert "\N{HORIZONTAL ELLIPSIS}" not in plain


def test_a_plan_has_its_row_in_the_table_of_the_ratios() -> None:
    """Its ratios for single layers, and what they replace, set it apart from no ratio for all layers."""
    records = [*make_records((1.0, 0.7)), make_record(plan=(0.9, 0.1, 0.2))]
    text = printed(records)
    assert text.count("Change against the full cache") == 1
    assert re.search(r"^plan 0\.40 ", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert printed([*records, make_record(plan=(0.9, 0.1, 0.2), new_tokens=8)]).count("Change against") == 2


def test_the_further_ways_of_a_plans_prompt_have_rows_that_are_explained() -> None:
    text = printed([*make_records((1.0, 0.9), prompt_tokens=4096), *make_planned(found=0.9, noise=0.0)])
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.count("Change against the full cache") == 1
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for way, ttft in (("in chunks", "-30.0 %"), ("reused", "-88.0 %")):
        at = next(number for number, line in enumerate(lines) if line.startswith(way))
        assert lines[at - 1].startswith(f"plan 0.40 {ttft}")
        assert any(line.startswith(f"0.4 {way} ") or f" 0.4 {way} " in line for line in lines)
    assert "chunks of 1,024 tokens" in " ".join(lines)
    assert "last 32 tokens" in " ".join(lines)


def test_on_a_narrow_terminal_rows_are_stacked_and_nothing_is_cut_short() -> None:
    records = make_records((0.9, 0.05), ttft_cold_s=1.7, prompt_tokens=131_072)
    text = printed(records, width=40, force_terminal=True, color_system=None)
    assert max(map(len, text.splitlines())) <= 40
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for record in records:
        for name in ("ttft", "throughput", "tpot"):
            change = getattr(record.latency, name)
            at = lines.index(f"{name.upper() if name != 'throughput' else name} change {change}")
            assert lines[at + 1] == change.interval
    ttft = records[0].latency.ttft
    at = lines.index("target TTFT")
    parts = ["keep ratio 0.9", "wanted <= -80 %", f"measured {ttft}", f"95 % interval {ttft.interval}"]
    assert lines[at + 1 : at + 6] == [*parts, "verdict not met"]


def test_piped_it_has_no_colour_codes_and_80_columns_whatever_the_terminal_is() -> None:
    text = printed(make_records(ALL), width=200)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= WIDTH


def test_on_a_terminal_met_and_not_met_differ_in_colour_too() -> None:
    text = printed(make_records(ALL), force_terminal=True, color_system="standard")
    assert "\x1b[31mnot met" in text
    assert "\x1b[32mmet" in text


def test_every_change_stands_with_its_interval() -> None:
    record = make_record(0.7)
    text = printed([record])
    for change in (record.latency.ttft, record.latency.throughput, record.latency.tpot, record.quality.ppl):
        assert str(change) in text
        assert change.interval in text
    assert "33.5" in text
    assert "47.2 MB when nothing is pruned" in text


def test_the_heading_says_what_was_measured() -> None:
    text = printed([make_record(0.9, prefill_chunk=256)])
    for words in (
        "SmolLM2-135M-Instruct, float32",
        "WikiText-2 test",
        "cpu (Synthetic CPU @ 2.50 GHz), threads: 2",
        "prompt of 1,024 tokens in chunks of 256, 64 new tokens",
        "8 samples",
    ):
        assert words in " ".join(text.split())


def test_verdicts_are_words() -> None:
    text = printed(make_records([1.0, 0.9]))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    record = make_record(0.9)
    ttft, ppl = record.latency.ttft, record.quality.ppl
    assert f"target TTFT 0.9 <= -80 % {ttft} {ttft.interval} not met" in lines
    assert f"target PPL 0.9 +-5 % {ppl} {ppl.interval} met" in lines
    assert f"claim TTFT 0.9 -87 % {ttft} {ttft.interval} not met" in lines
    assert f"claim PPL 0.9 +-0 % {ppl} {ppl.interval} not met" in lines


def test_a_verdict_without_an_interval_has_a_sign_that_is_explained() -> None:
    sure, unsure = (printed([make_record(0.9, documents=count, noise=0.0)]) for count in (8, 3))
    assert (" ~" in sure, "there is none" in sure) == (False, False)
    assert (" ~" in unsure, "there is none" in unsure) == (True, True)


def test_a_reason_is_given_once_and_only_for_a_claim_that_is_not_met() -> None:
    records = make_records([0.9, 0.8, 0.7], ttft_cold_s=1.7)
    text = " ".join(printed(records).split())
    reasons = dict.fromkeys(judgement.why for judgement in judge_claims(records) if judgement.why)
    assert {" ".join(why.split()): text.count(why) for why in reasons} == dict.fromkeys(reasons, 1)
    met = printed([make_record(0.9, ttft=-88.0, ppl=0.0, noise=0.0)])
    assert "Why a claim" not in met


def test_a_sweep_that_drops_nothing_has_no_verdicts() -> None:
    assert "verdict" not in printed([make_record(1.0)])


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"rounds": 6, "documents": 8}, []),
        ({"rounds": 5, "documents": 8}, ["(5 of 6)"]),
        ({"rounds": 6, "documents": 7}, ["(7 of 8)"]),
        ({"rounds": 5, "documents": 7}, ["(5 of 6)", "(7 of 8)"]),
    ],
)
def test_what_is_few_is_said_to_be_few(parameters: dict[str, int], named: list[str]) -> None:
    record = make_record(**parameters)
    told = cautions([make_record(rounds=20, documents=20), record])
    assert len(told) == len(named)
    assert all(name in sentence for name, sentence in zip(named, told, strict=True))
    assert " ".join(told)[:40] in " ".join(printed([record]).split())


def test_a_machine_whose_speed_moved_is_told_of() -> None:
    record = make_record(rounds=20, documents=20)
    moved = record.latency.model_copy(update={"calibration_s": (0.01, 0.012)})
    (told,) = cautions([record, record.model_copy(update={"latency": moved})])
    assert "20 %" in told


def beyond_the_mean(*records: Record) -> list[str]:
    """The rows of the table of that name, with single spaces."""
    _, found, below = printed(records).partition("Beyond the mean")
    lines = [" ".join(line.split()) for line in below.splitlines()]
    return lines[4 : lines.index("", 4)] if found else []


def test_what_the_mean_hides_has_a_table() -> None:
    record = make_record(0.7)
    quality = record.quality
    assert quality.divergence is not None
    assert quality.long_range is not None
    assert quality.decoded is not None
    row, intervals, *_ = beyond_the_mean(record)
    divergence = " ".join(f"{nats:.3f}" for nats in quality.divergence)
    assert row == f"0.7 {divergence} {quality.long_range} {quality.long_range_tokens} {quality.decoded}"
    assert intervals == f"{quality.long_range.interval} {quality.decoded.interval}"


def test_it_is_left_out_where_records_have_means_only() -> None:
    """Of an earlier version; and what one record lacks is a dash beside what others have."""
    old = without_more(make_record(0.8), "token_kl", "local_nll", "decoded_nll")
    assert beyond_the_mean(old) == []
    assert str(old.quality.ppl) in printed([old])
    lacking = without_more(make_record(0.7), "token_kl", "local_nll"), without_more(make_record(0.6), "decoded_nll")
    rows = beyond_the_mean(make_record(0.9), old, *lacking)
    assert [row.split()[0] for row in rows[:6:2]] == ["0.9", "0.7", "0.6"]
    assert rows[2] == f"0.7 - - - - - - {lacking[0].quality.decoded}"
    assert rows[4].endswith(f"% {lacking[1].quality.long_range_tokens} -")


def test_without_an_interval_there_is_none() -> None:
    assert "no interval" in printed([make_record(rounds=2)])
    record = make_record(documents=3)
    assert f"{record.quality.ppl} " in (told := printed([record]))
    assert "no interval" in told
    assert "no interval" not in printed([make_record()])


def test_one_table_for_each_setting() -> None:
    records = [*make_records([0.9, 0.8]), *make_records([0.9], prompt_tokens=512), make_record(0.9, device="cuda")]
    text = printed(records)
    assert text.count("KnormPress: knorm") == 3
    assert text.index("prompt of 1,024") < text.index("prompt of 512") < text.index("cuda (")


def test_a_model_that_is_spread_has_its_map_above_a_table_of_its_own() -> None:
    spread = make_record(0.9, device_map="cpu: model.layers.0; disk: model.layers.1-2")
    text = printed([*make_records([0.9, 0.8]), spread])
    assert text.count("KnormPress: knorm") == 2
    assert text.count("map      cpu: model.layers.0; disk: model.layers.1-2") == 1


def test_a_cold_call_measured_in_another_setting_is_told_of_too() -> None:
    text = printed([make_record(0.9, prompt_tokens=512), make_record(1.0, method="full", ttft_cold_s=2.5)])
    assert "here 2.5 s cold" in " ".join(text.split())


def test_names_with_brackets_are_printed_as_they_are() -> None:
    assert "model[bold]/x[/bold]" in printed([make_record(model_name="model[bold]/x[/bold]")])


def test_counted_cost_stands_in_a_table_of_its_own_where_it_was_counted() -> None:
    (record,) = make_records((0.7,))
    assert record.cost is not None
    text = printed([record])
    lines = text[text.index("Counted cost against the full cache") :].splitlines()
    (decode,) = (line.split() for line in lines if line.lstrip().startswith("decode"))
    changes = [record.cost.change("decode", name) for name in ("ops", "moved", "flops", "allocated")]
    assert decode == ["decode", *" ".join(map(str, changes)).split(), "6.44"]
    assert "Counted cost" not in printed([record.model_copy(update={"cost": None})])

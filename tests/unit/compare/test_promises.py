"""The guide's targets and claims, at their limits and with the reasons that are given."""

from __future__ import annotations

import pytest

from knormpress.compare.promises import Judgement, judge_claims, judge_targets, losses
from knormpress.records.schema import Record
from knormpress.stats.intervals import Change
from tests.record_factory import make_planned, make_record, make_records


def with_changes(record: Record, **changes: Change) -> Record:
    """A copy of ``record`` with these in place of the changes that follow from what was measured."""
    latency, quality = record.latency.model_copy(), record.quality.model_copy()
    for name, change in changes.items():
        # Where a cached property keeps its value.
        vars(quality if name == "ppl" else latency)[name] = change
    return record.model_copy(update={"latency": latency, "quality": quality})


def changed(keep_ratio: float, **percents: float) -> Record:
    """A record of ``keep_ratio`` with these changes, and intervals of one point."""
    return with_changes(make_record(keep_ratio), **{name: Change(at, at, at) for name, at in percents.items()})


@pytest.mark.parametrize(
    ("ttft", "throughput", "ppl", "met"),
    [
        (-80.0, -10.0, 5.0, (True, True, True)),
        (-95.0, 40.0, -5.0, (True, True, True)),
        (-79.9, -10.1, 5.1, (False, False, False)),
        (87.0, 10.0, -5.1, (False, True, False)),
    ],
)
def test_targets(ttft: float, throughput: float, ppl: float, met: tuple[bool, bool, bool]) -> None:
    judgements = judge_targets([changed(0.8, ttft=ttft, throughput=throughput, ppl=ppl)])
    assert [judgement.what for judgement in judgements] == ["TTFT", "throughput", "PPL"]
    assert tuple(judgement.met for judgement in judgements) == met


def test_a_ratio_that_drops_nothing_has_no_target() -> None:
    assert {judgement.label for judgement in judge_targets(make_records([1.0, 0.9]))} == {"0.9"}


def test_the_guides_own_figures_would_meet_its_claims() -> None:
    judgements = judge_claims(
        [
            changed(0.9, ttft=-86.5, throughput=-8.5, ppl=0.0),
            changed(0.8, ttft=-89.0, throughput=-9.0, ppl=0.5),
            changed(0.7, ttft=-92.0, throughput=+9.0, ppl=-0.5),
        ]
    )
    assert len(judgements) == 9
    assert all(judgement.met and judgement.why is None for judgement in judgements)
    promised = [judgement.promised for judgement in judgements if judgement.what == "TTFT"]
    assert promised == ["-87 %", "-89 %", "-90 %"]


@pytest.mark.parametrize(("name", "percent"), [("ttft", -86.4), ("throughput", -8.6), ("ppl", 0.6), ("ppl", -0.6)])
def test_a_claim_that_is_just_missed_is_not_met(name: str, percent: float) -> None:
    figures = {"ttft": -87.0, "throughput": -8.0, "ppl": 0.0, name: percent}
    missed = [judgement for judgement in judge_claims([changed(0.9, **figures)]) if not judgement.met]
    assert [judgement.what.lower() for judgement in missed] == [name]
    assert missed[0].why


def test_what_a_small_model_shows_meets_one_claim() -> None:
    judgements = judge_claims(make_records([1.0, 0.9, 0.8, 0.7, 0.5]))
    assert {judgement.what for judgement in judgements if judgement.met} == {"throughput"}
    assert all((judgement.why is None) == judgement.met for judgement in judgements)


def test_no_claim_is_made_for_other_methods_plans_or_ratios() -> None:
    records = [make_record(0.9, method="random"), make_record(0.9, plan=(0.9, 0.9)), make_record(0.6)]
    assert judge_claims(records) == []


@pytest.mark.parametrize(
    ("percent", "low", "high", "crosses", "word"),
    [
        (4.0, 3.0, 4.9, False, "met"),
        (4.0, 3.0, 5.0, False, "met"),
        (4.0, 3.0, 6.0, True, "met ~"),
        (6.0, 4.0, 8.0, True, "not met ~"),
        (-6.0, -7.0, -4.0, True, "not met ~"),
        (6.0, 5.5, 8.0, False, "not met"),
        (6.0, None, None, None, "not met ~"),
        (4.0, None, None, None, "met ~"),
    ],
)
def test_an_interval_across_the_limit_and_none_are_said(
    percent: float, low: float | None, high: float | None, crosses: bool | None, word: str
) -> None:
    *_, judgement = judge_targets([with_changes(make_record(0.8), ppl=Change(percent, low, high))])
    assert (judgement.what, judgement.crosses, judgement.word) == ("PPL", crosses, word)


def reason(judgements: list[Judgement]) -> str:
    """Why the first is not met."""
    why = judgements[0].why
    assert why is not None
    return why


def test_the_reason_for_ttft_names_cold_and_warm_where_measured() -> None:
    warm, cold = make_records([0.9, 0.8]), make_record(1.0, ttft_cold_s=2.0, noise=0.0)
    assert "cold" not in reason(judge_claims(warm))
    for told in (reason(judge_claims([cold, *warm])), reason(judge_claims(warm, beside=[cold]))):
        assert "2 s cold and 0.41 s warm (-79.5 %)" in told


def test_the_reason_for_ttft_points_to_what_shortens_it() -> None:
    """The rows of the same setting, wherever they stand; no claim is made for them, but they have the targets."""
    ratios, ways = make_records([0.9, 0.8], prompt_tokens=4096), make_planned(noise=0.0)
    for judged in (judge_claims([*ratios, *ways]), judge_claims(ratios, beside=ways)):
        assert "plan 0.40 in chunks, -30.0 %; plan 0.40 reused, -88.0 %." in reason(judged)
        assert len(judged) == 6
    for others in (ways[:1], make_planned(prompt_tokens=2048), make_planned(device="cuda")):
        assert "reused" not in reason(judge_claims(ratios, beside=others))
    met = {verdict.label: verdict.met for verdict in judge_targets(ways) if verdict.what == "TTFT"}
    assert met == {"0.4": False, "0.4 in chunks": False, "0.4 reused": True}


def test_what_is_lost_says_by_which_way() -> None:
    told = losses(make_planned(found=0.5))
    assert ["chunks" in sentence for sentence in told] == [False, True, False]
    assert ["reused" in sentence for sentence in told] == [False, False, True]


def test_the_reason_for_ttft_speaks_of_chunks_where_the_prompt_came_in_chunks() -> None:
    assert "chunk" in reason(judge_claims([make_record(0.9, prefill_chunk=256)]))
    assert "chunk" not in reason(judge_claims([make_record(0.9)]))

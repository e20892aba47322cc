"""The figures derived from a record, each computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from knormpress.records.figures import (
    LONG_RANGE_NATS,
    SPEED_MOVED,
    DocumentScore,
    Latency,
    Memory,
    Quality,
    Run,
    ppl_change_between,
)
from knormpress.records.schema import Record, ratio_label
from knormpress.stats.intervals import Change
from tests.record_factory import make_record


def latency(baseline: Run, candidate: Run, *, pairs: int = 3, calibration: tuple[float, float] = (1.0, 1.0)) -> Latency:
    return Latency(
        baseline=(baseline,) * pairs,
        candidate=(candidate,) * pairs,
        stopped="rounds",
        calibration_s=calibration,
        ttft_cold_s=None,
    )


def quality(*documents: tuple[int, float, float, float]) -> Quality:
    """Documents of so many tokens, each with the rise in nats of every token, the divergence and the agreement."""
    scores = []
    for number, (tokens, rise, kl, top1) in enumerate(documents):
        before = np.linspace(1.0, 5.0, tokens)
        nll = {"baseline_nll": tuple(before.tolist()), "candidate_nll": tuple((before + rise).tolist())}
        scores.append(DocumentScore(document=number, kl=kl, top1_agreement=top1, **nll))
    return Quality(documents=tuple(scores))


def test_times() -> None:
    slow = Run(ttft_s=2.0, gaps_s=(0.5, 0.1, 0.3, 0.1))
    fast = Run(ttft_s=1.0, gaps_s=(0.2, 0.2, 0.2, 0.4))
    times = latency(slow, fast)
    assert times.ttft.percent == pytest.approx(-50.0)
    assert times.tpot.percent == pytest.approx(0.0)
    assert times.throughput.percent == pytest.approx(50.0)
    assert times.ratios("ttft") == [0.5] * 3
    assert (times.pairs, times.decodes) == (3, True)
    before, after = times.baseline_speed, times.candidate_speed
    assert before.ttft_s == 2.0
    assert before.tpot_s == pytest.approx(0.25)
    assert before.throughput == pytest.approx(5 / 3.0)
    assert (after.gap_p50_s, after.gap_p90_s) == pytest.approx((0.2, 0.4))
    assert not latency(Run(ttft_s=1.0, gaps_s=()), Run(ttft_s=1.0, gaps_s=())).decodes


def test_gaps_are_pooled_over_the_runs() -> None:
    runs = (Run(ttft_s=1.0, gaps_s=(0.1, 0.1)), Run(ttft_s=3.0, gaps_s=(0.2, 0.3)), Run(ttft_s=5.0, gaps_s=(0.4,)))
    speed = latency(runs[0], runs[0]).model_copy(update={"candidate": runs}).candidate_speed
    assert (speed.ttft_s, speed.tpot_s) == pytest.approx((3.0, 0.25))
    assert (speed.gap_p50_s, speed.gap_p90_s) == pytest.approx((0.2, 0.36))


def test_a_drift_of_the_machine_cancels() -> None:
    steady, drifting = (
        make_record(0.7, ttft=-4.0, tpot=-20.0, noise=0.002, rounds=10, drift=drift).latency for drift in (0.0, 2.0)
    )
    for name in ("ttft", "tpot", "throughput"):
        before, after = steady.change(name), drifting.change(name)
        assert (after.percent, *after.ends) == pytest.approx((before.percent, *before.ends), abs=1e-9)
    assert steady.ttft.percent == pytest.approx(-4.0, abs=0.5)
    assert steady.tpot.percent == pytest.approx(-20.0, abs=0.5)


@pytest.mark.parametrize(
    ("before", "after", "moved"),
    [(1.0, 1.2, 20.0), (1.0, 0.8, -20.0), (1.0, 1.105, 10.5), (1.0, 1.095, None), (1.0, 0.905, None), (1.0, 1.0, None)],
)
def test_the_speed_of_the_machine(before: float, after: float, moved: float | None) -> None:
    run = Run(ttft_s=1.0, gaps_s=(0.1,))
    assert SPEED_MOVED == 10.0
    speed_moved = latency(run, run, calibration=(before, after)).speed_moved
    assert speed_moved == (moved if moved is None else pytest.approx(moved))


def test_a_longer_document_weighs_more() -> None:
    scores = quality((300, 0.1, 0.02, 0.9), (100, 0.4, 0.10, 0.5))
    assert scores.tokens == [300, 100]
    assert scores.ppl_percent == pytest.approx(100 * math.expm1(0.175))
    assert scores.ppl.percent == scores.ppl_percent
    assert scores.ppl.interval == "no interval"
    assert scores.baseline_ppl == pytest.approx(math.exp(3.0))
    assert scores.candidate_ppl == pytest.approx(math.exp(3.175))
    assert scores.kl == pytest.approx(0.04)
    assert scores.top1 == pytest.approx(0.8)
    assert [gap.mean() for gap in scores.gaps] == pytest.approx([0.1, 0.4])


def with_values(scores: Quality, name: str, *values: tuple[float, ...]) -> Quality:
    """``scores`` with another value for each token of each document."""
    pairs = zip(scores.documents, values, strict=True)
    return Quality(documents=tuple(one.model_copy(update={name: given}) for one, given in pairs))


def test_divergences_are_pooled_over_the_documents() -> None:
    divergences = np.random.default_rng(0).permutation(np.arange(101) / 100)
    scores = quality((61, 0.1, 0.5, 1.0), (40, 0.1, 0.5, 1.0))
    found = with_values(scores, "token_kl", tuple(divergences[:61]), tuple(divergences[61:])).divergence
    assert found == pytest.approx((0.5, 0.9, 0.99, 1.0))
    assert scores.divergence is None
    assert with_values(scores, "token_kl", tuple(divergences[:61]), ()).divergence is None


def test_long_range_is_over_the_tokens_that_a_short_context_predicts_worse() -> None:
    assert LONG_RANGE_NATS == 2.0
    scores = quality((100, 0.1, 0.0, 1.0), (100, 0.4, 0.0, 1.0), (100, 7.0, 0.0, 1.0))
    (before, *_) = (one.baseline_nll for one in scores.documents)
    near, far = tuple(nll + 1.99 for nll in before), tuple(nll + 2.01 for nll in before)
    found = with_values(scores, "local_nll", far[:30] + near[30:], near[:90] + far[90:], near)
    assert found.long_range_tokens == 40
    assert found.long_range is not None
    assert found.long_range.percent == pytest.approx(100 * math.expm1((30 * 0.1 + 10 * 0.4) / 40))
    # Two documents have such tokens.
    assert found.long_range.interval == "no interval"
    for none in (
        scores,
        with_values(scores, "local_nll", near, near, near),
        with_values(scores, "local_nll", far, far, ()),
    ):
        assert none.long_range_tokens == 0
        assert none.long_range is None


def test_decoded_is_against_the_full_cache_too() -> None:
    scores = quality((300, 0.1, 0.0, 1.0), (100, 0.1, 0.0, 1.0))
    first, second = (one.baseline_nll for one in scores.documents)
    found = with_values(scores, "decoded_nll", tuple(nll + 0.2 for nll in first), tuple(nll + 0.6 for nll in second))
    assert found.decoded is not None
    assert found.decoded.percent == pytest.approx(100 * math.expm1(0.3))
    assert found.ppl.percent == pytest.approx(100 * math.expm1(0.1))
    assert scores.decoded is None
    assert with_values(scores, "decoded_nll", first, ()).decoded is None


def test_the_cost_of_a_prefill_and_of_a_token() -> None:
    record = make_record(0.7)
    cost = record.cost
    assert cost is not None
    assert cost.full("prefill", "ops") == 2_100
    assert cost.candidate("decode", "host_reads") == (16 + 87) / 16
    assert cost.change("decode", "host_reads").percent == pytest.approx(100 * 87 / 16)
    assert cost.change("decode", "ops").interval
    none = cost.baseline_decode.model_copy(update={"flops": 0})
    assert math.isnan(cost.model_copy(update={"baseline_decode": none}).change("decode", "flops").percent)


def test_records_without_cost_are_read() -> None:
    stored = make_record(0.7).model_dump(exclude={"cost"})
    assert Record(**stored).cost is None


def test_scores_of_earlier_versions_are_read() -> None:
    stored = make_record(0.9).quality.model_dump()
    for document in stored["documents"]:
        for name in ("token_kl", "local_nll", "decoded_nll"):
            del document[name]
    found = Quality.model_validate(stored)
    assert found.ppl == make_record(0.9).quality.ppl
    assert (found.divergence, found.long_range, found.long_range_tokens, found.decoded) == (None, None, 0, None)


def test_keeping_everything_changes_nothing() -> None:
    assert make_record(1.0).quality.ppl == Change(0.0, 0.0, 0.0)


def test_pairing_makes_the_interval_of_a_small_change_small() -> None:
    """The tokens' own difficulty, which is far larger than the change, does not enter."""
    low, high = make_record(0.9, ppl=1.4).quality.ppl.ends
    assert 0.0 < low < 1.4 < high < 3.0


def test_two_candidates_are_compared_token_by_token() -> None:
    """The difference is exact, though each one's own interval against the full cache is wide."""
    first, second = (
        quality(*[(300, 0.1, 0.0, 1.0), (100, -0.3, 0.0, 1.0)] * 4),
        quality(*[(300, 0.2, 0.0, 1.0), (100, -0.2, 0, 1)] * 4),
    )
    change = ppl_change_between(first, second)
    assert (change.percent, *change.ends) == pytest.approx([100 * math.expm1(0.1)] * 3)
    assert ppl_change_between(second, first).percent == pytest.approx(100 * math.expm1(-0.1))
    assert ppl_change_between(first, first) == Change(0.0, 0.0, 0.0)
    in_one_document = quality(*[(300, 0.1, 0.0, 1.0), (100, 0.1, 0.0, 1.0)] * 4)
    assert ppl_change_between(first, in_one_document).percent == pytest.approx(100 * math.expm1(0.4 / 4))


def test_candidates_that_scored_other_documents_are_not_compared() -> None:
    with pytest.raises(ValueError, match="zip"):
        ppl_change_between(quality((100, 0.1, 0.0, 1.0)), quality((100, 0.1, 0.0, 1.0), (100, 0.1, 0.0, 1.0)))
    with pytest.raises(ValueError, match=r"\(99,\) \(100,\)"):
        ppl_change_between(quality((100, 0.1, 0.0, 1.0)), quality((99, 0.1, 0.0, 1.0)))


def test_bytes() -> None:
    memory = Memory(baseline_cache_bytes=1000, candidate_cache_bytes=250, baseline_device=(), candidate_device=())
    assert memory.ratio == 0.25
    assert memory.change == Change(-75.0, -75.0, -75.0)
    assert math.isnan(memory.model_copy(update={"baseline_cache_bytes": 0}).ratio)


@pytest.mark.parametrize(("plan", "keep_ratio", "label"), [(None, 0.9, "0.9"), ((1.0, 0.5, 0.6), 0.7, "0.7")])
def test_a_plan_stands_for_its_mean(plan: tuple[float, ...] | None, keep_ratio: float, label: str) -> None:
    record = make_record(0.9, plan=plan)
    assert record.keep_ratio == pytest.approx(keep_ratio)
    assert record.label == label


@pytest.mark.parametrize(("ratio", "text"), [(1.0, "1.0"), (0.9, "0.9"), (0.05, "0.05"), (0.58333, "0.583")])
def test_a_keep_ratio_as_text(ratio: float, text: str) -> None:
    assert ratio_label(ratio) == text


def test_a_changed_copy_has_figures_of_its_own():
    latency = make_record().latency
    assert latency.ttft.percent != 0
    assert latency.model_copy(update={"candidate": latency.baseline}).ttft.percent == 0

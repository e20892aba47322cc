from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knormpress.changes import documents_to_decide, gate, ppl_change
from knormpress.compare import Judgement, Row, differences, group_rows, judge_claims, judge_targets, summarize
from knormpress.errors import KnormError
from knormpress.intervals import Change, ratio_change, ratio_of_ratios
from knormpress.records import DocumentScore, Record, Run
from tests.record_factory import make_record, make_records


def document(gaps: Sequence[float], number: int = 0) -> DocumentScore:
    before = np.linspace(1.0, 5.0, len(gaps))
    return DocumentScore(
        document=number,
        baseline_nll=tuple(before.tolist()),
        candidate_nll=tuple((before + gaps).tolist()),
        kl=0.0,
        top1_agreement=1.0,
    )


def with_runs(record: Record, baseline: Sequence[Run], candidate: Sequence[Run]) -> Record:
    latency = record.latency.model_copy(update={"baseline": tuple(baseline), "candidate": tuple(candidate)})
    return record.model_copy(update={"latency": latency})


def with_documents(record: Record, *documents: DocumentScore) -> Record:
    return record.model_copy(update={"quality": record.quality.model_copy(update={"documents": documents})})


def bounds(change: Change) -> tuple[float, float]:
    assert change.low is not None
    assert change.high is not None
    return change.low, change.high


class TestTimings:
    def test_known_answers(self) -> None:
        slow = Run(ttft_s=2.0, gaps_s=(0.5, 0.1, 0.3, 0.1))
        fast = Run(ttft_s=1.0, gaps_s=(0.2, 0.2, 0.2, 0.4))
        row = summarize(with_runs(make_record(), [slow] * 3, [fast] * 3))
        assert row.ttft.percent == pytest.approx(-50.0)
        assert row.tpot.percent == pytest.approx(0.0)
        assert row.throughput.percent == pytest.approx(50.0)
        assert row.baseline.ttft_s == 2.0
        assert row.baseline.tpot_s == pytest.approx(0.25)
        assert row.baseline.throughput == pytest.approx(5 / 3.0)
        assert row.candidate.gap_p50_s == pytest.approx(0.2)
        assert row.candidate.gap_p90_s == pytest.approx(0.4)

    def test_the_middle_pair_decides(self) -> None:
        assert ratio_change([1.0, 1.0, 1.0], [0.5, 0.9, 40.0]).percent == pytest.approx(-10.0)

    def test_it_is_the_median_of_ratios_and_not_the_ratio_of_medians(self) -> None:
        assert ratio_change([1.0, 2.0, 4.0], [2.0, 2.0, 2.0]).percent == pytest.approx(0.0)
        assert ratio_change([1.0, 2.0, 10.0], [3.0, 1.0, 2.0]).percent == pytest.approx(-50.0)

    def test_a_drift_of_the_machine_cancels(self) -> None:
        """The machine becomes three times slower; unpaired, the two sides would lie in each other's range."""
        random = np.random.default_rng(3)
        drift = np.linspace(1.0, 3.0, 12) * np.exp(random.normal(0.0, 0.3, 12))
        change = ratio_change(drift, 0.8 * drift * np.exp(random.normal(0.0, 0.003, 12)))
        low, high = bounds(change)
        assert change.percent == pytest.approx(-20.0, abs=0.5)
        assert high - low < 1.5
        shuffled = ratio_change(drift, 0.8 * np.roll(drift, 5))
        assert np.ptp(bounds(shuffled)) > 20.0

    def test_a_drift_cancels_in_a_whole_record(self) -> None:
        steady = summarize(make_record(0.7, ttft=-4.0, tpot=-20.0, noise=0.002, rounds=10))
        drifting = summarize(make_record(0.7, ttft=-4.0, tpot=-20.0, noise=0.002, rounds=10, drift=2.0))
        for name in ("ttft", "tpot", "throughput"):
            assert str(getattr(drifting, name)) == str(getattr(steady, name))
            assert bounds(getattr(drifting, name)) == pytest.approx(bounds(getattr(steady, name)), abs=1e-9)

    @pytest.mark.parametrize("pairs", [1, 2])
    def test_one_or_two_pairs_give_no_interval(self, pairs: int) -> None:
        change = ratio_change([1.0, 2.0][:pairs], [0.9, 1.8][:pairs])
        assert change.percent == pytest.approx(-10.0)
        assert (change.low, change.high) == (None, None)
        assert change.interval == "no interval"

    @pytest.mark.parametrize("pairs", [3, 8])
    def test_equal_ratios_give_an_interval_of_one_point_and_no_warning(self, pairs: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            change = ratio_change([1.0] * pairs, [0.5] * pairs)
        assert change == Change(-50.0, -50.0, -50.0)

    def test_the_same_runs_give_the_same_interval(self) -> None:
        record = make_record()
        assert summarize(record).ttft == summarize(record).ttft

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.tuples(st.floats(1e-4, 1e3), st.floats(1e-4, 1e3)), min_size=3, max_size=9))
    def test_the_interval_lies_within_the_pairs_and_holds_the_change(self, pairs: list[tuple[float, float]]) -> None:
        baseline, candidate = zip(*pairs, strict=True)
        change = ratio_change(baseline, candidate)
        low, high = bounds(change)
        ratios = [after / before for before, after in pairs]
        assert low <= change.percent <= high
        rounding = 1e-9 * (1.0 + max(ratios))
        assert 1.0 + low / 100.0 >= min(ratios) - rounding
        assert 1.0 + high / 100.0 <= max(ratios) + rounding

    def test_the_interval_covers_the_truth_in_about_95_percent(self) -> None:
        random = np.random.default_rng(8)
        held = 0
        for _ in range(300):
            machine = random.gamma(4.0, 0.1, 20)
            low, high = bounds(ratio_change(machine, machine * 0.85 * np.exp(random.normal(0.0, 0.1, 20))))
            held += low <= -15.0 <= high
        assert 0.90 <= held / 300 <= 0.985

    def test_runs_that_do_not_pair_are_refused(self) -> None:
        record = make_record()
        runs = record.latency.baseline
        with pytest.raises(KnormError, match="7 baseline and 8 candidate runs"):
            summarize(with_runs(record, runs[1:], runs))
        with pytest.raises(KnormError, match="0 baseline and 0 candidate runs"):
            summarize(with_runs(record, [], []))

    @pytest.mark.parametrize(
        "run",
        [
            Run(ttft_s=0.5, gaps_s=()),
            Run(ttft_s=0.0, gaps_s=(0.1,)),
            Run(ttft_s=math.nan, gaps_s=(0.1,)),
            Run(ttft_s=0.5, gaps_s=(0.0, 0.0)),
            Run(ttft_s=0.5, gaps_s=(0.1, math.inf)),
        ],
    )
    def test_times_that_are_none_are_refused(self, run: Run) -> None:
        record = make_record()
        with pytest.raises(KnormError, match="wanted times above 0 and at least 2 new tokens"):
            summarize(with_runs(record, record.latency.baseline, [run] * 8))


class TestQuality:
    def test_known_answers(self) -> None:
        record = make_record()
        scores = [document([0.1] * 300), document([0.4] * 100, 1)]
        scores = [
            scores[0].model_copy(update={"kl": 0.02, "top1_agreement": 0.9}),
            scores[1].model_copy(update={"kl": 0.10, "top1_agreement": 0.5}),
        ]
        row = summarize(with_documents(record, *scores))
        assert row.ppl.percent == pytest.approx((math.exp(0.175) - 1) * 100)
        assert row.candidate_ppl / row.baseline_ppl == pytest.approx(math.exp(0.175))
        assert row.baseline_ppl == pytest.approx(math.exp(3.0))
        assert row.kl == pytest.approx(0.04)
        assert row.top1 == pytest.approx(0.8)

    def test_no_difference_is_exactly_no_change(self) -> None:
        assert ppl_change([document([0.0] * 200, number) for number in range(3)]) == Change(0.0, 0.0, 0.0)
        assert summarize(make_record(1.0)).ppl == Change(0.0, 0.0, 0.0)

    def test_documents_that_all_agree_give_a_narrow_interval(self) -> None:
        change = ppl_change([document([0.05] * 256, number) for number in range(4)])
        low, high = bounds(change)
        assert low == pytest.approx(high)
        assert low <= change.percent <= high

    def test_a_gap_that_no_float_holds_fails_the_gate(self) -> None:
        change = ppl_change([document([1_000.0] * 128, number) for number in range(3)])
        assert math.isfinite(change.percent)
        assert gate(change, 5.0) == "fail"

    def test_the_spread_between_documents_counts(self) -> None:
        """Within each document nothing varies: a bootstrap over tokens alone would be sure to a hundredth."""
        change = ppl_change([document([level] * 128, n) for n, level in enumerate((0.0, 0.02, 0.08, 0.1))])
        low, high = bounds(change)
        assert low < 3.0
        assert high > 7.0

    def test_the_spread_within_documents_counts(self) -> None:
        """All documents have one mean; half of each is far above it, half far below."""
        scores = [document([0.5] * 128 + [-0.4] * 128, number) for number in range(4)]
        low, high = bounds(ppl_change(scores))
        assert low < 0.0 < high
        assert high - low > 10.0

    def test_neighbouring_tokens_are_not_taken_for_independent(self) -> None:
        random = np.random.default_rng(5)
        runs = np.repeat(random.normal(0.0, 0.2, 16), 64)
        low, high = bounds(ppl_change([document(runs.tolist())]))
        mixed_low, mixed_high = bounds(ppl_change([document(random.permutation(runs).tolist())]))
        assert high - low > 3 * (mixed_high - mixed_low)

    def test_pairing_makes_the_interval_of_a_small_change_small(self) -> None:
        """The tokens' own difficulty, which is far larger than the change, does not enter."""
        low, high = bounds(summarize(make_record(0.9, ppl=1.4)).ppl)
        assert 0.0 < low < 1.4 < high < 3.0

    def test_longer_documents_weigh_more(self) -> None:
        change = ppl_change([document([0.1] * 900), document([0.0] * 100, 1)])
        assert change.percent == pytest.approx((math.exp(0.09) - 1) * 100)
        # One long document against nine short ones without a change: drawn thrice in ten it holds 81 % of the tokens.
        _, high = bounds(ppl_change([document([0.1] * 900), *(document([0.0] * 90, n) for n in range(1, 10))]))
        assert high == pytest.approx((math.exp(0.1 * 2700 / (2700 + 7 * 90)) - 1) * 100)

    def test_one_short_document_gives_no_interval(self) -> None:
        assert ppl_change([document([0.1] * 64)]).low is None
        assert ppl_change([document([0.1] * 65)]).low is not None

    def test_the_interval_covers_the_truth_in_about_95_percent(self) -> None:
        random = np.random.default_rng(21)
        held = 0
        for _ in range(150):
            own = random.normal(0.05, 0.05, (12, 1))
            scores = [document(gap.tolist(), n) for n, gap in enumerate(random.normal(own, 0.3, (12, 128)))]
            low, high = bounds(ppl_change(scores))
            held += low <= (math.exp(0.05) - 1) * 100 <= high
        assert 0.88 <= held / 150 <= 0.995

    @pytest.mark.parametrize("nll", [math.nan, math.inf, -math.inf, 800.0])
    def test_a_likelihood_that_no_perplexity_comes_from_is_refused(self, nll: float) -> None:
        score = document([0.0] * 10).model_copy(update={"candidate_nll": (1.0,) * 9 + (nll,)})
        with pytest.raises(KnormError, match=r"document 0, has a score of .*; wanted finite values"):
            summarize(with_documents(make_record(), score))

    @pytest.mark.parametrize("name", ["kl", "top1_agreement"])
    def test_other_scores_must_be_finite_too(self, name: str) -> None:
        score = document([0.0] * 10).model_copy(update={name: math.nan})
        with pytest.raises(KnormError, match="has a score of nan"):
            summarize(with_documents(make_record(), score))

    def test_scores_that_do_not_pair_are_refused(self) -> None:
        score = document([0.0] * 10).model_copy(update={"candidate_nll": (1.0,) * 9})
        with pytest.raises(KnormError, match="10 baseline and 9 candidate tokens"):
            summarize(with_documents(make_record(), score))
        with pytest.raises(KnormError, match="has no scored document"):
            summarize(with_documents(make_record()))


class TestText:
    @pytest.mark.parametrize(
        ("percent", "text"),
        [
            (1.44, "+1.4 %"),
            (-0.04, "0.0 %"),
            (0.0, "0.0 %"),
            (-12.35, "-12.3 %"),
            (99.94, "+99.9 %"),
            (99.96, "+100 %"),
            (612.7, "+613 %"),
            (1.234e6, "+1.2e6 %"),
        ],
    )
    def test_a_change(self, percent: float, text: str) -> None:
        assert str(Change(percent, None, None)) == text

    def test_an_interval(self) -> None:
        assert Change(1.0, -0.51, 612.0).interval == "-0.5..+612"


class TestVerdicts:
    @pytest.mark.parametrize(
        ("ttft", "throughput", "ppl", "met"),
        [
            (-80.0, -10.0, 5.0, (True, True, True)),
            (-95.0, 40.0, -5.0, (True, True, True)),
            (-79.9, -10.1, 5.1, (False, False, False)),
            (87.0, 10.0, -5.1, (False, True, False)),
        ],
    )
    def test_targets(self, ttft: float, throughput: float, ppl: float, met: tuple[bool, bool, bool]) -> None:
        verdicts = judge_targets([row_with(0.8, ttft=ttft, throughput=throughput, ppl=ppl)])
        assert [verdict.what for verdict in verdicts] == ["TTFT", "throughput", "PPL"]
        assert tuple(verdict.met for verdict in verdicts) == met

    def test_a_ratio_that_drops_nothing_has_no_target(self) -> None:
        verdicts = judge_targets(map(summarize, make_records([1.0, 0.9])))
        assert {verdict.keep_ratio for verdict in verdicts} == {0.9}

    def test_the_guides_own_figures_would_meet_its_claims(self) -> None:
        rows = [
            row_with(0.9, ttft=-86.6, throughput=-8.4, ppl=0.0),
            row_with(0.8, ttft=-89.0, throughput=-9.0, ppl=0.4),
            row_with(0.7, ttft=-92.0, throughput=+9.0, ppl=-0.4),
        ]
        verdicts = judge_claims(rows)
        assert len(verdicts) == 9
        assert all(verdict.met and verdict.why is None for verdict in verdicts)

    def test_what_is_measured_here_meets_one_of_them(self) -> None:
        verdicts = judge_claims(map(summarize, make_records([1.0, 0.9, 0.8, 0.7, 0.5])))
        assert [verdict.promised for verdict in verdicts if verdict.what == "TTFT"] == ["-87 %", "-89 %", "-90 %"]
        assert {verdict.what for verdict in verdicts if verdict.met} == {"throughput"}
        assert all((verdict.why is None) == verdict.met for verdict in verdicts)

    def test_a_throughput_below_the_claim_is_not_met(self) -> None:
        (_, verdict, _) = judge_claims([row_with(0.9, ttft=0.0, throughput=-20.0, ppl=0.0)])
        assert not verdict.met
        assert verdict.why is not None
        assert "more slowly" in verdict.why

    def test_no_claim_is_made_for_other_methods_or_plans(self) -> None:
        records = [make_record(0.9, method="random"), make_record(0.9, plan=(0.9, 0.9)), make_record(0.6)]
        assert judge_claims(map(summarize, records)) == []

    def test_an_interval_across_the_limit_is_said(self) -> None:
        def ppl(percent: float, low: float | None, high: float | None) -> Judgement:
            row = summarize(make_record(0.8))
            (_, _, verdict) = judge_targets([changed(row, ppl=Change(percent, low, high))])
            return verdict

        assert ppl(4.0, 3.0, 4.9).crosses is False
        assert ppl(4.0, 3.0, 4.9).word == "met"
        assert ppl(4.0, 3.0, 6.0).crosses is True
        assert ppl(4.0, 3.0, 6.0).word == "met ~"
        assert ppl(6.0, 4.0, 8.0).word == "not met ~"
        assert ppl(-6.0, -7.0, -4.0).crosses is True
        assert ppl(6.0, None, None).crosses is None
        assert ppl(6.0, None, None).word == "not met"

    def test_the_reason_for_ttft_names_cold_and_warm_where_measured(self) -> None:
        warm = make_records([0.9, 0.8])
        (first, *_) = judge_claims(map(summarize, warm))
        assert first.why is not None
        assert "cold" not in first.why
        cold = make_record(1.0, ttft_cold_s=2.0, noise=0.0)
        (first, *_) = judge_claims(map(summarize, [cold, *warm]))
        assert first.why is not None
        assert first.why.endswith("here 2 s cold and 0.41 s warm (-79.5 %).")

    def test_the_reason_for_ttft_speaks_of_chunks_where_the_prompt_came_in_chunks(self) -> None:
        (verdict, *_) = judge_claims([summarize(make_record(0.9, prefill_chunk=256))])
        assert verdict.why is not None
        assert "every chunk" in verdict.why


def changed(row: Row, **fields: Change) -> Row:
    return Row(**{name: fields.get(name, getattr(row, name)) for name in Row.__dataclass_fields__})


def row_with(keep_ratio: float, **percents: float) -> Row:
    fields = {name: Change(percent, percent, percent) for name, percent in percents.items()}
    return changed(summarize(make_record(keep_ratio)), **fields)


class TestRows:
    def test_bytes_and_ratios(self) -> None:
        row = summarize(make_record(0.9))
        assert row.compression == pytest.approx(0.1)
        assert row.cache.percent == pytest.approx(-29 / 30 * 10, abs=0.01)
        assert row.cache.low == row.cache.percent
        assert row.label == "0.9"
        assert row.pairs == 8

    def test_a_plan_stands_for_its_mean(self) -> None:
        row = summarize(make_record(0.9, plan=(1.0, 0.5, 0.6)))
        assert row.keep_ratio == pytest.approx(0.7)
        assert row.label == "0.7"

    def test_groups_fall_in_keep_ratio_and_the_later_of_two_cells_stands(self) -> None:
        records = [*make_records([0.7, 1.0, 0.9]), make_record(0.9, seed=2), make_record(0.9, prompt_tokens=512)]
        groups = group_rows(map(summarize, records))
        assert [[row.keep_ratio for row in group] for group in groups] == [[1.0, 0.9, 0.7], [0.9]]
        assert groups[0][1].record == records[3]

    def test_differences_are_named(self) -> None:
        rows = list(map(summarize, [make_record(0.9), make_record(0.8, device="cuda", prompt_tokens=2048)]))
        assert differences(rows[:1]) == {}
        assert differences(rows) == {
            "device": ["cpu (Synthetic CPU @ 2.50 GHz)", "cuda (Synthetic CPU @ 2.50 GHz)"],
            "prompt tokens": [1024, 2048],
            "context tokens": [1024, 2048],
        }

    def test_two_models_of_one_name_differ(self) -> None:
        rows = list(map(summarize, [make_record(0.9), make_record(0.9, fingerprint="e" * 64)]))
        assert list(differences(rows)) == ["model"]
        assert len(group_rows(rows)) == 2


def test_comparing_and_drawing_need_no_torch() -> None:
    code = (
        "import sys, knormpress.compare, knormpress.plots, knormpress.table; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'matplotlib.pyplot')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-1.0, 4.9, "pass"),
        (-5.0, 5.0, "pass"),
        (4.0, 5.1, "inconclusive"),
        (-5.1, 0.0, "inconclusive"),
        (-9.0, 9.0, "inconclusive"),
        (5.1, 9.0, "fail"),
        (-9.0, -5.1, "fail"),
        (None, None, "inconclusive"),
    ],
)
def test_a_gate_needs_the_whole_interval(low: float | None, high: float | None, verdict: str) -> None:
    assert gate(Change(0.0, low, high), 5.0) == verdict


class TestGrowing:
    def test_how_many_more_documents_would_decide(self) -> None:
        # Half as wide an interval takes four times the documents.
        assert documents_to_decide(Change(3.0, -1.0, 7.0), 5.0, 10) == 30
        assert documents_to_decide(Change(7.0, 3.0, 11.0), 5.0, 10) == 30
        assert documents_to_decide(Change(-7.0, -11.0, -3.0), 5.0, 10) == 30
        assert documents_to_decide(Change(-3.0, -7.0, 1.0), 5.0, 10) == 30
        assert documents_to_decide(Change(5.0, 4.0, 6.0), 5.0, 10) is None
        assert documents_to_decide(Change(3.0, None, None), 5.0, 1) is None

    @given(st.floats(-20, 20), st.floats(0.1, 20), st.integers(2, 50))
    def test_so_many_documents_do_decide(self, middle: float, width: float, documents: int) -> None:
        change = Change(middle, middle - width, middle + width)
        more = documents_to_decide(change, 5.0, documents)
        if gate(change, 5.0) != "inconclusive" or more is None:
            return
        narrow = width * math.sqrt(documents / (documents + more)) * (1 - 1e-9)
        assert gate(Change(middle, middle - narrow, middle + narrow), 5.0) != "inconclusive"

    def test_ratios_measured_apart(self) -> None:
        change = ratio_of_ratios([1.0, 1.02, 0.98, 1.01, 0.99], [1.1, 1.122, 1.078, 1.111, 1.089])
        assert change.percent == pytest.approx(10.0)
        low, high = bounds(change)
        assert 5 < low < 10 < high < 15
        assert ratio_of_ratios([1.0, 1.1], [1.0, 1.1, 1.2]).low is None
        assert bounds(ratio_of_ratios([2.0] * 3, [1.0] * 3)) == pytest.approx((-50.0, -50.0))

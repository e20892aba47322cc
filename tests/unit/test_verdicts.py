"""Each metric's word, from entries whose changes are known."""

from __future__ import annotations

import pytest

from knormpress.errors import KnormError
from knormpress.records import Entry
from knormpress.verdict_table import verdict_lines, verdict_markdown
from knormpress.verdicts import THRESHOLDS, Verdict, judge, read_thresholds, speed_moved, worst
from tests.entry_factory import make_entry


def judged(before: Entry, now: Entry, **thresholds: float) -> Verdict:
    return judge([before], [now], {**THRESHOLDS, **thresholds}, "against aaa")


def words(verdict: Verdict) -> dict[str, str]:
    return {finding.metric: finding.word for finding in verdict.findings}


def test_the_same_figures_are_ok() -> None:
    before, again = make_entry(noise=0.001), make_entry(noise=0.001, seed=1)
    verdict = judged(before, again.model_copy(update={"quality": before.quality}))
    assert verdict.word == "ok"
    assert words(verdict) == dict.fromkeys(THRESHOLDS, "ok")


@pytest.mark.parametrize("metric", ["ttft", "tpot"])
def test_a_slower_figure_is_named(metric: str) -> None:
    slower = {"ttft": 1.15, "tpot": 1.1}[metric]
    base = {"ttft": 0.0, "tpot": -10.0, "noise": 0.001}
    now = base | {metric: (100 + base[metric]) * slower - 100}
    verdict = judged(make_entry(**base), make_entry(**now, seed=1))
    assert verdict.word == "regressed"
    assert words(verdict)[metric] == "regressed"
    assert verdict.reason.startswith(f"{metric} +1")


def test_throughput_gets_worse_by_falling() -> None:
    quick, slow = make_entry(tpot=0.0, ttft=0.0, noise=0.001), make_entry(tpot=30.0, ttft=30.0, noise=0.001)
    assert words(judged(quick, slow))["throughput"] == "regressed"
    assert words(judged(slow, quick))["throughput"] == "improved"


def test_a_machine_that_is_slower_for_both_changes_no_ratio() -> None:
    before = make_entry(noise=0.001)
    runs = before.latency
    assert runs is not None
    slow = runs.model_copy(
        update={
            side: tuple(
                run.model_copy(update={"ttft_s": 2 * run.ttft_s, "gaps_s": tuple(2 * gap for gap in run.gaps_s)})
                for run in getattr(runs, side)
            )
            for side in ("baseline", "candidate")
        }
    )
    verdict = judged(before, before.model_copy(update={"latency": slow}))
    assert {words(verdict)[name] for name in ("ttft", "tpot", "throughput")} == {"ok"}
    assert {words(verdict)[name] for name in ("ttft_s", "tpot_s")} == {"regressed"}


def test_absolute_times_are_compared_between_equal_machines_at_equal_speed_only() -> None:
    before = make_entry(noise=0.001)
    other = make_entry(noise=0.001, device_name="another processor")
    verdict = judged(before, other)
    assert verdict.word == "ok"
    assert words(verdict)["tpot_s"] == "incomparable"
    assert "tpot_s is not compared, as device_name differs" in verdict.reason
    assert before.latency is not None
    moved = before.latency.model_copy(update={"calibration_s": (0.01, 0.012)})
    assert speed_moved(moved) == pytest.approx(20.0)
    assert speed_moved(before.latency) is None
    verdict = judged(before, before.model_copy(update={"latency": moved}))
    assert "the machine's speed moved by 20 %" in verdict.reason


def test_what_noise_hides_is_neither_ok_nor_regressed() -> None:
    verdict = judged(make_entry(noise=0.3, rounds=5), make_entry(noise=0.3, rounds=5, seed=1))
    assert words(verdict)["ttft"] == "noise"
    assert "can't be ruled out" in verdict.reason


def test_more_bytes_are_a_regression() -> None:
    before = make_entry(parts=("memory",))
    assert before.memory is not None
    more = before.memory.model_copy(update={"candidate_cache_bytes": before.memory.candidate_cache_bytes * 105 // 100})
    verdict = judged(before, before.model_copy(update={"memory": more}))
    assert verdict.word == "regressed"
    assert verdict.reason.startswith("bytes +5.0 %, allowed 0.5 %")
    assert words(judged(before.model_copy(update={"memory": more}), before)) == {"bytes": "improved"}


def test_quality_is_paired_token_by_token() -> None:
    before = make_entry(parts=("quality",), ppl=2.0)
    assert judged(before, before).word == "ok"
    worse = judged(before, make_entry(parts=("quality",), ppl=5.0))
    assert words(worse) == {"ppl": "regressed", "kl": "regressed"}
    change = worse.findings[0].change
    assert change is not None
    assert change.percent == pytest.approx(100 * (1.05 / 1.02 - 1))


def test_a_divergence_that_falls_to_nothing_is_no_improvement() -> None:
    before, never_pruned = make_entry(parts=("quality",)), make_entry(parts=("quality",), ppl=0.0, keep_ratio=1.0)
    verdict = judged(before, never_pruned)
    assert words(verdict)["kl"] == "regressed"
    assert "kl fell to 0: the full cache was scored" in verdict.reason
    assert "kl was 0: nothing was lost before" in judged(never_pruned, before).reason


def test_thresholds() -> None:
    before, now = make_entry(parts=("quality",), ppl=2.0), make_entry(parts=("quality",), ppl=5.0)
    assert judged(before, now, ppl=10.0, kl=1000.0).word == "ok"
    assert read_thresholds(" tpot=8, kl=2 ") == {**THRESHOLDS, "tpot": 8.0, "kl": 2.0}
    for wrong in ("speed=3", "tpot", "tpot=-1", "tpot=nan", "tpot=inf"):
        with pytest.raises(KnormError, match="wanted NAME=PERCENT with a name of ttft, tpot"):
            read_thresholds(wrong)


def test_pooled_runs_narrow_the_interval() -> None:
    entries = [make_entry(noise=0.05, seed=seed, rounds=5) for seed in range(8)]
    one = judge(entries[:1], entries[4:5], THRESHOLDS, "").findings[1].change
    four = judge(entries[:4], entries[4:], THRESHOLDS, "").findings[1].change
    assert one is not None
    assert four is not None
    assert four.ends[1] - four.ends[0] < one.ends[1] - one.ends[0]


def test_the_worst_word_stands() -> None:
    assert worst(["ok", "noise", "improved"]) == "noise"
    assert worst(["missing", "regressed", "new"]) == "regressed"


def test_the_table_fits_and_begins_with_the_worst() -> None:
    verdicts = [Verdict("tests/a.py::test_a", "ok", "against aaa"), judged(make_entry(), make_entry(tpot=40.0))]
    lines = list(verdict_lines(verdicts))
    assert lines[0] == "1 regressed, 1 ok"
    assert lines[1].startswith("regressed    tests/test_x.py")
    assert max(map(len, lines)) <= 80
    page = verdict_markdown(verdicts)
    assert "| regressed | tests/test_x.py::test_x |" in page
    assert page.count("| tests/test_x.py::test_x |") == 1 + len(THRESHOLDS)

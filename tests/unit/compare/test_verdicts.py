"""Each metric's word, from entries whose changes are known."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from knormpress.compare import verdicts
from knormpress.compare.verdicts import (
    THRESHOLDS,
    Finding,
    Verdict,
    Word,
    confirmed,
    judge,
    read_thresholds,
    slower,
    summed,
    worst,
)
from knormpress.errors import KnormError
from knormpress.records.schema import Entry
from tests import simulated
from tests.entry_factory import make_entry, make_tasks
from tests.simulated import SESSIONS, alarms, seen


def judged(before: Entry, now: Entry, **thresholds: float) -> Verdict:
    return judge([before], [now], {**THRESHOLDS, **thresholds}, "against aaa")


def changed(entry: Entry, part: str, **fields: Any) -> Entry:
    """``entry`` with other ``fields`` in one of its parts."""
    return entry.model_copy(update={part: getattr(entry, part).model_copy(update=fields)})


def figure(verdict: Verdict, metric: str) -> Finding:
    (finding,) = [finding for finding in verdict.findings if finding.metric == metric]
    return finding


def words(verdict: Verdict) -> dict[str, str]:
    return {finding.metric: finding.word for finding in verdict.findings}


def test_the_same_figures_are_ok() -> None:
    before = make_entry(noise=0.001).model_copy(update={"lm_eval": make_tasks()})
    again = make_entry(noise=0.001, seed=1)
    verdict = judged(before, again.model_copy(update={"quality": before.quality, "lm_eval": before.lm_eval}))
    assert (verdict.test, verdict.word) == ("tests/test_x.py::test_x", "ok")
    assert words(verdict) == dict.fromkeys(THRESHOLDS, "ok")
    assert verdict.reason.endswith("; against aaa")
    assert judged(make_entry(parts=("memory",)), make_entry(parts=("memory",))).reason == "against aaa"


def test_the_losses_that_are_allowed() -> None:
    """As the documents say: a change of any of these is a change of what a comparison promises."""
    times = {"ttft": 10.0, "tpot": 5.0, "throughput": 5.0, "ttft_s": 25.0, "tpot_s": 25.0}
    names = ("bytes", "decoded_bytes", "ops", "moved", "flops", "allocated", "host_reads")
    counts = dict.fromkeys(names, 0.5)
    assert {**times, **counts, "ppl": 1.0, "kl": 5.0, "found": 2.0, "answers": 5.0, "tasks": 2.0} == THRESHOLDS


@pytest.mark.parametrize("metric", ["ttft", "tpot"])
def test_a_slower_figure_is_named(metric: str) -> None:
    slower = {"ttft": 1.15, "tpot": 1.1}[metric]
    base = {"ttft": 0.0, "tpot": -10.0, "noise": 0.001}
    now = base | {metric: (100 + base[metric]) * slower - 100}
    verdict = judged(make_entry(**base), make_entry(**now, seed=1))
    assert verdict.word == "regressed"
    assert words(verdict)[metric] == "regressed"
    assert verdict.reason.startswith(f"{metric} +1")
    assert verdict.reason.endswith("against aaa")


def test_throughput_gets_worse_by_falling() -> None:
    quick, slow = make_entry(tpot=0.0, ttft=0.0, noise=0.001), make_entry(tpot=30.0, ttft=30.0, noise=0.001)
    assert words(judged(quick, slow))["throughput"] == "regressed"
    assert words(judged(slow, quick))["throughput"] == "improved"


def test_a_machine_that_is_slower_for_both_changes_no_ratio() -> None:
    before = make_entry(noise=0.001)
    runs = before.latency
    assert runs is not None
    slow = {
        side: tuple(
            run.model_copy(update={"ttft_s": 2 * run.ttft_s, "gaps_s": tuple(2 * gap for gap in run.gaps_s)})
            for run in getattr(runs, side)
        )
        for side in ("baseline", "candidate")
    }
    verdict = judged(before, changed(before, "latency", **slow))
    assert {words(verdict)[name] for name in ("ttft", "tpot", "throughput")} == {"ok"}
    assert {words(verdict)[name] for name in ("ttft_s", "tpot_s")} == {"regressed"}


def test_absolute_times_are_compared_between_equal_machines_only() -> None:
    verdict = judged(make_entry(noise=0.001), make_entry(noise=0.001, device_name="another processor"))
    assert verdict.word == "ok"
    assert words(verdict)["tpot_s"] == "incomparable"
    assert "device_name differs" in figure(verdict, "tpot_s").reason
    assert figure(verdict, "tpot_s").reason in verdict.reason


@pytest.mark.parametrize(("speed", "word"), [(0.0112, "incomparable"), (0.0109, "ok")])
def test_absolute_times_are_compared_at_an_equal_speed_only(speed: float, word: str) -> None:
    before = make_entry(noise=0.001)
    verdict = judged(before, changed(before, "latency", calibration_s=(0.01, speed)))
    assert words(verdict)["tpot_s"] == words(verdict)["ttft_s"] == word
    if word == "incomparable":
        assert "12 %" in verdict.reason


def test_what_noise_hides_is_neither_ok_nor_regressed() -> None:
    verdict = judged(make_entry(noise=0.3, rounds=5), make_entry(noise=0.3, rounds=5, seed=1))
    assert words(verdict)["ttft"] == "noise"
    assert "10 %" in figure(verdict, "ttft").reason


@pytest.mark.parametrize("tpot", [150.0, -60.0])
def test_a_change_in_too_few_runs_for_an_interval_is_noise(tpot: float) -> None:
    """One pair may be anything: it neither fails a test nor is it praised."""
    finding = figure(judged(make_entry(rounds=1), make_entry(rounds=1, tpot=tpot)), "tpot")
    assert finding.word == "noise"
    assert "too few runs" in finding.reason


def test_no_change_in_too_few_runs_is_ok() -> None:
    assert set(words(judged(make_entry(rounds=1), make_entry(rounds=1))).values()) == {"ok"}


def test_more_bytes_are_a_regression() -> None:
    before = make_entry(parts=("memory",))
    assert before.memory is not None
    more = changed(before, "memory", candidate_cache_bytes=before.memory.candidate_cache_bytes * 105 // 100)
    verdict = judged(before, more)
    assert verdict.word == "regressed"
    assert verdict.reason.startswith("bytes +5.0 %")
    assert "0.5 %" in verdict.reason
    assert words(judged(more, before)) == {"bytes": "improved", "decoded_bytes": "ok"}


def test_a_cache_that_grows_while_decoding_is_a_regression() -> None:
    before = make_entry(parts=("memory",))
    assert before.memory is not None
    assert before.memory.candidate_decoded_bytes is not None
    grown = changed(before, "memory", candidate_decoded_bytes=before.memory.candidate_decoded_bytes * 104 // 100)
    assert words(judged(before, grown)) == {"bytes": "ok", "decoded_bytes": "regressed"}
    # Nothing was decoded then.
    alone = changed(before, "memory", candidate_decoded_bytes=None, baseline_decoded_bytes=None)
    assert words(judged(alone, grown)) == {"bytes": "ok"}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", ["ops", "moved", "flops", "allocated", "host_reads"])
def test_a_count_that_rises_is_named_with_its_phase(name: str, phase: str) -> None:
    before = make_entry(parts=("cost",))
    assert before.cost is not None
    counts = getattr(before.cost, f"candidate_{phase}")

    def now(percent: float) -> Verdict:
        more = counts.model_copy(update={name: math.ceil(getattr(counts, name) * (1 + percent / 100))})
        return judged(before, changed(before, "cost", **{f"candidate_{phase}": more}))

    verdict = now(1.0)
    assert {metric for metric, word in words(verdict).items() if word == "regressed"} == {name}
    assert verdict.reason.startswith(f"{name} {phase} +")
    assert figure(verdict, name).figures[0].startswith(phase)
    assert words(now(-20.0))[name] == "improved"
    if getattr(counts, name) > 1_000:
        assert words(now(0.4))[name] == "ok"


def test_counts_from_nothing_are_a_regression() -> None:
    before = make_entry(parts=("cost",))
    assert before.cost is not None
    none = changed(before, "cost", candidate_decode=before.cost.candidate_decode.model_copy(update={"host_reads": 0}))
    assert "decode was 0" in figure(judged(none, before), "host_reads").reason
    assert words(judged(none, none))["host_reads"] == "ok"


@pytest.mark.parametrize("kind", ["torch", "transformers", "device", "device_map"])
def test_counts_of_other_versions_are_not_compared(kind: str) -> None:
    before = make_entry(parts=("memory", "cost"))
    verdict = judged(before, changed(before, "environment", **{kind: "another"}))
    assert {words(verdict)[name] for name in ("ops", "moved", "flops", "allocated", "host_reads")} == {"incomparable"}
    assert f"{kind} differs" in verdict.reason
    assert verdict.word == "ok"


def test_quality_is_paired_token_by_token() -> None:
    before = make_entry(parts=("quality",), ppl=2.0)
    assert judged(before, before).word == "ok"
    worse = judged(before, make_entry(parts=("quality",), ppl=5.0))
    assert words(worse) == {"ppl": "regressed", "kl": "regressed"}
    change = figure(worse, "ppl").change
    assert change is not None
    assert change.percent == pytest.approx(100 * (1.05 / 1.02 - 1))


def test_the_quality_of_other_documents_is_incomparable() -> None:
    before = make_entry(parts=("memory", "quality"))
    verdict = judged(before, make_entry(parts=("memory", "quality"), documents=5))
    assert words(verdict) == {"bytes": "ok", "decoded_bytes": "ok", "ppl": "incomparable", "kl": "incomparable"}
    assert verdict.word == "ok"


def test_a_divergence_that_falls_to_nothing_is_no_improvement() -> None:
    before, never_pruned = make_entry(parts=("quality",)), make_entry(parts=("quality",), ppl=0.0, keep_ratio=1.0)
    verdict = judged(before, never_pruned)
    assert words(verdict)["kl"] == "regressed"
    assert "fell to 0" in figure(verdict, "kl").reason
    back = judged(never_pruned, before)
    assert words(back)["kl"] == "regressed"
    assert "was 0" in figure(back, "kl").reason


def test_times_and_bytes_that_are_no_number_are_incomparable() -> None:
    sound = make_entry()
    assert sound.latency is not None
    runs = tuple(run.model_copy(update={"ttft_s": float("nan")}) for run in sound.latency.candidate)
    broken = changed(changed(sound, "latency", candidate=runs), "memory", candidate_cache_bytes=0)
    found = words(judged(broken, sound))
    assert (found["ttft"], found["bytes"], found["tpot"]) == ("incomparable", "incomparable", "ok")


@pytest.mark.parametrize("figures", [{"kl": math.nan}, {"candidate_nll": (math.nan,) * 256}])
def test_a_quality_that_is_no_number_is_never_ok(figures: dict[str, Any]) -> None:
    sound = make_entry(parts=("memory", "quality"))
    assert sound.quality is not None
    documents = tuple(document.model_copy(update=figures) for document in sound.quality.documents)
    broken = changed(sound, "quality", documents=documents)
    assert judged(sound, broken).word == "regressed"
    found = words(judged(broken, sound))
    assert found == {"bytes": "ok", "decoded_bytes": "ok", "ppl": "incomparable", "kl": "incomparable"}


def test_entries_without_a_figure_in_common_are_incomparable() -> None:
    verdict = judged(make_entry(parts=("memory",)), make_entry(parts=("quality",)))
    assert (verdict.word, verdict.findings) == ("incomparable", ())


def test_a_prefill_alone_has_a_ttft_and_no_more() -> None:
    verdict = judged(make_entry(parts=("latency",), new_tokens=1), make_entry(parts=("latency",), new_tokens=1))
    assert words(verdict) == {"ttft": "ok", "ttft_s": "ok"}


def test_thresholds() -> None:
    before, now = make_entry(parts=("quality",), ppl=2.0), make_entry(parts=("quality",), ppl=5.0)
    assert judged(before, now, ppl=10.0, kl=1000.0).word == "ok"
    assert read_thresholds("") == THRESHOLDS
    assert read_thresholds(" tpot=8, kl=0 ") == {**THRESHOLDS, "tpot": 8.0, "kl": 0.0}
    assert read_thresholds("kl=2", {"kl": 1.0, "ppl": 7.0}) == {"kl": 2.0, "ppl": 7.0}


@pytest.mark.parametrize("wrong", ["speed=3", "tpot", "tpot=-1", "tpot=nan", "tpot=inf", "tpot=x"])
def test_a_threshold_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(KnormError, match=f"{wrong}.*ttft, tpot"):
        read_thresholds(f"kl=2,{wrong}")


def test_what_few_processes_do_not_show_is_said() -> None:
    one, other, third, fourth = (make_entry(noise=0.001, run=run, seed=ord(run)) for run in "abcd")
    assert "1 process against 1:" in judge([one], [other], THRESHOLDS, "").reason
    assert "2 processes against 1:" in judge([one, third], [other], THRESHOLDS, "").reason
    for enough in (([one, third], [other, fourth]), ([one, other, third], [fourth])):
        assert "process" not in judge(*enough, THRESHOLDS, "").reason


def test_a_difference_between_processes_is_no_regression() -> None:
    """Each process is sure of its own figure; four of them show that the figure is another in each."""
    steady = {"noise": 0.0001, "ttft": 0.0}
    before = [make_entry(run=f"old {tpot}", tpot=tpot, **steady) for tpot in (-10.0, -2.0)]
    now = [make_entry(run=f"new {tpot}", tpot=tpot, **steady) for tpot in (-3.0, 5.0)]
    tpot = figure(judge(before, now, THRESHOLDS, ""), "tpot")
    assert tpot.change is not None
    assert tpot.change.percent > THRESHOLDS["tpot"]
    assert tpot.word == "noise"
    # The same pairs, as if of one process each.
    pooled = [
        [entry.model_copy(update={"run": run}) for entry in side] for run, side in (("old", before), ("new", now))
    ]
    assert figure(judge(*pooled, THRESHOLDS, ""), "tpot").change != tpot.change


def test_a_time_that_may_be_luck_among_so_many_does_not_fail() -> None:
    """Its whole interval at 95 % is a loss; that happens to many a sound metric."""
    words_found = set()
    how = {"noise": 0.03, "rounds": 6, "new_tokens": 2}
    for seed in range(40):
        verdict = judged(make_entry(seed=seed, tpot=0.0, **how), make_entry(seed=seed + 100, tpot=8.0, **how))
        tpot = figure(verdict, "tpot")
        assert tpot.change is not None
        if tpot.change.percent > THRESHOLDS["tpot"] and tpot.change.ends[0] > 0:
            words_found.add(tpot.word)
            assert ("not sure enough" in tpot.reason) == (tpot.word == "noise")
    assert words_found == {"noise", "regressed"}


def twice(*tpot: float) -> Verdict:
    """The verdict on a test whose TPOT was so many % slower in each of two measurements."""
    first, second = (judged(make_entry(tpot=0.0, noise=0.001), make_entry(tpot=one, noise=0.001)) for one in tpot)
    return confirmed(first, second)


def test_a_time_fails_when_it_regressed_twice_and_both_are_shown() -> None:
    verdict = twice(10.0, 12.0)
    assert slower(verdict) == {"tpot", "throughput"}
    assert re.search(r"measured twice: tpot \+10\.0 % \(.*\), then \+12\.0 % \(.*\).*; against aaa$", verdict.reason)


@pytest.mark.parametrize(("tpot", "word"), [((30.0, 0.0), "ok"), ((0.0, 30.0), "noise")])
def test_a_time_that_regressed_once_does_not_fail(tpot: tuple[float, float], word: str) -> None:
    verdict = twice(*tpot)
    assert words(verdict)["tpot"] == word
    assert slower(verdict) == set()
    assert "tpot " in verdict.reason
    assert f"+{max(tpot):.1f} %" in verdict.reason


def test_a_time_that_the_first_measurement_could_not_judge_does_not_fail() -> None:
    first, second = (judged(make_entry(tpot=0.0, noise=0.001), make_entry(tpot=30.0, noise=0.001)) for _ in range(2))
    verdict = confirmed(summed(first.test, [figure(first, "tpot")], ""), second)
    assert (words(verdict)["tpot"], words(verdict)["throughput"]) == ("regressed", "noise")


def test_what_is_exact_needs_no_second_measurement() -> None:
    before = make_entry(noise=0.001)
    assert before.memory is not None
    more = changed(before, "memory", candidate_cache_bytes=before.memory.candidate_cache_bytes * 2)
    verdict = judged(before, more)
    assert slower(verdict) == set()
    assert words(confirmed(judged(before, before), verdict))["bytes"] == "regressed"


def test_no_session_of_identical_code_fails_and_a_slow_one_does() -> None:
    """The real verdicts on simulated times; 1 session in 100 may fail, and one loss of 10 % in 20 pass."""
    random, sessions = np.random.default_rng(4), 40
    # So few could show 7 in 100 only (3 in 40); docs/measuring.md has the long simulation.
    for name in ("quiet: pairs 1.5 %, processes 0.5 %", "a run in ten much slower, processes 1 %"):
        assert alarms(SESSIONS[name], random, sessions) == 0
    # The binomial standard error at 95 % is 3.4 %.
    assert seen(SESSIONS["quiet: pairs 1.5 %, processes 0.5 %"], random, sessions) >= 0.95 * sessions


def test_control_sessions_without_these_rules_do_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """One measurement, an interval at 95 %, thresholds of 1 %."""
    monkeypatch.setattr(verdicts, "_SURE", 0.9)
    monkeypatch.setattr(simulated, "confirmed", lambda first, second: first)
    monkeypatch.setattr(simulated, "THRESHOLDS", dict.fromkeys(THRESHOLDS, 1.0))
    assert alarms(SESSIONS["pairs 4 %, processes 1 %"], np.random.default_rng(4), 20) > 2


def test_pooled_runs_narrow_the_interval() -> None:
    entries = [make_entry(noise=0.05, seed=seed, rounds=5) for seed in range(8)]
    one = figure(judge(entries[:1], entries[4:5], THRESHOLDS, ""), "tpot").change
    four = figure(judge(entries[:4], entries[4:], THRESHOLDS, ""), "tpot").change
    assert one is not None
    assert four is not None
    assert four.ends[1] - four.ends[0] < one.ends[1] - one.ends[0]


def test_of_what_does_not_vary_the_newest_stands() -> None:
    old, new = make_entry(parts=("memory",)), make_entry(parts=("memory",), keep_ratio=0.5)
    assert judge([old, new], [old, new], THRESHOLDS, "").word == "ok"
    assert judge([new, old], [new], THRESHOLDS, "").word == "improved"
    assert judge([new], [new, old], THRESHOLDS, "").word == "regressed"


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (["ok", "noise", "improved"], "noise"),
        (["missing", "regressed", "new"], "regressed"),
        (["noise", "incomparable"], "incomparable"),
        (["ok", "new", "no-baseline"], "no-baseline"),
    ],
)
def test_the_worst_word_stands(given: list[Word], word: str) -> None:
    assert worst(given) == word


def test_lost_items_are_named() -> None:
    verdict = judged(make_entry(found=1.0), make_entry(found=0.75))
    found, answers = figure(verdict, "found"), figure(verdict, "answers")
    assert (found.word, answers.word) == ("regressed", "regressed")
    assert found.figures == ("48 of 48", "36 of 48")
    assert "lost: " in found.reason
    assert "and 6 more" in found.reason
    lost = next(item for item in make_entry(found=0.75).retrieval.items if not item.candidate.found)
    assert lost.label in found.reason
    assert "gained" not in found.reason


def test_gained_items_are_named_and_are_no_loss() -> None:
    verdict = judged(make_entry(found=0.5), make_entry(found=1.0))
    assert words(verdict)["found"] == "improved"
    assert "gained: " in figure(verdict, "found").reason
    assert "lost" not in figure(verdict, "found").reason


def test_as_many_lost_as_gained_is_noise_but_both_are_listed() -> None:
    """The share is the same, and no item by item comparison of two shares would see it."""
    before, now = make_entry(found=0.5), make_entry(found=0.5)
    items = now.retrieval.items
    swapped = tuple(
        item.model_copy(update={"candidate": item.candidate.model_copy(update={"found": not item.candidate.found})})
        for item in items
    )
    verdict = judged(before, changed(now, "retrieval", items=swapped))
    found = figure(verdict, "found")
    assert found.word == "noise"
    assert "lost: " in found.reason
    assert "gained: " in found.reason


def test_one_lost_item_of_48_is_not_more_than_is_allowed_by_itself() -> None:
    before, now = make_entry(found=1.0), make_entry(found=47 / 48)
    assert words(judged(before, now, found=3.0))["found"] == "ok"
    assert words(judged(before, now, found=1.0))["found"] == "noise"


def test_answers_that_got_less_probable_are_seen_while_all_are_found() -> None:
    before = make_entry(found=1.0)
    less = tuple(
        item.model_copy(update={"candidate": item.candidate.model_copy(update={"nll": item.candidate.nll + 0.6})})
        for item in before.retrieval.items
    )
    verdict = judged(before, changed(before, "retrieval", items=less))
    assert words(verdict)["found"] == "ok"
    assert figure(verdict, "answers").word == "regressed"
    assert figure(verdict, "answers").figures == ("+0.10 nats", "+0.70 nats")


def test_other_items_are_not_compared() -> None:
    before = make_entry(found=1.0)
    fewer = changed(before, "retrieval", asked={"list": 3})
    none = changed(before, "retrieval", items=())
    for now in (fewer, none):
        assert {words(judged(before, now))[name] for name in ("found", "answers")} == {"incomparable"}
    without = before.model_copy(update={"retrieval": None})
    assert "found" not in words(judged(without, before))

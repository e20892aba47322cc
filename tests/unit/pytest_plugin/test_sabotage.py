"""Faults injected into the package, each of which the harness must catch by name. Slow decoding: see tests/perf."""

from __future__ import annotations

from typing import Any

import pytest

from knormpress.cache.cache import KnormCache
from knormpress.cache.layer import KnormLayer
from knormpress.measure import quality
from tests.unit.conftest import Run
from tests.unit.pytest_plugin.conftest import Stored

HARNESS = """
def test_bytes(knorm_memory, knorm_press):
    knorm_memory(knorm_press, prompt_tokens=120)


def test_quality(knorm_gate, knorm_press):
    knorm_gate(knorm_press, context=120, scored=24)
"""

WIDE = {"keep_ratios": "1.0,0.9,0.5", "ppl_tolerance": "1e6"}


def lines(result: pytest.RunResult) -> str:
    return result.stdout.str()


@pytest.fixture
def after_a_sound_run(run: Run, stored: Stored) -> Run:
    """The harness has stored a sound run; what is run next is compared with it."""
    stored("sound", lambda: run(HARNESS, "--knorm-compare", **WIDE).assert_outcomes(passed=6))
    return run


def test_control_a_sound_run_is_caught_by_nothing(after_a_sound_run: Run) -> None:
    result = after_a_sound_run(HARNESS, "--knorm-compare", **WIDE)
    result.assert_outcomes(passed=6)
    assert "\n6 ok\n" in lines(result)


def test_a_cache_that_keeps_five_percent_more(after_a_sound_run: Run) -> None:
    sound = KnormLayer._prune

    def generous(self: KnormLayer) -> None:
        ratio = self.ratio
        self.ratio = min(1.0, round(ratio * 1.05, 6))
        sound(self)
        self.ratio = ratio

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KnormLayer, "_prune", generous)
        result = after_a_sound_run(HARNESS, "--knorm-compare", **WIDE)
    assert "FAILED test_it.py::test_bytes[cpu-0.9]" in lines(result)
    assert "FAILED test_it.py::test_bytes[cpu-0.5]" in lines(result)
    # Of 5 % in 2 of 3 layers, less what lies ready for the next tokens.
    assert "regressed: bytes +2." in lines(result)
    assert "PASSED test_it.py::test_bytes[cpu-1.0]" in lines(result)


def test_positions_wrong_by_one(after_a_sound_run: Run) -> None:
    sound = KnormCache.get_seq_length

    def shifted(self: KnormCache, *arguments: Any, **named: Any) -> int:
        seen = sound(self, *arguments, **named)
        return seen + 1 if seen else seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KnormCache, "get_seq_length", shifted)
        result = after_a_sound_run(HARNESS, "--knorm-compare", **WIDE)
    assert "kl was 0: " in lines(result)
    assert "FAILED test_it.py::test_quality[cpu-1.0]" in lines(result)
    assert "FAILED test_it.py::test_quality[cpu-0.9]" in lines(result)


def test_pruning_skipped_silently(after_a_sound_run: Run) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KnormLayer, "_prune", lambda self: None)
        result = after_a_sound_run(HARNESS, "--knorm-compare", **WIDE)
    assert "so nothing was pruned" in lines(result)
    assert "dropped none of 120 tokens at keep_ratio 0.9" in lines(result)
    result.assert_outcomes(passed=2, failed=4)


def test_a_read_of_the_host_in_each_layer(run: Run) -> None:
    """Decided in one run each, at every keep ratio."""
    harness = "def test_cost(knorm_cost, knorm_press):\n    knorm_cost(knorm_press, prompt_tokens=120, new_tokens=2)\n"
    run(harness, "--knorm-compare", **WIDE).assert_outcomes(passed=3)
    sound = KnormLayer.update

    def reading(self: KnormLayer, *states: Any, **named: Any) -> Any:
        states[0][0, 0, -1].tolist()
        return sound(self, *states, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KnormLayer, "update", reading)
        result = run(harness, "--knorm-compare", **WIDE)
        result.assert_outcomes(failed=3)
        assert "regressed: " in lines(result)
        assert "host_reads prefill +" in lines(result)
    run(harness, "--knorm-compare", **WIDE).assert_outcomes(passed=3)


def test_scoring_with_the_full_cache(run: Run) -> None:
    """Caught even by a first run, which has nothing to compare with."""
    teacher_forced = quality._teacher_forced
    full: list[Any] = []

    def score_the_first(model: Any, fed: Any, cache: Any) -> Any:
        if not isinstance(cache, KnormCache):
            full[:] = [teacher_forced(model, fed, cache)]
        return full[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "_teacher_forced", score_the_first)
        result = run(HARNESS, **WIDE)
    result.assert_outcomes(passed=4, failed=2)
    assert "full cache was scored" in lines(result)

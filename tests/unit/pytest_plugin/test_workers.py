"""Several workers of pytest-xdist: one stored run, all verdicts in one table, and no timing."""

from __future__ import annotations

from pathlib import Path

from knormpress.records.history import History
from tests.unit.conftest import Run

TESTS = """
import pytest
from knormpress.pytest_plugin import measured

GROWS = False


@pytest.mark.parametrize("number", range(3))
def test_bytes(knorm_memory, knorm_press, number, monkeypatch):
    if GROWS and number == 2:
        def measure(*arguments, sound=measured.measure_memory, **conditions):
            (memory,) = sound(*arguments, **conditions)
            return [memory.model_copy(update={"candidate_cache_bytes": 2 * memory.candidate_cache_bytes})]
        monkeypatch.setattr(measured, "measure_memory", measure)
    knorm_memory(knorm_press, prompt_tokens=40)


def test_left_out(knorm_memory, knorm_press):
    knorm_memory(knorm_press, prompt_tokens=40)


def test_gone(knorm_memory, knorm_press):
    knorm_memory(knorm_press, prompt_tokens=40)
"""
TIMED = """

def test_time(knorm_latency, knorm_press):
    knorm_latency(knorm_press, prompt_tokens=40, new_tokens=3)
"""


def test_workers_store_one_run_gather_their_verdicts_and_time_nothing(run: Run) -> None:
    """In one run, as each worker takes long to start."""
    run(TESTS, "--knorm-compare").assert_outcomes(passed=5)
    changed = TESTS.replace("GROWS = False", "GROWS = True").replace("test_gone", "gone") + TIMED
    told = run(changed, "--knorm-compare", "-n", "2", "-k", "not left_out")
    told.assert_outcomes(passed=2, failed=1, errors=1)
    told.stdout.fnmatch_lines(
        [
            "knorm_latency times nothing beside other tests; *-n and --dist",
            "regressed: bytes +100 %*",
            "1 regressed, 1 missing, 2 ok",
            "regressed *test_bytes*-2?",
            "missing *test_gone*",
        ]
    )
    entries = History.read(Path(".benchmarks")).entries
    assert len(entries) == 5 + 3
    assert len({entry.run for entry in entries}) == len(list(Path(".benchmarks", "knormpress").glob("*.jsonl"))) == 2

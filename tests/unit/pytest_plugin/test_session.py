"""A run is stored and judged by those before it: what becomes a baseline, what fails, and what has vanished."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from knormpress.measure.latency import measure_latency
from knormpress.measure.memory import measure_memory
from knormpress.pytest_plugin import measured
from knormpress.records.figures import Latency, Memory
from knormpress.records.history import History
from tests.repository import run_git
from tests.unit.conftest import Run

ONE = """
def test_bytes(knorm_memory, knorm_press):
    knorm_memory(knorm_press, prompt_tokens=40)
"""
TWO = f"""{ONE}

def test_quality(knorm_gate, knorm_press):
    knorm_gate(knorm_press, context=40, scored=24)
"""


@pytest.fixture
def compare(run: Run) -> Run:
    """Runs tests with --knorm-compare; no loss of perplexity fails a gate."""

    def compare(source: str, *arguments: str, **options: Any) -> pytest.RunResult:
        return run(source, "--knorm-compare", *arguments, ppl_tolerance="1e6", **options)

    return compare


@contextmanager
def wasteful() -> Iterator[None]:
    """A method's cache takes 10 % more."""

    def measure(*arguments: Any, **conditions: Any) -> list[Memory]:
        (memory,) = measure_memory(*arguments, **conditions)
        return [memory.model_copy(update={"candidate_cache_bytes": memory.candidate_cache_bytes * 110 // 100})]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured, "measure_memory", measure)
        yield


SPEED = """
def test_speed(knorm_latency, knorm_press):
    knorm_latency(knorm_press, prompt_tokens=40, new_tokens=4)
"""
# The times of a tiny model on a busy machine differ by much.
WIDE = "ttft=1e4,tpot=1e4,throughput=99,ttft_s=1e9,tpot_s=1e9"


@contextmanager
def disturbed(measurements: int) -> Iterator[list[Latency]]:
    """The method takes 1,000 times as long in the first so many measurements; yields all of them."""
    done: list[Latency] = []

    def measure(*arguments: Any, **conditions: Any) -> list[Latency]:
        (latency,) = measure_latency(*arguments, **conditions)
        if len(done) < measurements:
            slow = [
                run.model_copy(update={"ttft_s": 1e3 * run.ttft_s, "gaps_s": tuple(1e3 * gap for gap in run.gaps_s)})
                for run in latency.candidate
            ]
            latency = latency.model_copy(update={"candidate": tuple(slow)})
        done.append(latency)
        return [latency]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured, "measure_latency", measure)
        yield done


def test_a_slow_down_is_measured_once_more_and_fails(compare: Run) -> None:
    compare(SPEED, "--knorm-thresholds", WIDE).assert_outcomes(passed=1)
    with disturbed(2) as done:
        result = compare(SPEED, "--knorm-thresholds", WIDE)
    assert len(done) == 2
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["regressed: *measured twice: *tpot +* (*), then +* (*)*"])
    stored = History.read(Path(".benchmarks")).entries
    assert [entry.latency for entry in stored][1:] == done[1:]
    assert stored[-1].verdicts["tpot"] == "regressed"


def test_a_disturbance_is_measured_once_more_and_passes(compare: Run) -> None:
    compare(SPEED, "--knorm-thresholds", WIDE)
    with disturbed(1) as done:
        result = compare(SPEED, "--knorm-thresholds", WIDE)
    assert len(done) == 2
    result.assert_outcomes(passed=1)
    assert "measured twice: ttft +" in " ".join(result.stdout.str().split())
    assert History.read(Path(".benchmarks")).entries[-1].latency == done[1]


def test_what_is_no_slower_is_measured_once(compare: Run) -> None:
    with disturbed(0) as done:
        for _ in range(2):
            compare(SPEED, "--knorm-thresholds", WIDE).assert_outcomes(passed=1)
    assert len(done) == 2


def refused(result: pytest.RunResult, *named: str) -> None:
    """Nothing ran, and one line says why."""
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if line]
    assert line.startswith("ERROR: ")
    assert [part for part in named if part not in line] == []


def test_a_run_is_compared_with_the_one_before(compare: Run) -> None:
    first = compare(TWO)
    first.assert_outcomes(passed=2)
    first.stdout.fnmatch_lines(["2 no-baseline", "no-baseline*test_it.py::test_bytes*"])
    second = compare(TWO)
    second.assert_outcomes(passed=2)
    second.stdout.fnmatch_lines(["2 ok"])
    renamed = TWO.replace("test_bytes", "test_size")
    third = compare(renamed)
    third.assert_outcomes(passed=2)
    third.stdout.fnmatch_lines(["1 missing, 1 new, 1 ok"])
    compare(renamed, "-k", "test_quality").stdout.fnmatch_lines(["1 ok"])


def test_saving_alone_judges_nothing(run: Run) -> None:
    result = run(TWO, "--knorm-save", ppl_tolerance="1e6")
    assert "no-baseline" not in result.stdout.str()
    assert len(History.read(Path(".benchmarks")).entries) == 2


def test_a_regressed_test_fails_and_does_not_become_the_baseline(compare: Run) -> None:
    compare(TWO)
    with wasteful():
        for _ in range(2):
            result = compare(TWO)
            result.assert_outcomes(passed=1, failed=1)
            result.stdout.fnmatch_lines(["regressed: bytes +10.0 %*0.5 %*", "1 regressed, 1 ok"])
    compare(TWO).assert_outcomes(passed=2)


def test_saving_comparing_and_thresholds_as_settings(run: Run) -> None:
    run(ONE, ini="knorm_save = true")
    assert len(History.read(Path(".benchmarks")).entries) == 1
    with wasteful():
        run(ONE, ini="knorm_compare = true\nknorm_thresholds = bytes=5").assert_outcomes(failed=1)
        run(ONE, ini="knorm_compare = true\nknorm_thresholds = bytes=20").assert_outcomes(passed=1)


def test_thresholds_of_the_command_line_come_on_top_of_the_settings(run: Run) -> None:
    settings = "knorm_compare = true\nknorm_thresholds = bytes=20"
    run(ONE, ini=settings)
    with wasteful():
        # What regressed is no reference for the next run; what passed would be.
        run(ONE, "--knorm-thresholds", "bytes=5", ini=settings).assert_outcomes(failed=1)
        run(ONE, "--knorm-thresholds", "ttft=1000", ini=settings).assert_outcomes(passed=1)


def test_the_closest_mark_decides(compare: Run) -> None:
    compare(ONE)
    marked = "import pytest\n\npytestmark = pytest.mark.knorm_thresholds(bytes={})\n\n"
    marked += "@pytest.mark.knorm_thresholds(bytes={})\n" + ONE.lstrip()
    with wasteful():
        compare(marked.format(20, 5), "--strict-markers").assert_outcomes(failed=1)
        compare(marked.format(5, 20), "--strict-markers").assert_outcomes(passed=1)


@pytest.mark.parametrize("mark", ["tpot='x'", "tpott=5", "bytes=float('nan')", "'tpot'"])
def test_a_threshold_of_a_mark_that_is_none_is_told_before_anything_runs(compare: Run, mark: str) -> None:
    result = compare(f"import pytest\n\n@pytest.mark.knorm_thresholds({mark})\n{ONE.lstrip()}")
    refused(result, "threshold", "ttft, tpot")


def test_a_dirty_tree_is_told(compare: Run) -> None:
    compare(ONE)
    for words in (["init", "-q"], ["add", "tox.ini"], ["commit", "-q", "-m", "first"]):
        run_git(*words)
    assert "uncommitted" not in compare(ONE).stdout.str()
    Path("tox.ini").write_text("[pytest]\n")
    dirty = compare(ONE, ini="knorm_seconds = 0")
    dirty.stdout.fnmatch_lines(["*uncommitted*", "1 ok"])


def test_a_test_that_changes_the_folder_is_stored_and_compared_all_the_same(compare: Run) -> None:
    moved = ONE.replace("knorm_press):", "knorm_press, monkeypatch, tmp_path):\n    monkeypatch.chdir(tmp_path)")
    run_git("init", "-q")
    run_git("commit", "-q", "--allow-empty", "-m", "first")
    compare(moved).assert_outcomes(passed=1)
    second = compare(moved)
    second.assert_outcomes(passed=1)
    second.stdout.fnmatch_lines(["1 ok"])


def test_a_store_cut_short_stops_the_run_before_it_measures(compare: Run) -> None:
    compare(ONE)
    (file,) = Path(".benchmarks/knormpress").glob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-200])
    refused(compare(ONE), file.name)


def test_an_unknown_storage_is_refused(run: Run) -> None:
    refused(run(ONE, "--knorm-save", "--benchmark-storage=elasticsearch+http://x/y"), "elasticsearch", "file://")
    assert not Path(".benchmarks/knormpress").exists()


def test_a_storage_that_is_no_folder_is_refused(run: Run) -> None:
    Path(".benchmarks").touch()
    refused(run(ONE, "--knorm-save"), ".benchmarks")


def test_what_lf_passes_over_has_not_vanished(compare: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("test_other.py").write_text(ONE)
    fails_when_told = ONE + "\n\ndef test_fails():\n    assert not __import__('os').getenv('FAIL')\n"
    monkeypatch.setenv("FAIL", "1")
    compare(fails_when_told, "-p", "cacheprovider")
    monkeypatch.delenv("FAIL")
    last = compare(fails_when_told, "-p", "cacheprovider", "--lf")
    last.assert_outcomes(passed=1)
    last.stdout.no_fnmatch_line("*missing*")


def test_a_file_that_is_ignored_has_not_vanished(compare: Run) -> None:
    Path("test_other.py").write_text(ONE)
    compare(ONE).assert_outcomes(passed=2)
    for option in ("--ignore=test_other.py", "--ignore-glob=*_other.py"):
        compare(ONE, option).stdout.fnmatch_lines(["1 ok"])
        # The next is compared with a run that had both again.
        compare(ONE).assert_outcomes(passed=2)

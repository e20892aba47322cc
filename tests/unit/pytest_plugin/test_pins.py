"""A stranger's repository over several commits: a loss that creeps is seen from the pin, and can be accepted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from knormpress.cli.app import main
from knormpress.measure.memory import measure_memory
from knormpress.pytest_plugin import measured, plugin
from knormpress.records.figures import Memory
from knormpress.records.history import History
from tests.repository import run_git
from tests.unit.conftest import Run
from tests.unit.pytest_plugin.test_session import ONE, refused

TEST = "test_it.py::test_bytes[cpu-0.5]"


@contextmanager
def grown(percent: float) -> Iterator[None]:
    """A method's cache takes so much more."""

    def measure(*arguments: Any, **conditions: Any) -> list[Memory]:
        (memory,) = measure_memory(*arguments, **conditions)
        size = round(memory.candidate_cache_bytes * (1 + percent / 100))
        return [memory.model_copy(update={"candidate_cache_bytes": size})]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured, "measure_memory", measure)
        yield


class Commits:
    """Commits one after the other, whose cache is so much larger than at first."""

    def __init__(self, run: Run) -> None:
        self.compare = run
        run_git("init", "-q")

    def commit(self) -> str:
        run_git("commit", "-q", "--allow-empty", "-m", "next")
        return run_git("rev-parse", "HEAD")[:12]

    def run(self, percent: float, *arguments: str, source: str = ONE, **options: object) -> pytest.RunResult:
        plugin._bench.cache_clear()  # it knows the commit
        with grown(percent):
            return self.compare(source, "--knorm-compare", *arguments, **options)


@pytest.fixture
def commits(run: Run) -> Commits:
    return Commits(run)


def test_a_loss_that_creeps_is_seen_from_the_pin_and_the_pin_is_kept(commits: Commits) -> None:
    first = commits.commit()
    commits.run(0.0, "--knorm-pin=HEAD").assert_outcomes(passed=1)
    commits.commit()
    commits.run(0.4).assert_outcomes(passed=1)
    commits.commit()
    crept = commits.run(0.8)
    crept.assert_outcomes(failed=1)
    crept.stdout.fnmatch_lines([f"regressed: bytes +0.8 %, allowed 0.5 %, since the pinned {first}*"])
    commits.run(0.8, "--knorm-pin=none").assert_outcomes(passed=1)
    commits.run(0.8).assert_outcomes(passed=1)


def test_an_accepted_loss_passes_from_then_on(commits: Commits, capsys: pytest.CaptureFixture[str]) -> None:
    commits.commit()
    commits.run(0.0, "--knorm-pin=HEAD")
    commits.commit()
    commits.run(5.0).assert_outcomes(failed=1)
    assert main(["compare"]) == 1
    assert main(["accept", TEST, "bytes", "--why", "positions take more"]) == 0
    assert f"accepted: bytes of {TEST}, " in capsys.readouterr().out
    assert main(["compare"]) == 0
    told = commits.run(5.0)
    told.assert_outcomes(passed=1)
    assert "positions take more" in told.stdout.str().replace("\n             ", " ")
    commits.commit()
    # From here on this run at the accepted commit is the reference, and the pin's own level is the accepted one.
    commits.run(5.4).assert_outcomes(passed=1)
    commits.run(5.6).assert_outcomes(failed=1)


def test_a_renamed_test_keeps_its_history(commits: Commits, capsys: pytest.CaptureFixture[str]) -> None:
    commits.commit()
    commits.run(0.0)
    renamed = ONE.replace("test_bytes", "test_size")
    commits.commit()
    commits.run(9.0, source=renamed).stdout.fnmatch_lines(["1 missing, 1 new"])
    assert main(["rename", "test_it.py::test_bytes", "test_it.py::test_size"]) == 0
    commits.run(9.0, source=renamed).stdout.fnmatch_lines(["1 regressed"])
    tests = {entry.test for entry in History.read(Path(".benchmarks")).entries}
    assert tests == {"test_it.py::test_size[cpu-0.5]"}


def test_what_cannot_be_pinned_is_told_before_anything_runs(commits: Commits, run: Run) -> None:
    old = commits.commit()
    commits.commit()
    refused(commits.run(0.0, f"--knorm-pin={old}"), old, "--knorm-save")
    refused(commits.run(0.0, "--knorm-pin=nonsense"), "'nonsense'")
    refused(run(ONE, "--knorm-save", "--knorm-pin=HEAD"), "--knorm-pin", "--knorm-compare")
    assert not Path(".benchmarks").exists()


def test_a_pin_in_the_settings_is_written_once(commits: Commits) -> None:
    commits.commit()
    for _ in range(2):
        commits.run(0.0, pin="HEAD", how="ini").assert_outcomes(passed=1)
    assert len(list(Path(".benchmarks", "knormpress", "decisions").iterdir())) == 1 + 1, "the pin, and the lock"

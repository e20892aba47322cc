"""``knormpress compare``: of stored runs, and of two commits measured in turn in checkouts of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest

from knormpress.cli.app import main
from knormpress.compare import commits
from knormpress.records.history import History, store
from tests.entry_factory import make_entry
from tests.repository import run_git
from tests.unit.cli.conftest import Fails

PROJECT = Path(__file__).parents[3]

# What a test of the repository stores, without a model: {ppl} is its method's loss.
SOURCE = """
import os, time, uuid
from pathlib import Path
from knormpress.records.git import head
from knormpress.records.history import store
from tests.entry_factory import make_entry
import package

def test_x(pytestconfig):
    storage = Path(pytestconfig.getoption("benchmark_storage").removeprefix("file://"))
    with open(storage.parent / "order.txt", "a") as file:
        file.write(package.NAME + "\\n")
    entry = make_entry(run=uuid.uuid4().hex, test="test_it.py::test_x", commit=head(), ppl=package.PPL, noise=0.001)
    store(storage, entry)
    time.sleep(float(os.environ.get("WAIT", 0)))
    assert package.SOUND
"""
TESTS = ("--tests", "test_it.py -p no:cacheprovider")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits; the second's method loses more, and its test fails."""
    folder = tmp_path / "repository"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    run_git("init", "-q")
    (folder / "test_it.py").write_text(SOURCE)
    (folder / "pytest.ini").write_text("[pytest]\n")
    for name, ppl in (("base", 2.0), ("head", 6.0)):
        (folder / "package.py").write_text(f"NAME, PPL, SOUND = {name!r}, {ppl}, {name == 'base'}\n")
        run_git("add", "-A")
        run_git("commit", "-q", "-m", name)
    return folder


def is_clean() -> bool:
    """Whether no checkout is left, and no tracked file was changed."""
    return run_git("worktree", "list").count("\n") == 0 and not run_git("status", "--porcelain", "-uno")


def test_two_commits_are_measured_in_turn_and_judged(repository: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As JSON; all else goes to stderr, and head's failing test is told of."""
    assert main(["compare", "HEAD~1", *TESTS, "--json"]) == 1
    assert (repository / "order.txt").read_text().split() == ["base", "head", "head", "base"]
    assert len(History.read(repository / ".benchmarks").entries) == 4
    assert is_clean()
    captured = capfd.readouterr()
    (verdict,) = map(json.loads, captured.out.splitlines())
    assert (verdict["test"], verdict["word"]) == ("test_it.py::test_x", "regressed")
    assert "2 runs" in verdict["reason"]
    ppl = {finding["metric"]: finding for finding in verdict["findings"]}["ppl"]
    assert ppl["change"]["percent"] == pytest.approx(100 * (1.06 / 1.02 - 1), abs=0.1)
    assert "run 1 of 4: base\n" in captured.err
    assert "run 2 of 4: head, about " in captured.err
    assert "run 2 of 4: tests of head failed" in captured.err
    assert "1 passed" in captured.err


class Pytest:
    """Stands in for pytest: stores an entry of the checkout's commit, and ends with a status for each side."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ppl = {"base": 2.0, "head": 6.0}
        self.statuses = {"base": 0, "head": 0}
        monkeypatch.setattr(commits, "_pytest", self.run)

    def run(self, checkout: Path, arguments: Sequence[str], storage: Path) -> int:
        assert arguments[-1] == "--knorm-save"
        commit = run_git("rev-parse", "HEAD", folder=checkout)
        store(storage, make_entry(run=uuid.uuid4().hex, commit=commit, ppl=self.ppl[checkout.name], noise=0.001))
        return self.statuses[checkout.name]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Pytest:
    return Pytest(monkeypatch)


def test_verdicts_are_printed_and_written(repository: Path, fake: Pytest, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "HEAD~1", "--markdown", "summary.md"]) == 1
    out = capsys.readouterr().out
    assert "1 regressed" in out
    assert "ppl +3.9 %" in out
    assert "| regressed | tests/test_x.py::test_x |" in (repository / "summary.md").read_text()
    assert is_clean()
    fake.ppl["head"] = 2.0
    assert main(["compare", "HEAD~1"]) == 0
    assert "1 ok" in capsys.readouterr().out


def test_tests_that_fail_at_head_are_no_pass(
    repository: Path, fake: Pytest, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.ppl["head"] = 2.0
    fake.statuses = {"base": 1, "head": 1}
    assert main(["compare", "HEAD~1", "--markdown", "summary.md"]) == 1
    out = capsys.readouterr().out
    assert "1 ok" in out
    for told in (out, (repository / "summary.md").read_text()):
        assert "run 2 of 4: tests of head failed" in told
        assert "run 1 of 4" not in told


def test_a_pytest_that_could_not_run_is_an_error(
    repository: Path, fake: Pytest, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.statuses["base"] = 4
    assert main(["compare", "HEAD~1"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert "status 4 in the checkout of base" in line
    assert is_clean()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nonsense"], "'nonsense'"),
        (["HEAD"], "HEAD and HEAD"),
        (["--", "-x"], "'-x'"),
        (["--thresholds", "x=1"], "'x=1'"),
        ([], "--knorm-save"),
    ],
)
def test_wrong_input_is_one_line(fails: Fails, repository: Path, arguments: list[str], named: str) -> None:
    assert named in fails("compare", *arguments)
    assert is_clean()


def test_the_newest_stored_run_is_judged(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, head = run_git("rev-parse", "HEAD~1"), run_git("rev-parse", "HEAD")
    storage = repository / ".benchmarks"
    store(storage, make_entry(run="1", commit=base, created="2026-01-01T00:00:00+00:00", noise=0.001))
    store(storage, make_entry(run="2", commit=head, created="2026-01-02T00:00:00+00:00", noise=0.001))
    assert main(["compare"]) == 0
    assert capsys.readouterr().out.startswith("1 ok\n")
    store(storage, make_entry(run="3", commit=head, created="2026-01-03T00:00:00+00:00", noise=0.001, tpot=20.0))
    assert main(["compare"]) == 1
    assert "tpot +" in capsys.readouterr().out
    assert main(["compare", "--thresholds", "tpot=90,throughput=90,tpot_s=90"]) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="there a signal can't be sent to a group of processes")
def test_ctrl_c_removes_the_checkouts_and_says_what_is_left(repository: Path) -> None:
    command = [sys.executable, "-m", "knormpress", "compare", "HEAD~1", *TESTS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Started in the background, a shell has its commands ignore SIGINT, and theirs too; with a handler here they don't.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    running = subprocess.Popen(command, env=os.environ | {"WAIT": "60"}, start_new_session=True, **pipes)
    signal.signal(signal.SIGINT, before)
    limit = time.monotonic() + 120
    while not (repository / "order.txt").exists() and running.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, "")
    assert err.splitlines()[-1].startswith("stopped: ")
    assert ".benchmarks" in err.splitlines()[-1]
    assert is_clean()

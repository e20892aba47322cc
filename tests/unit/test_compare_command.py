"""``knormpress compare``: of stored runs, and of two commits measured in turn in checkouts of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from knormpress.cli import main
from knormpress.history import History, store
from tests.entry_factory import make_entry

PROJECT = Path(__file__).parents[2]

# What a test of the repository stores, without a model: {ppl} is its method's loss.
SOURCE = """
import os, time, uuid
from pathlib import Path
from knormpress.commits import head
from knormpress.history import store
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


def git(*arguments: str) -> str:
    command = ["git", "-c", "user.name=n", "-c", "user.email=n@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits; the second's method loses more."""
    folder = tmp_path / "repository"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    git("init", "-q")
    (folder / "test_it.py").write_text(SOURCE)
    (folder / "pytest.ini").write_text("[pytest]\n")
    for name, ppl in (("base", 2.0), ("head", 6.0)):
        (folder / "package.py").write_text(f"NAME, PPL, SOUND = {name!r}, {ppl}, True\n")
        git("add", "-A")
        git("commit", "-q", "-m", name)
    return folder


TESTS = ("--tests", "test_it.py -p no:cacheprovider")


def test_two_commits_are_measured_in_turn_and_judged(repository: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "HEAD~1", *TESTS, "--markdown", "summary.md"]) == 1
    out = capfd.readouterr().out
    assert "1 regressed" in out
    assert "ppl +3.9 %" in out
    assert "2 runs" in out
    assert (repository / "order.txt").read_text().split() == ["base", "head", "head", "base"]
    assert "| regressed | test_it.py::test_x |" in (repository / "summary.md").read_text()
    assert len(History.read(repository / ".benchmarks").entries) == 4
    assert git("worktree", "list").count("\n") == 0
    assert git("status", "--porcelain", "--untracked-files=no") == ""


def test_tests_that_fail_at_head_are_no_pass(repository: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (repository / "package.py").write_text("NAME, PPL, SOUND = 'broken', 6.0, False\n")
    git("commit", "-q", "-a", "-m", "broken")
    assert main(["compare", "HEAD~1", *TESTS]) == 1
    assert "run 2 of 4: tests of head failed" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "git knows no commit 'nonsense'"),
        (["HEAD"], "HEAD and HEAD are one commit"),
        (["--", "-x"], "git knows no commit '-x'"),
        (["HEAD~1", "--tests", "no_such_file.py"], "pytest ended with status 4 in the checkout of base"),
        (["--thresholds", "x=1"], "threshold 'x=1' is none"),
        ([], "no run is stored; make one with: pytest tests/perf tests/quality --knorm-save"),
    ],
)
def test_bad_input(repository: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["compare", *arguments]) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
    assert git("worktree", "list").count("\n") == 0


def test_the_newest_stored_run_is_judged(repository: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, head = git("rev-parse", "HEAD~1"), git("rev-parse", "HEAD")
    storage = repository / ".benchmarks"
    store(storage, make_entry(run="1", commit=base, created="2026-01-01T00:00:00+00:00", noise=0.001))
    store(storage, make_entry(run="2", commit=head, created="2026-01-02T00:00:00+00:00", noise=0.001))
    assert main(["compare"]) == 0
    assert capfd.readouterr().out.startswith("1 ok\n")
    store(storage, make_entry(run="3", commit=head, created="2026-01-03T00:00:00+00:00", noise=0.001, tpot=20.0))
    assert main(["compare"]) == 1
    assert "tpot +" in capfd.readouterr().out
    assert main(["compare", "--thresholds", "tpot=90,throughput=90,tpot_s=90"]) == 0


def test_json_is_a_verdict_a_line_and_all_else_goes_to_stderr(
    repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (repository / "package.py").write_text("NAME, PPL, SOUND = 'broken', 6.0, False\n")
    git("commit", "-q", "-a", "--amend", "-m", "broken")
    assert main(["compare", "HEAD~1", *TESTS, "--json"]) == 1
    captured = capfd.readouterr()
    (verdict,) = map(json.loads, captured.out.splitlines())
    assert (verdict["test"], verdict["word"]) == ("test_it.py::test_x", "regressed")
    ppl = {finding["metric"]: finding for finding in verdict["findings"]}["ppl"]
    assert ppl["change"]["percent"] == pytest.approx(100 * (1.06 / 1.02 - 1), abs=0.1)
    assert "run 1 of 4: base\n" in captured.err
    assert "run 2 of 4: head, about " in captured.err
    assert "run 2 of 4: tests of head failed" in captured.err
    assert "1 passed" in captured.err


@pytest.mark.skipif(sys.platform == "win32", reason="there a signal can't be sent to a group of processes")
def test_ctrl_c_removes_the_checkouts_and_says_what_is_left(repository: Path) -> None:
    command = [sys.executable, "-m", "knormpress", "compare", "HEAD~1", *TESTS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    running = subprocess.Popen(command, env=os.environ | {"WAIT": "60"}, start_new_session=True, **pipes)
    signal.signal(signal.SIGINT, before)
    limit = time.monotonic() + 120
    while not (repository / "order.txt").exists() and time.monotonic() < limit:
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, "")
    assert err.splitlines()[-1].startswith("stopped: runs that ended are kept in .benchmarks; ")
    assert git("worktree", "list").count("\n") == 0

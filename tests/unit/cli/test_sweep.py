"""``knormpress sweep`` and ``baseline``: what they print, and results that survive whatever stops them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from knormpress.cli.app import main
from knormpress.records.jsonl import read_records
from knormpress.show.progress import TerminalProgress
from tests.unit.cli.conftest import Fails, Swept

ROOT = Path(__file__).parents[3]


def keep_ratios(path: Path) -> list[float]:
    return [record.policy.keep_ratio for record in read_records(path)]


def test_a_sweep_prints_its_tables_to_stdout_and_all_else_to_stderr(swept: Swept) -> None:
    assert "Change against the full cache" in swept.out
    assert "The guide's targets and claims" in swept.out
    assert str(swept.results) in swept.out
    assert "text: text.txt" in swept.err
    assert "[0/" in swept.err
    told = r"text: |no retrieval: |no plan: |\[\d+/\d+\] \w"
    assert [line for line in swept.err.splitlines() if not re.match(told, line)] == []
    assert not re.search(r"^text: |^\[", swept.out, re.MULTILINE)
    assert not set("\x1b\r") & set(swept.out + swept.err)
    assert keep_ratios(swept.results) == [1.0, 0.5]
    assert {record.policy.skip_layers for record in read_records(swept.results)} == {()}


def test_a_sweep_goes_on_from_its_file_unless_told_otherwise(
    swept: Swept, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, path = swept.copied(tmp_path), tmp_path / "results.jsonl"
    assert main([*sweep, "--keep_ratios", "1.0,0.5,0.25"]) == 0
    assert "2 of 3 cells" in capsys.readouterr().err
    assert path.read_bytes().startswith(swept.results.read_bytes())
    assert keep_ratios(path) == [1.0, 0.5, 0.25]
    assert main([*sweep, "--keep_ratios", "0.5", "--fresh"]) == 0
    assert keep_ratios(path) == [0.5]
    assert keep_ratios(tmp_path / "results.1.jsonl") == [1.0, 0.5, 0.25]


def test_a_quick_sweep_has_few_pairs_and_texts(swept: Swept, tmp_path: Path) -> None:
    command = [*swept.command, "--rounds", "9", "--seconds", "60", "--keep_ratios", "0.5", "--output", str(tmp_path)]
    assert main([*command, "--quick"]) == 0
    (record,) = read_records(tmp_path / "results.jsonl")
    assert (record.latency.pairs, record.conditions.rounds, record.conditions.texts) == (2, 2, 1)


def test_earlier_results_stay_whole_when_a_later_cell_fails(swept: Swept, tmp_path: Path, fails: Fails) -> None:
    """Of 48 tokens the ratio 0.999 keeps all."""
    fails(*swept.copied(tmp_path), "--keep_ratios", "0.5,0.999")
    assert keep_ratios(tmp_path / "results.jsonl") == [1.0, 0.5]


def test_json_is_the_records_and_nothing_else(swept: Swept, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*swept.copied(tmp_path), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.out == swept.results.read_text(encoding="utf-8")
    assert captured.out.count("\n") == 2
    assert captured.err


def test_a_baseline_is_the_full_cache_and_its_noise(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = ["baseline", *tiny, "--output", str(tmp_path)]
    assert main(baseline) == 0
    shown = capsys.readouterr().out
    for word in ("TTFT", "TPOT", "throughput", "cache", "memory", "PPL", "noise"):
        assert f"\n{word} " in shown
    (record,) = read_records(tmp_path / "baseline.jsonl")
    assert (record.policy.method, record.policy.keep_ratio) == ("full", 1.0)
    assert record.quality.kl == 0.0
    assert main([*baseline, "--json"]) == 0
    out = capsys.readouterr().out
    assert out == (tmp_path / "baseline.jsonl").read_text(encoding="utf-8")
    assert json.loads(out)["policy"]["method"] == "full"


@pytest.fixture
def long(tiny: list[str]) -> list[str]:
    """A sweep of two prompt lengths with two cells each into the current folder."""
    return [
        "sweep",
        *tiny,
        "--rounds",
        "6",
        "--keep_ratios",
        "0.9,0.6",
        "--prompt_tokens",
        "48,40",
        "--prune_after",
        "16",
    ]


def goes_on(sweep: list[str], path: Path) -> None:
    """Run a sweep that was stopped again: the cells of its file stay as they are, and the others are added."""
    stopped = list(read_records(path))
    assert len(stopped) in (1, 2)
    assert main(sweep) == 0
    assert list(read_records(path))[: len(stopped)] == stopped
    assert keep_ratios(path) == [0.9, 0.6, 0.9, 0.6]


def test_a_sweep_that_ctrl_c_stopped_goes_on(
    long: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("results", "results.jsonl")

    def interrupt(*_: object) -> None:
        if path.exists():
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patched:
        patched.setattr(TerminalProgress, "step", interrupt)
        status = main(long)
    signal.signal(signal.SIGINT, before)
    assert status == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("stopped: ")
    assert str(path) in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err
    goes_on(long, path)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL there")
def test_a_sweep_that_was_killed_goes_on(long: list[str]) -> None:
    path = Path("results", "results.jsonl")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen([sys.executable, "-m", "knormpress", *long], env=environment)
    limit = time.monotonic() + 240
    while not path.exists() and running.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    running.kill()
    assert running.wait(timeout=60) == -signal.SIGKILL
    goes_on(long, path)

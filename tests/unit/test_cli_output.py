"""What commands write where: results to stdout, all else to stderr, in 80 columns, and in colour only if wanted."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from knormpress.baseline import describe_baseline
from knormpress.cli import main
from knormpress.intervals import Change
from knormpress.plan import Plan, Point
from knormpress.plan_table import print_plan
from knormpress.press import KnormPress
from knormpress.progress import TerminalProgress
from knormpress.verdict_table import verdict_lines
from knormpress.verdicts import Finding, Verdict
from tests.record_factory import make_record
from tests.tiny_folder import save_model, save_text

ROOT = Path(__file__).parents[2]
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="there are neither pseudo-terminals nor signals there")
STYLE = re.compile(r"\x1b\[[\d;]*m")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_text(path / "text.txt", characters=14_000)
    return save_model(path, positions=2048)


@pytest.fixture(scope="module")
def sweep(folder: Path) -> list[str]:
    """A sweep whose cells are all in its file."""
    given = {"model": folder, "corpus": folder / "text.txt", "device": "cpu", "prompt_tokens": 48, "new_tokens": 3}
    given |= {"rounds": 1, "seconds": 0, "samples": 1, "prune_after": 16, "keep_ratios": "1.0,0.5", "output": folder}
    command = ["sweep", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]
    assert main(command) == 0
    return command


@pytest.fixture
def tune(folder: Path, tmp_path: Path) -> list[str]:
    given = {"model": folder, "corpus": folder / "text.txt", "device": "cpu", "context": 512, "target-ppl": "60%"}
    given |= {"target-passkey": "none", "output": tmp_path / "plan.json"}
    return ["tune", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]


def environment(**more: str) -> dict[str, str]:
    unwanted = ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return kept | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"} | more


def on_terminals(arguments: list[str], **variables: str) -> tuple[str, str]:
    """What a command writes to stdout and to stderr when each is a terminal."""
    masters, slaves = zip(os.openpty(), os.openpty(), strict=True)
    command = [sys.executable, "-m", "knormpress", *arguments]
    running = subprocess.Popen(command, stdout=slaves[0], stderr=slaves[1], env=environment(**variables))
    for slave in slaves:
        os.close(slave)
    written = dict.fromkeys(masters, b"")
    waiting = list(masters)
    while waiting:
        for master in select.select(waiting, [], [])[0]:
            try:
                part = os.read(master, 65536)
            except OSError:  # so Linux tells that the other end is closed
                part = b""
            written[master] += part
            if not part:
                waiting.remove(master)
    for master in masters:
        os.close(master)
    assert running.wait(60) == 0
    out, err = (text.decode() for text in written.values())
    return out, err


@POSIX
def test_no_color_leaves_plain_text_on_a_terminal(sweep: list[str]) -> None:
    out, err = on_terminals(sweep, NO_COLOR="1")
    assert "Change against the full cache" in out
    assert "\x1b" not in out
    assert not STYLE.search(err)
    coloured, bar = on_terminals(sweep)
    assert STYLE.search(coloured)
    assert STYLE.search(bar)
    assert STYLE.sub("", coloured) == out


def test_piped_the_progress_is_plain_lines_on_stderr(
    sweep: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main([*sweep, "--output", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert not set("\x1b\r") & set(captured.out + captured.err)
    assert all(re.match(r"text: |\[\d+/\d+\] \w", line) for line in captured.err.splitlines())
    assert "[0/" in captured.err
    assert not re.search(r"^text: |^\[", captured.out, re.MULTILINE)


def test_json_of_a_sweep_is_its_records_and_nothing_else(
    sweep: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main([*sweep, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.out == (folder / "results.jsonl").read_text(encoding="utf-8")
    assert captured.out.count("\n") == 2
    assert captured.err


def test_json_of_a_baseline_is_its_record(sweep: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = sweep[1 : sweep.index("--prune_after")]
    capsys.readouterr()
    assert main(["baseline", *shared, "--output", str(tmp_path), "--json"]) == 0
    out = capsys.readouterr().out
    assert out == (tmp_path / "baseline.jsonl").read_text(encoding="utf-8")
    assert json.loads(out)["policy"]["method"] == "full"


def test_json_of_a_search_is_the_plan(tune: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*tune, "--json"]) == 0
    out = capsys.readouterr().out
    assert out == Path(tune[-1]).read_text(encoding="utf-8")
    assert len(json.loads(out)["press"]["layer_keep_ratios"]) == 3


def test_a_report_prints_what_it_wrote_and_tells_of_its_charts_on_stderr(
    sweep: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, told = tmp_path / "report.html", []
    capsys.readouterr()
    given = ["--output", str(page), "--storage", str(tmp_path / "none")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TerminalProgress, "step", lambda self, done, total, doing: told.append((done, total)))
        assert main(["report", str(folder / "results.jsonl"), *given]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    charts = page.read_text(encoding="utf-8").count("<figure")
    assert told == [(done, charts) for done in range(charts + 1)]
    assert charts


@POSIX
def test_ctrl_c_leaves_a_search_that_can_go_on(tune: list[str], tmp_path: Path) -> None:
    notes = tmp_path / "plan.json.search.jsonl"
    command = [sys.executable, "-m", "knormpress", *tune]
    # Started in the background, a shell has its commands ignore SIGINT, and theirs too; with a handler here they don't.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    running = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    signal.signal(signal.SIGINT, before)
    limit = time.monotonic() + 120
    while not notes.exists() and time.monotonic() < limit:
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1] == (
        f"stopped: what was measured is kept beside {tmp_path / 'plan.json'}, and the same command goes on from there"
    )
    assert notes.exists()


def test_ctrl_c_in_a_report_leaves_the_old_page(
    sweep: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "report.html").write_text("old")
    monkeypatch.setattr(TerminalProgress, "step", interrupt)
    capsys.readouterr()
    given = ["--output", str(tmp_path / "report.html"), "--storage", str(tmp_path / "none")]
    assert main(["report", str(folder / "results.jsonl"), *given]) == 130
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "stopped: nothing is half written, and the same command starts over\n")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("report.html", "old")]


def widths(lines: list[str]) -> int:
    return max(map(len, lines))


def test_a_plan_fits_80_columns() -> None:
    ratios = tuple(0.123 for _ in range(80))
    press = KnormPress(layer_keep_ratios=ratios)
    points = [
        Point(name, press, 0.123, (-1234.5, -2345.6, 12345.6), 1.2345, (140, 140)) for name in ("tuned", "uniform")
    ]
    points.append(replace(points[0], name="tuned for perplexity", press=KnormPress(0.5)))
    held = {"documents": 8, "scored": 256, "context": 131_072}
    model = {
        "name": "an-organisation-of-that-name/a-model-with-a-very-long-name-7B-Instruct",
        "dtype": "",
        "fingerprint": "",
    }
    file = io.StringIO()
    print_plan(Plan(press, model, {"ppl": 5.0, "passkey": 0.9}, {}, held, tuple(points)), Console(file=file, width=200))
    text = file.getvalue()
    assert widths(text.splitlines()) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert text.count("0.123") >= 80


def test_verdicts_fit_80_columns() -> None:
    change = Change(-1234.5, -2345.6, 12345.6)
    finding = Finding("throughput", "incomparable", ("12345.6 ms", "12345.7 ms"), change, "")
    short = Finding("ppl", "ok", ("+1.0 %", "+1.0 %"), Change(0.0, 0.0, 0.0), "")
    lines = list(
        verdict_lines([Verdict("test_it.py::test_x", "noise", "a reason of some length " * 9, (finding, short))])
    )
    assert widths(lines) <= 80
    assert str(change) in " ".join(lines)
    assert change.interval in " ".join(lines)
    assert any(str(short.change) in line and "ppl" in line for line in lines)


def test_a_baseline_fits_80_columns() -> None:
    record = make_record(1.0, method="full", noise=0.5, ttft_cold_s=12.345, prompt_tokens=131_072)
    lines = list(describe_baseline(record))
    assert widths(lines) <= 80
    assert "the full cache against itself" in " ".join(" ".join(lines).split())

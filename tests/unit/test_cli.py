"""The command line as users meet it: the guide's commands, one-line errors, and results that survive all of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from knormpress.cli import main
from knormpress.records import read_records
from tests.tiny_folder import save_model, save_text

ROOT = Path(__file__).parents[2]
PICTURES = {f"knormpress_{name}.png" for name in ("comprehensive", "summary", "tradeoff", "table")}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """For a model this small a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_text(path / "text.txt", characters=1000)
    return save_model(path)


@pytest.fixture
def tiny(folder: Path) -> list[str]:
    """Options that make a command quick."""
    given = {"model": folder, "corpus": folder / "text.txt", "device": "cpu", "prompt_tokens": 48, "new_tokens": 3}
    given |= {"rounds": 1, "seconds": 0, "num_wikitext_samples": 1}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command that must fail, in an empty folder that it must leave empty, and returns its one line."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")

    def run(*arguments: str) -> str:
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        *before, line = captured.err.splitlines()
        assert line.startswith("error: ")
        assert not any(word in captured.err for word in ("Traceback", "Usage:"))
        assert all(told.startswith(("text: ", "[0/")) for told in before)
        assert not [file for file in Path().rglob("*") if file.is_file()]
        return line

    return run


def command(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from knormpress.cli import main\n"
        "assert main(['--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'scipy', 'numpy', 'matplotlib'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    ran = command("-c", program, cwd=tmp_path)
    out, err = ran.communicate(timeout=60)
    assert (ran.returncode, err) == (0, "")
    assert "knormpress sweep --keep_ratios 1.0,0.9,0.8,0.7 --num_wikitext_samples 3" in out


@pytest.mark.parametrize("name", ["baseline", "sweep", "plot", "doctor"])
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"\n    knormpress {name}" in shown


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "Commands:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep_ratios", "0"], "keep_ratio is 0.0; wanted a number above 0 and at most 1"),
        (["--keep_ratios", "0.9,1.1"], "keep_ratio is 1.1; wanted a number above 0 and at most 1"),
        (["--keep_ratios", "nan"], "keep_ratio is nan; wanted a number above 0 and at most 1"),
        (["--keep_ratios", "-0.5"], "keep_ratio is -0.5; wanted a number above 0 and at most 1"),
        (["--keep_ratios", "abc"], "--keep_ratios is 'abc'; wanted numbers separated by commas"),
        (["--keep_ratios", ""], "--keep_ratios is empty"),
        (["--keep_ratios", " , "], "--keep_ratios is empty"),
        (["--keep_ratios"], "--keep-ratios"),
        (["--prune_after", "0"], "prune_after is 0; wanted a whole number of at least 1"),
        (["--prune_after", "many"], "'--prune-after'"),
        (["--prune_after", "49"], "a prompt of 48 tokens is too short to be pruned"),
        (["--skip_layers", "3"], "skip_layers names layer 3, but the model has 3 layers; use -3 to 2"),
        (["--skip_layers", "0,1,2"], "names every layer"),
        (["--skip_layers", "first"], "--skip_layers is 'first'; wanted whole numbers"),
        (["--num_wikitext_samples", "0"], "samples is 0; wanted at least 1"),
        (["--samples", "some"], "'--samples'"),
        (["--samples", "20"], "the text has 1,000 tokens"),
        (["--prompt_tokens", ""], "--prompt_tokens is empty"),
        (["--prompt_tokens", "10.5"], "--prompt_tokens is '10.5'; wanted whole numbers"),
        (["--prompt_tokens", "0"], "prompt_tokens is 0; wanted at least 1"),
        (["--prompt_tokens", "500"], "made for 512 positions"),
        (["--new_tokens", "1"], "new_tokens is 1; wanted at least 2"),
        (["--rounds", "0"], "rounds is 0; wanted at least 1"),
        (["--prefill_chunk", "0"], "prefill_chunk is 0; wanted at least 1"),
        (["--model", "./not/there"], "not/there"),
        (["--corpus", "not there.txt"], "no text file not there.txt"),
        (["--device", "cuda:99"], "device 'cuda:99' can't be used"),
        (["--device", "toaster"], "toaster"),
        (["--device", ""], "devices is empty"),
        (["--dtype", "int8"], "dtype is 'int8'; wanted one of"),
        (["--method", "knrom"], "no method 'knrom'; wanted one of full, knorm"),
        (["--keep_ratio", "0.9"], "No such option: --keep"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_input_is_one_line(options: list[str], message: str, tiny: list[str], fails: Callable[..., str]) -> None:
    assert message in fails("sweep", *tiny, "--prune_after", "16", "--keep_ratios", "0.9", *options)


def test_unknown_command_is_one_line(fails: Callable[..., str]) -> None:
    line = fails("swep")
    assert line.startswith("error: No such command 'swep'.")
    assert line.endswith("(see knormpress --help)")


def test_results_that_are_not_there_are_one_line(fails: Callable[..., str]) -> None:
    assert "no records can be read from results/results.jsonl (No such file" in fails("plot")


def test_results_cut_in_half_are_one_line_and_stay(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["sweep", *tiny, "--prune_after", "16", "--keep_ratios", "0.9,0.5", "--output", str(tmp_path)]
    assert main(sweep) == 0
    path = tmp_path / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-200])
    cut = path.read_bytes()
    capsys.readouterr()
    for arguments in (sweep, ["plot", str(path)]):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {path} line 2 is not a whole record")
        assert path.read_bytes() == cut


def test_earlier_results_stay_whole_when_a_later_cell_fails(tiny: list[str], tmp_path: Path) -> None:
    sweep = ["sweep", *tiny, "--keep_ratios", "0.9", "--prune_after", "16", "--output", str(tmp_path)]
    assert main(sweep) == 0
    before = (tmp_path / "results.jsonl").read_bytes()
    assert main([*sweep, "--keep_ratios", "0.9,0.999"]) == 2
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_sweep_prints_its_tables_and_goes_on_from_its_file(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["sweep", *tiny, "--prune_after", "16", "--skip_layers", "none", "--output", str(tmp_path)]
    assert main([*sweep, "--keep_ratios", "1.0,0.5"]) == 0
    first = capsys.readouterr()
    assert "Change against the full cache" in first.out
    assert "The guide's targets and claims" in first.out
    assert str(tmp_path / "results.jsonl") in first.out
    assert "text: text.txt" in first.err
    records = list(read_records(tmp_path / "results.jsonl"))
    assert [record.policy.keep_ratio for record in records] == [1.0, 0.5]
    assert {record.policy.skip_layers for record in records} == {()}

    assert main([*sweep, "--keep_ratios", "1.0,0.5,0.25"]) == 0
    second = capsys.readouterr()
    assert "2 of 3 cells were measured before" in second.err
    assert [record.policy.keep_ratio for record in read_records(tmp_path / "results.jsonl")] == [1.0, 0.5, 0.25]

    assert main(["plot", str(tmp_path / "results.jsonl")]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"results.jsonl", *PICTURES}

    assert main([*sweep, "--keep_ratios", "0.5", "--fresh"]) == 0
    assert [record.policy.keep_ratio for record in read_records(tmp_path / "results.jsonl")] == [0.5]
    assert len(list(read_records(tmp_path / "results.1.jsonl"))) == 3


def test_dashes_and_underscores_are_one(tiny: list[str], tmp_path: Path) -> None:
    dashed = [word.replace("_", "-") if word.startswith("--") else word for word in tiny]
    options = {"keep-ratios": "0.5", "prune-after": "16", "skip-layers": "-1", "prefill-chunk": "20"}
    for number, separator in enumerate("-_"):
        more = [word for name, value in options.items() for word in (f"--{name.replace('-', separator)}", value)]
        given = dashed if separator == "-" else tiny
        assert main(["sweep", *given, *more, "--output", str(tmp_path / str(number))]) == 0
    first, second = (next(read_records(tmp_path / name / "results.jsonl")) for name in "01")
    assert first.policy == second.policy
    assert first.policy.skip_layers == (-1,)
    assert first.conditions == second.conditions
    assert first.conditions.prefill_chunk == 20


def test_baseline_prints_the_full_cache_and_the_noise(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["baseline", *tiny, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for word in ("TTFT", "TPOT", "throughput", "cache", "memory", "PPL", "noise"):
        assert f"\n{word} " in shown
    (record,) = read_records(tmp_path / "baseline.jsonl")
    assert (record.policy.method, record.policy.keep_ratio) == ("full", 1.0)
    assert {document.kl for document in record.quality.documents} == {0.0}


def test_doctor_tells_of_devices_model_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in shown} == {"cuda", "mps", "xpu", "cpu", "model", "text"}
    assert any(line.startswith("cpu     usable: ") for line in shown)


def test_the_guides_scripts(tiny: list[str], tmp_path: Path) -> None:
    """As the guide types them, one after the other, each in a process of its own."""
    small = ["--prune_after", "16", "--skip_layers", "0", "--keep_ratios", "1.0,0.5"]
    for script, options in (("baseline_test", tiny), ("optimized_test", [*tiny, *small]), ("visualize_results", [])):
        ran = command(str(ROOT / f"{script}.py"), *options, cwd=tmp_path)
        out, err = ran.communicate(timeout=300)
        assert ran.returncode == 0, err
        assert out
        assert "Traceback" not in err
        assert "Warning" not in err
    assert {file.name for file in tmp_path.iterdir()} == {"results", *PICTURES}
    assert {file.name for file in (tmp_path / "results").iterdir()} == {"baseline.jsonl", "results.jsonl"}
    records = list(read_records(tmp_path / "results" / "results.jsonl"))
    cold = [record.latency.ttft_cold_s is not None for record in records]
    assert cold == [True, False]


@pytest.mark.skipif(sys.platform == "win32", reason="there a signal can't be sent to one process alone")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_sweep_goes_on_where_it_was(how: signal.Signals, tiny: list[str], tmp_path: Path) -> None:
    sweep = ["-m", "knormpress", "sweep", *tiny, "--keep_ratios", "0.9,0.8,0.7,0.6", "--prune_after", "16"]
    path = tmp_path / "results" / "results.jsonl"
    # Started in the background, a shell has its commands ignore SIGINT, and theirs too; with a handler here they don't.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    running = command(*sweep, "--rounds", "6", cwd=tmp_path)
    signal.signal(signal.SIGINT, before)
    limit = time.monotonic() + 240
    while not path.exists() and time.monotonic() < limit:
        time.sleep(0.01)
    running.send_signal(how)
    _, err = running.communicate(timeout=60)
    stopped = list(read_records(path))
    assert 1 <= len(stopped) < 4
    if how == signal.SIGINT:
        assert running.returncode == 130
        kept = path.relative_to(tmp_path)
        assert err.splitlines()[-1] == (
            f"stopped: finished cells are kept in {kept}, and the same command goes on from there"
        )
        assert "Traceback" not in err
    again = command(*sweep, "--rounds", "6", cwd=tmp_path)
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert list(read_records(path))[: len(stopped)] == stopped
    assert [record.policy.keep_ratio for record in read_records(path)] == [0.9, 0.8, 0.7, 0.6]

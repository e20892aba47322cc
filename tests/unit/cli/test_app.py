"""The command line as users meet it: help, one-line errors, and the guide's commands as the guide types them."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from knormpress.cli import app as app_module
from knormpress.cli.app import app, main
from knormpress.records.jsonl import read_records
from knormpress.records.plan import write_plan
from tests.plan_factory import make_plan
from tests.unit.cli.conftest import Fails, Swept

ROOT = Path(__file__).parents[3]
PICTURES = {f"knormpress_{name}.png" for name in ("comprehensive", "summary", "tradeoff", "table")}
PLAN_PICTURES = [f"knormpress_{name}.png" for name in ("frontier", "sensitivities", "kept")]
COMMANDS = [command.name or str(command.callback.__name__) for command in app.registered_commands if command.callback]


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from knormpress.cli.app import main\n"
        "assert main(['--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'scipy', 'numpy', 'matplotlib'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "knormpress sweep --keep_ratios 1.0,0.9,0.8,0.7 --num_wikitext_samples 3" in ran.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f" knormpress {name}" in capsys.readouterr().out.partition("Example")[2]


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert [name for name in COMMANDS if f"\n  {name} " not in out] == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--keep_ratios", "0"], "keep_ratio is 0.0"),
        (["--keep_ratios", "0.9,1.1"], "keep_ratio is 1.1"),
        (["--keep_ratios", "nan"], "keep_ratio is nan"),
        (["--keep_ratios", "-0.5"], "keep_ratio is -0.5"),
        (["--keep_ratios", "abc"], "--keep_ratios is 'abc'"),
        (["--keep_ratios", ""], "--keep_ratios is ''"),
        (["--keep_ratios", " , "], "--keep_ratios is ' , '"),
        (["--keep_ratios"], "--keep-ratios"),
        (["--prune_after", "0"], "prune_after is 0"),
        (["--prune_after", "many"], "'--prune-after'"),
        (["--prune_after", "49"], "48 tokens"),
        (["--skip_layers", "3"], "layer 3"),
        (["--skip_layers", "0,1,2"], "(0, 1, 2)"),
        (["--skip_layers", "first"], "--skip_layers is 'first'"),
        (["--num_wikitext_samples", "0"], "samples is 0"),
        (["--samples", "some"], "'--samples'"),
        (["--samples", "20"], "4,000 tokens"),
        (["--prompt_tokens", ""], "--prompt_tokens is ''"),
        (["--prompt_tokens", "10.5"], "--prompt_tokens is '10.5'"),
        (["--prompt_tokens", "0"], "prompt_tokens is 0"),
        (["--prompt_tokens", "2040"], "2048 positions"),
        (["--new_tokens", "1"], "new_tokens is 1"),
        (["--rounds", "0"], "rounds is 0"),
        (["--precision", "nan"], "precision is nan"),
        (["--prefill_chunk", "0"], "prefill_chunk is 0"),
        (["--model", "./not/there"], "not/there"),
        (["--corpus", "not there.txt"], "not there.txt"),
        (["--device", "cuda:99"], "'cuda:99'"),
        (["--device", "toaster"], "toaster"),
        (["--device", ""], "device is empty"),
        (["--dtype", "int8"], "'int8'"),
        (["--method", "knrom"], "'knrom'"),
        (["--plan", "none.json"], "none.json"),
        (["--keep_ratio", "0.9"], "No such option: --keep"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(options: list[str], named: str, tiny: list[str], fails: Fails) -> None:
    assert named in fails("sweep", *tiny, "--prune_after", "16", "--keep_ratios", "0.9", *options)


def test_an_unknown_command_is_one_line(fails: Fails) -> None:
    line = fails("swep")
    assert "swep" in line
    assert line.endswith("(see knormpress --help)")


def test_what_cannot_be_drawn_is_one_line(fails: Fails) -> None:
    assert "results/results.jsonl" in fails("plot").replace("\\", "/")
    for content in (None, "[]", '{"format": '):
        if content is not None:
            Path("plan.json").write_text(content)
        line = fails("plot", "plan.json")
        assert "plan.json" in line
        assert "knormpress tune" in line


def test_results_cut_in_half_are_one_line_and_stay(swept: Swept, tmp_path: Path, fails: Fails) -> None:
    sweep = swept.copied(tmp_path)
    path = tmp_path / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-200])
    for arguments in (sweep, ["plot", str(path)]):
        assert f"{path} line 2" in fails(*arguments)


def test_dashes_and_underscores_are_one(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(app_module, "measure_cells", lambda *given, **_: asked.append(given) or [])
    words = [*tiny, "--keep_ratios", "0.5", "--prune_after", "16", "--skip_layers", "-1", "--prefill_chunk", "20"]
    assert main(["sweep", *words]) == 0
    assert main(["sweep", *(word.replace("_", "-") if word.startswith("--") else word for word in words)]) == 0
    assert asked[0] == asked[1]
    candidates, effort, source, _ = asked[0]
    assert (candidates.keep_ratios, candidates.prune_after, candidates.skip_layers) == ((0.5,), 16, (-1,))
    assert (effort.prompt_tokens, effort.prefill_chunk, effort.samples) == ((48,), 20, 1)
    assert source.device == ("cpu",)


@pytest.mark.parametrize("options", [[], ["--output", "pictures"]])
def test_pictures_are_drawn_beside_what_they_are_of_or_elsewhere(
    options: list[str],
    swept: Swept,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: path.touch())
    folder = Path("pictures" if options else "made")
    swept.copied(tmp_path)
    Path("made").mkdir()
    Path("results.jsonl").rename("made/results.jsonl")
    write_plan(make_plan(), Path("made/plan.json"))
    for file, names in (("results.jsonl", PICTURES), ("plan.json", set(PLAN_PICTURES))):
        assert main(["plot", f"made/{file}", *options]) == 0
        drawn = [Path(line) for line in capsys.readouterr().out.splitlines()]
        assert {path.name for path in drawn} == names
        assert all(path.parent == folder and path.is_file() for path in drawn)


def test_doctor_tells_of_devices_model_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in shown} == {"cuda", "mps", "xpu", "cpu", "model", "text", "attention"}
    assert any(line.startswith("cpu     usable: ") for line in shown)


def test_the_guides_scripts(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the guide types them, one after the other."""
    small = ["--prune_after", "16", "--skip_layers", "0", "--keep_ratios", "1.0,0.5"]
    for script, options in (("baseline_test", tiny), ("optimized_test", [*tiny, *small]), ("visualize_results", [])):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *options])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        assert ended.value.code == 0
        captured = capsys.readouterr()
        assert captured.out
        assert not any(word in captured.err for word in ("Traceback", "Warning"))
    assert {file.name for file in tmp_path.iterdir()} == {"results", *PICTURES}
    written = {file.name for file in (tmp_path / "results").iterdir() if not file.name.startswith(".")}
    assert written == {"baseline.jsonl", "results.jsonl"}
    records = read_records(tmp_path / "results" / "results.jsonl")
    assert [record.keep_ratio for record in records] == [1.0, 0.5]

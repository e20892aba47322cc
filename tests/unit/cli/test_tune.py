"""``knormpress tune``: stopped, it goes on; what it prints is the plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from knormpress.cli.app import main
from knormpress.show.progress import TerminalProgress
from knormpress.tune.search import SCORES
from tests.tiny_folder import save_text
from tests.unit.cli.conftest import Fails


@pytest.fixture(scope="module")
def tune(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    text = save_text(tmp_path_factory.mktemp("tune") / "text.txt", characters=14_000)
    given = {"model": model_folder, "corpus": text, "device": "cpu", "context": 512, "target-ppl": "60%"}
    given |= {"target-retrieval": "none"}
    return ["tune", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]


def test_a_search_that_was_stopped_goes_on_and_prints_its_plan(
    tune: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = Path("plan.json.search.jsonl")

    def interrupt(*_: object) -> None:
        if notes.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TerminalProgress, "step", interrupt)
        assert main([*tune, "--output", "plan.json"]) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert captured.err.splitlines()[-1].startswith("stopped: ")
    assert "plan.json" in captured.err.splitlines()[-1]
    measured = notes.read_bytes()
    assert measured

    assert main([*tune, "--output", "plan.json", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == json.loads(Path("plan.json").read_text(encoding="utf-8"))
    assert len(json.loads(out)["press"]["layer_keep_ratios"]) == 3


def test_the_help_shows_the_scores_that_are_used(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(["tune", "--help"]))
    assert ended.value.code == 0
    assert ",".join(SCORES) in "".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--target-ppl", "five"], "'five'"),
        (["--target-retrieval", "all"], "'all'"),
        (["--scores", "knorm,none"], "'none'"),
        (["--scores", ","], "scores"),
        (["--output", "plan.txt"], "'plan.txt'"),
        (["--device", "cpu,cuda"], "cpu,cuda"),
        (["--corpus", "not there.txt"], "not there.txt"),
    ],
)
def test_wrong_input_is_one_line(options: list[str], named: str, tune: list[str], fails: Fails) -> None:
    assert named in fails(*tune, "--output", "plan.json", *options)

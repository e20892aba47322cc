"""``knormpress lm-eval``: what it prints and stores, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from lm_eval.tasks import manager

import knormpress.lm_eval
from knormpress.cli.app import main
from knormpress.records.jsonl import read_entries
from knormpress.records.schema import Entry
from tests.lm_eval_tasks import write_tasks
from tests.unit.cli.conftest import Fails


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), texts=1)


@pytest.fixture
def command(model_folder: Path, tasks: Path) -> list[str]:
    given = ["lm-eval", "--tasks", "choice,shots", "--include-path", str(tasks), "--model", str(model_folder)]
    return [*given, "--device", "cpu", "--prune_after", "16"]


def stored(path: str = "results/lm-eval.jsonl") -> list[Entry]:
    entries = read_entries(Path(path))
    assert entries is not None
    return list(entries)


def test_both_caches_are_shown_stored_and_reported(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--keep-ratio", "0.1", "--skip-layers", "none"]) == 0
    shown = capsys.readouterr().out
    (entry,) = stored()
    assert entry.lm_eval is not None
    for metric in entry.lm_eval.metrics:
        row = next(line for line in shown.splitlines() if line.split()[:2] == [metric.task, metric.metric])
        assert row.split()[2:4] == [f"{metric.full:.4f}", f"{metric.candidate:.4f}"]
    assert {metric.task for metric in entry.lm_eval.metrics} == {"choice", "shots"}
    assert "skip_layers=()" in entry.method
    assert f"{entry.lm_eval.pruned} of {entry.lm_eval.contexts} contexts were pruned" in " ".join(shown.split())
    assert main(["report", "--markdown", "summary.md"]) == 0
    assert "exact\\_match,none" in Path("summary.md").read_text(encoding="utf-8")
    assert "Tasks of lm-evaluation-harness" in Path("report.html").read_text(encoding="utf-8")


def test_json_is_the_stored_entry(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = [*command, "--keep-ratio", "0.5", "--method", "random", "--limit", "1", "--num-fewshot", "2", "--json"]
    assert main(line) == 0
    entry = Entry.model_validate_json(capsys.readouterr().out)
    assert [entry] == stored()
    assert entry.conditions == {"few_shot": 2, "limit": 1, "prefill_chunk": None}
    assert entry.method.startswith("ScoredPress")


def test_a_model_that_waits_on_disk_has_the_same_results(command: list[str]) -> None:
    place = command.index("--device")
    spread = [*command[:place], "--device-map", "auto,cpu=0KB", *command[place + 2 :]]
    for each in (command, spread):
        assert main([*each, "--keep-ratio", "0.5", "--limit", "1"]) == 0
    whole, waiting = stored()
    assert waiting.environment.device_map == "disk: all"
    assert waiting.lm_eval == whole.lm_eval


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--keep-ratio", "0.5", "--device-map", "cpu"), "--device_map is 'cpu'"),
        (("--keep-ratio", "0.5", "--device-map", "auto"), "device is cpu and there is a device_map"),
        (("--keep-ratio", "0.5", "--include-path", "nowhere"), "no folder nowhere"),
        (("--keep-ratio", "0.5", "--skip-layers", "x"), "--skip_layers is 'x'"),
        (("--keep-ratio", "2"), "keep_ratio is 2.0"),
        (("--keep-ratio", "0.5", "--plan", "auto"), "both are given"),
        (("--keep-ratio", "0.5", "--method", "nothing"), "no method 'nothing'"),
        (("--plan", "nowhere.json"), "nowhere.json"),
        ((), "neither is given"),
    ],
)
def test_bad_input_is_one_line(command: list[str], fails: Fails, options: tuple[str, ...], message: str) -> None:
    assert message in fails(*command, *options)


def test_the_tasks_of_the_harness_are_known_and_no_others(
    command: list[str], fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its thousands of tasks those of one folder are read here, as all take long."""
    lambada = Path(manager.__file__).with_name("lambada") / "manager.py"
    monkeypatch.setattr(manager, "__file__", str(lambada))
    told = fails(*command, "--keep-ratio", "0.5", "--tasks", "choice,lambada_openai,nothing-of-it")
    assert "no task 'nothing-of-it'" in told


def test_contexts_too_short_to_be_pruned_leave_nothing(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--keep-ratio", "0.5", "--prune-after", "9999"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "pruned none of" in captured.err.splitlines()[-1]
    assert list(Path().iterdir()) == []


def test_a_place_that_nothing_can_be_written_to_is_told_before_anything_is_run(
    command: list[str], fails: Fails
) -> None:
    Path("results").write_text("a file", encoding="utf-8")
    # It would be the model that is missing, if it were loaded first.
    assert "nothing can be written to results" in fails(*command, "--keep-ratio", "0.5", "--model", "nowhere")


def test_a_record_that_cannot_be_written_is_printed(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("results/.knormpress.lock").mkdir(parents=True)
    assert main([*command, "--keep-ratio", "0.5", "--limit", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *_, printed, error = captured.err.splitlines()
    assert Entry.model_validate_json(printed).lm_eval is not None
    assert "can't be written to results" in error


def test_without_the_harness_it_says_what_to_install(
    command: list[str], fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knormpress.lm_eval, "find_spec", lambda _: None)
    assert 'pip install "knormpress[lm-eval]"' in fails(*command, "--keep-ratio", "0.5")

"""The GitHub Action: its shell steps run in a stranger's repository, as a runner runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.repository import run_git
from tests.tiny_folder import save_model, save_text

ROOT = Path(__file__).parents[2]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS: list[dict[str, Any]] = ACTION["runs"]["steps"]
CHECKOUT, INSTALL, GATES, REPORT = (step["run"] for step in STEPS if "run" in step)

TEST = """
def test_bytes(knorm_memory, knorm_method):
    knorm_memory(knorm_method, prompt_tokens=256)
"""
METHOD = """
from contextlib import contextmanager

from knormpress import KnormCache, KnormPress

def method(press):
    return caches

@contextmanager
def caches(model):
    yield lambda: KnormCache(model, KnormPress(keep_ratio={ratio}, prune_after=64))
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="its bash may be that of another system")


class Ran(NamedTuple):
    """The exit status of each step that was run, by its lines, with what all of them printed, and the job's summary."""

    statuses: dict[str, int]
    printed: str
    summary: str


Act = Callable[..., Ran]


@pytest.fixture
def act(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Act:
    """Runs the shell steps up to ``last`` in a repository with a test, and after the gates whatever they said."""
    folder = tmp_path / "repository"
    folder.mkdir()
    monkeypatch.chdir(folder)
    save_text(tmp_path / "text.txt")
    settings = {"model": save_model(tmp_path / "tiny"), "corpus": tmp_path / "text.txt", "keep_ratios": 0.5}
    lines = [f"knorm_{name} = {value}" for name, value in settings.items()]
    Path("pytest.ini").write_text("\n".join(["[pytest]", *lines]), encoding="utf-8")
    Path("test_it.py").write_text(TEST, encoding="utf-8")
    # It is installed already, so that nothing is fetched.
    Path("requirements.txt").write_text("pytest\n", encoding="utf-8")
    run_git("init", "-q")

    def run(last: str = REPORT, **given: str) -> Ran:
        inputs = {name: told["default"] for name, told in ACTION["inputs"].items()} | given
        summary = tmp_path / "summary"
        summary.write_text("", encoding="utf-8")
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "KNORMPRESS_"))},
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([".", str(ROOT)]),
            "CI": "true",
            "GITHUB_ACTIONS": "true",
            "GITHUB_STEP_SUMMARY": str(summary),
        }
        statuses: dict[str, int] = {}
        printed = ""
        for step in (step for step in STEPS if "run" in step):
            if last in statuses or (any(statuses.values()) and ("if" not in step or GATES not in statuses)):
                continue
            script = tmp_path / "step.sh"
            script.write_text(step["run"], encoding="utf-8")
            done = subprocess.run(
                ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", script],
                env={**environment, **filled(step.get("env", {}), inputs)},
                capture_output=True,
                text=True,
                check=False,
            )
            statuses[step["run"]] = done.returncode
            printed += done.stdout + done.stderr
        return Ran(statuses, printed, summary.read_text(encoding="utf-8"))

    return run


def filled(environment: Mapping[str, str], inputs: Mapping[str, str]) -> dict[str, str]:
    """The environment of a step, with the inputs that it names."""
    return {
        name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: inputs[found[1]], value)
        for name, value in environment.items()
    }


def commit(ratio: float) -> None:
    """A commit whose method keeps so much, whatever it is asked for."""
    Path("mine.py").write_text(METHOD.format(ratio=ratio), encoding="utf-8")
    run_git("add", "*.py", "*.ini", "*.txt")
    run_git("commit", "-q", "-m", "next")


def test_a_loss_fails_the_job_and_is_in_its_summary(act: Act) -> None:
    commit(0.5)
    ran = act(GATES, tests="test_it.py --knorm-method mine:method")
    assert ran.statuses == {CHECKOUT: 0, INSTALL: 0, GATES: 0}, ran.printed
    assert "1 no-baseline" in ran.printed

    commit(0.75)
    ran = act(tests='-k "bytes and not none" --knorm-method mine:method', thresholds="")
    assert ran.statuses == {CHECKOUT: 0, INSTALL: 0, GATES: 1, REPORT: 0}, ran.printed
    assert "1 regressed" in ran.printed
    assert "regressed" in ran.summary
    assert Path("report.html").is_file()


def test_thresholds_reach_the_gate(act: Act) -> None:
    commit(0.5)
    ran = act(GATES, tests="test_it.py", thresholds="nothing=1")
    assert "nothing" in ran.printed
    assert ran.statuses[GATES] != 0


def test_a_checkout_without_the_commits_before_is_refused(act: Act, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(0.5)
    commit(0.75)
    run_git("clone", "-q", "--depth", "1", Path.cwd().as_uri(), "shallow")
    monkeypatch.chdir("shallow")
    ran = act(tests="test_it.py")
    assert ran.statuses == {CHECKOUT: 2}
    assert "::error::" in ran.printed
    assert "fetch-depth: 0" in ran.printed


def test_runs_are_saved_and_decisions_are_left_to_git(act: Act) -> None:
    """A decision that was withdrawn in git would come back with the history."""
    commit(0.5)
    act(GATES, tests="test_it.py --knorm-pin HEAD --benchmark-autosave")
    Path(".benchmarks", "machine").mkdir()
    Path(".benchmarks", "machine", "0001_benchmark.json").touch()
    stored = {path for path in Path(".benchmarks").rglob("*.json*") if path.is_file()}
    decisions = {path for path in stored if "decisions" in path.parts}
    assert decisions
    places = {step["uses"].partition("@")[0]: step["with"]["path"] for step in STEPS if "path" in step.get("with", {})}
    assert places["actions/cache/save"] == places["actions/cache/restore"]
    assert {*Path().glob(places["actions/cache/save"])} == stored - decisions
    runs = {path for pattern in places["actions/upload-artifact"].split() for path in Path().glob(pattern)}
    assert runs == {path for path in stored - decisions if path.suffix == ".jsonl"} != set()


def test_no_input_becomes_code() -> None:
    assert [step["run"] for step in STEPS if "${{" in step.get("run", "")] == []


def test_the_actions_are_the_pins_of_ci() -> None:
    ours = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    used = re.findall(r"uses: (.+)", (ROOT / "action.yml").read_text(encoding="utf-8"))
    assert len(used) == sum("uses" in step for step in STEPS)
    assert [action for action in used if f"uses: {action}\n" not in ours] == []


def test_the_page_on_ci_names_every_input() -> None:
    page = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE) == list(ACTION["inputs"])

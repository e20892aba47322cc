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


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a test, beside the model and the text of its settings."""
    place = tmp_path_factory.mktemp("action")
    folder = place / "repository"
    folder.mkdir()
    save_text(place / "text.txt")
    settings = {"model": save_model(place / "tiny"), "corpus": place / "text.txt", "keep_ratios": 0.5}
    lines = [f"knorm_{name} = {value}" for name, value in settings.items()]
    (folder / "pytest.ini").write_text("\n".join(["[pytest]", *lines]), encoding="utf-8")
    (folder / "test_it.py").write_text(TEST, encoding="utf-8")
    # It is installed already, so that nothing is fetched.
    (folder / "requirements.txt").write_text("pytest\n", encoding="utf-8")
    run_git("init", "-q", folder=folder)
    return folder


@pytest.fixture(autouse=True)
def _there(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)


@pytest.fixture(scope="module")
def act(repository: Path) -> Act:
    """Runs the shell steps up to ``last`` in the current folder, and after the gates whatever they said.

    What was ``installed`` is not installed again.
    """

    def run(last: str = REPORT, *, installed: bool = True, **given: str) -> Ran:
        inputs = {name: told["default"] for name, told in ACTION["inputs"].items()} | given
        summary = repository.parent / "summary"
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
        for step in (step for step in STEPS if "run" in step and not (installed and step["run"] == INSTALL)):
            if last in statuses or (any(statuses.values()) and ("if" not in step or GATES not in statuses)):
                continue
            script = repository.parent / "step.sh"
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


class Gated(NamedTuple):
    """A run without a loss, which is pinned, and a run with a loss at the next commit."""

    sound: Ran
    lossy: Ran


@pytest.fixture(scope="module")
def gated(repository: Path, act: Act) -> Gated:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repository)
        commit(0.5)
        tests = "test_it.py --knorm-method mine:method --knorm-pin HEAD --benchmark-autosave"
        sound = act(GATES, installed=False, tests=tests)
        commit(0.75)
        lossy = act(tests='-k "bytes and not none" --knorm-method mine:method', thresholds="")
    return Gated(sound, lossy)


def test_a_loss_fails_the_job_and_is_in_its_summary(gated: Gated) -> None:
    assert gated.sound.statuses == {CHECKOUT: 0, INSTALL: 0, GATES: 0}, gated.sound.printed
    assert "1 no-baseline" in gated.sound.printed
    assert gated.lossy.statuses == {CHECKOUT: 0, GATES: 1, REPORT: 0}, gated.lossy.printed
    assert "1 regressed" in gated.lossy.printed
    assert "regressed" in gated.lossy.summary
    assert Path("report.html").is_file()


@pytest.mark.usefixtures("gated")
def test_thresholds_reach_the_gate(act: Act) -> None:
    ran = act(GATES, tests="test_it.py", thresholds="nothing=1")
    assert "nothing" in ran.printed
    assert ran.statuses[GATES] != 0


@pytest.mark.usefixtures("gated")
def test_a_checkout_without_the_commits_before_is_refused(
    act: Act, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_git("clone", "-q", "--depth", "1", Path.cwd().as_uri(), str(tmp_path / "shallow"))
    monkeypatch.chdir(tmp_path / "shallow")
    ran = act(installed=False, tests="test_it.py")
    assert ran.statuses == {CHECKOUT: 2}
    assert "::error::" in ran.printed
    assert "fetch-depth: 0" in ran.printed


def test_runs_are_saved_and_decisions_are_left_to_git(gated: Gated) -> None:
    """A decision that was withdrawn in git would come back with the history."""
    Path(".benchmarks", "machine").mkdir()
    Path(".benchmarks", "machine", "0001_benchmark.json").write_text("{}", encoding="utf-8")
    stored = {path for path in Path(".benchmarks").rglob("*.json*") if path.is_file()}
    decisions = {path for path in stored if "decisions" in path.parts}
    assert decisions
    places = {step["uses"].partition("@")[0]: step["with"]["path"] for step in STEPS if "path" in step.get("with", {})}
    assert places["actions/cache/save"] == places["actions/cache/restore"]
    assert {*Path().glob(places["actions/cache/save"])} == stored - decisions
    uploaded = {path for pattern in places["actions/upload-artifact"].split() for path in Path().glob(pattern)}
    runs = {path for path in stored - decisions if path.suffix == ".jsonl"}
    assert runs
    assert uploaded == {Path("report.html"), *runs}


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

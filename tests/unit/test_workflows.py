"""The checks of the workflows in `tox -e lint` fail what should be failed: a gate that never fails is none."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOW = """
name: ci
on: pull_request
permissions: {}
concurrency:
  group: ci
  cancel-in-progress: true
jobs:
  lint:
    runs-on: ubuntu-latest
    steps:
      - run: echo "$TITLE"
        env:
          TITLE: ${{ github.event.pull_request.title }}
"""


def lint_command(tool: str) -> list[str]:
    """The command of tox.ini, with the path of the tool that this Python has."""
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    lines = [line.partition(" -- ")[2].split() for line in tox["testenv:lint"]["commands"].splitlines()]
    (command,) = [words for words in lines if words[:1] == [tool]]
    found = shutil.which(tool, path=str(Path(sys.executable).parent))
    if found is None and "CI" not in os.environ:
        pytest.skip(f"{tool} is not installed")
    assert found, f"{tool} is not installed"
    return [found, *command[1:]]


def lint(tool: str, workflow: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / ".github" / "workflows").mkdir(parents=True)
    (folder / ".github" / "workflows" / "ci.yml").write_text(workflow, encoding="utf-8")
    return subprocess.run(lint_command(tool), cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("tool", ["zizmor", "check-jsonschema"])
def test_a_good_workflow_passes(tool: str, tmp_path: Path) -> None:
    done = lint(tool, WORKFLOW, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("tool", "good", "bad", "finding"),
    [
        ("zizmor", '"$TITLE"', '"${{ github.event.pull_request.title }}"', "template-injection"),
        ("zizmor", '- run: echo "$TITLE"', "- uses: actions/checkout@v6", "unpinned-uses"),
        ("zizmor", "permissions: {}", "permissions: write-all", "excessive-permissions"),
        ("check-jsonschema", "runs-on", "run-on", "'runs-on' is a required property"),
        ("check-jsonschema", "- run:", "- runs:", "runs"),
    ],
)
def test_a_bad_workflow_fails(tool: str, good: str, bad: str, finding: str, tmp_path: Path) -> None:
    assert good in WORKFLOW
    done = lint(tool, WORKFLOW.replace(good, bad), tmp_path)
    assert done.returncode != 0
    assert finding in done.stdout + done.stderr


def test_every_workflow_is_checked() -> None:
    commands = (ROOT / "tox.ini").read_text(encoding="utf-8")
    for workflow in (ROOT / ".github" / "workflows").iterdir():
        assert f"vendor.github-workflows .github/workflows/{workflow.name}" in commands

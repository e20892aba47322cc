"""What the files around the code promise."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def direct_requirements() -> list[str]:
    extras = PROJECT["optional-dependencies"].values()
    named = [*PROJECT["dependencies"], *(line for extra in extras for line in extra), "hatchling", "tox"]
    return sorted({line for line in named if not line.startswith("knormpress")})


def pins() -> dict[str, list[Requirement]]:
    found = defaultdict(list)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            found[pin.name].append(pin)
    return found


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize("line", direct_requirements())
def test_every_requirement_has_one_exact_version_for_every_python(line: str, python: str) -> None:
    wanted = Requirement(line)
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    fitting = [pin for pin in pins()[wanted.name] if pin.marker is None or pin.marker.evaluate(environment)]
    assert len(fitting) == 1
    (specifier,) = fitting[0].specifier
    assert specifier.operator == "=="
    assert specifier.version in wanted.specifier


def test_the_pythons_that_are_claimed_are_the_ones_that_are_tested() -> None:
    claimed = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    matrix = re.search(r"^ +python: \[(.+)\]$", workflow, re.MULTILINE)
    assert matrix
    assert set(re.findall(r"3\.\d+", matrix.group(1))) == claimed


def test_every_action_is_pinned_by_its_commit() -> None:
    for workflow in (ROOT / ".github" / "workflows").glob("*.yml"):
        for action in re.findall(r"uses: (.+)", workflow.read_text(encoding="utf-8")):
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), f"{workflow.name}: {action}"


def test_ci_runs_the_line_that_the_readme_shows() -> None:
    line = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1]
    assert line.endswith("tox")
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert line in readme
    assert f"{line} -e demo" in readme


@pytest.mark.parametrize(
    "module",
    [
        "knormpress",
        "knormpress.press",
        "knormpress.records",
        "knormpress.compare",
        "knormpress.plots",
        "knormpress.report",
        "knormpress.cli",
        "knormpress.pytest_plugin",
    ],
)
def test_what_needs_no_torch_does_not_import_it(module: str) -> None:
    check = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'datasets'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

"""What the files around the code promise."""

from __future__ import annotations

import configparser
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

USER = """
from transformers import PreTrainedModel
from typing_extensions import assert_type

from knormpress import KnormCache, KnormError, KnormPress, LayerStats, __version__


def shorter(model: PreTrainedModel) -> int:
    press = KnormPress(keep_ratio=0.5, keep_recent=4)
    cache = KnormCache(model, press)
    assert_type(cache.stats(), list[LayerStats])
    with press(model):
        pass
    return cache.nbytes


def why(path: str, model: PreTrainedModel) -> str:
    try:
        KnormPress(keep_ratio="half")  # type: ignore[arg-type]
        return str(KnormPress.from_plan(path, model).keep_ratio)
    except KnormError as error:
        return f"{__version__}: {error}"
"""


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
def test_every_requirement_has_one_exact_version(python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    for wanted in map(Requirement, direct_requirements()):
        fitting = [pin for pin in pins()[wanted.name] if pin.marker is None or pin.marker.evaluate(environment)]
        assert len(fitting) == 1, wanted
        (specifier,) = fitting[0].specifier
        assert specifier.operator == "==", wanted
        assert specifier.version in wanted.specifier, wanted


def test_the_tools_of_the_small_environments_have_one_exact_version() -> None:
    """On the Python that CI uses for them."""
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    wanted = [tool for name in ("package", "docs") for tool in tox[f"testenv:{name}"]["deps"].split()]
    assert len(wanted) > 4
    for tool in wanted:
        (pin,) = (pin for pin in pins()[tool] if pin.marker is None or pin.marker.evaluate({"python_version": "3.13"}))
        assert str(pin.specifier).startswith("==")


def test_the_types_hold_for_a_user(tmp_path: Path) -> None:
    """Under mypy --strict, which also finds a type: ignore that hides nothing."""
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER, encoding="utf-8")
    # torch and transformers have types of their own, which take a minute to read.
    settings = "[mypy]\nstrict = True\n[mypy-torch.*,transformers.*]\nfollow_imports = skip\n"
    (tmp_path / "mypy.ini").write_text(settings, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_without_the_harness_the_command_says_what_is_missing() -> None:
    code = "import sys; sys.modules['typer'] = None; from knormpress.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "knormpress[harness]" in line


def test_the_pythons_that_are_claimed_are_the_ones_that_are_tested() -> None:
    claimed = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    matrix = re.search(r"^ +python: \[(.+)\]$", workflow, re.MULTILINE)
    assert matrix
    assert set(re.findall(r"3\.\d+", matrix.group(1))) == claimed


def test_the_form_of_every_workflow_is_checked() -> None:
    """zizmor takes a folder, and check-jsonschema a file."""
    commands = (ROOT / "tox.ini").read_text(encoding="utf-8")
    (checked,) = re.findall(r"vendor\.github-workflows (.+)", commands)
    there = (ROOT / ".github" / "workflows").iterdir()
    assert sorted(checked.split()) == sorted(f".github/workflows/{workflow.name}" for workflow in there)


def test_ci_runs_the_line_that_the_readme_shows() -> None:
    line = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1]
    assert line.endswith("tox")
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert line in readme
    assert f"{line} -e demo" in readme


def test_what_needs_no_torch_does_not_import_it() -> None:
    """The import contracts see what is written; this also sees what those libraries import themselves."""
    folders = ("policy", "stats", "records", "compare", "show")
    files = [file for folder in folders for file in (ROOT / "knormpress" / folder).rglob("*.py")]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    assert len(names) > 40
    names += ["knormpress.cli.app", "knormpress.pytest_plugin.plugin"]
    heavy = ("torch", "transformers", "datasets", "matplotlib.pyplot")
    code = f"import sys, {', '.join(names)}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

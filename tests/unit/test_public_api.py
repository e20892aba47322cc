"""What the package promises is there, is listed and is explained."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from types import ModuleType

import pytest

import knormpress
from tests.public_api import faults

ROOT = Path(__file__).parents[2]
PROMISED = {"KnormCache", "KnormError", "KnormPress", "LayerStats", "__version__"}

# Called by name: the commands by typer, hooks by pytest. What stands in a package's own module is drawn by it alone.
CALLED = (
    "knormpress.cli.app.",
    "knormpress.pytest_plugin.planted.pytest_",
    "knormpress.pytest_plugin.plugin.pytest_",
)
PARTS = ("knormpress.show.pictures.", "knormpress.show.page.")


def modules() -> list[str]:
    found = pkgutil.walk_packages(knormpress.__path__, "knormpress.")
    return ["knormpress", *(one.name for one in found if not one.name.rpartition(".")[2].startswith("_"))]


def is_allowed(fault: str) -> bool:
    if fault.endswith("is public and not listed"):
        return fault.startswith(CALLED)
    return "names none of its parameters" in fault and fault.startswith(PARTS)


def test_public_names_are_listed_and_explained() -> None:
    found = [fault for name in modules() for fault in faults(importlib.import_module(name))]
    assert [fault for fault in found if not is_allowed(fault)] == []


LACKING = '''from dataclasses import dataclass
from pathlib import Path

__all__ = ["Bare", "Good", "Plain", "forgotten", "many", "silent", "two"]

class Bare:
    pass

@dataclass
class Plain:
    x: int

class Good:
    """Made of a, b and c."""
    def __init__(self, a, b, c): self.a = a
    def told(self): """Told."""
    def untold(self): pass
    @property
    def value(self): return 1
    @classmethod
    def made(cls, one, two, three): """Makes it."""
    def _private(self): pass

def two(one, other): """Two are told apart without their names."""
def many(one, other, more): """Takes this, that and another."""
def silent(): pass
def unlisted(): """Public, but not promised."""
def _private(): pass
'''


def test_the_check_finds_what_is_lacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lacking.py").write_text(LACKING, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert sorted(faults(importlib.import_module("lacking"))) == [
        "lacking has no docstring",
        "lacking.Bare has no docstring",
        "lacking.Good.made names none of its parameters one, two, three",
        "lacking.Good.untold has no docstring",
        "lacking.Good.value has no docstring",
        "lacking.Plain has no docstring",
        "lacking.forgotten is listed and not there",
        "lacking.many names none of its parameters one, other, more",
        "lacking.silent has no docstring",
        "lacking.unlisted is public and not listed",
    ]
    empty, package = ModuleType("empty", "Has a docstring."), ModuleType("package", "Has a docstring.")
    package.__path__ = []
    assert list(faults(empty)) == ["empty has no __all__"]
    assert list(faults(package)) == []
    package.__dict__["own"] = type("own", (), {"__module__": "package"})
    assert list(faults(package)) == ["package has no __all__"]


def test_the_package_promises_these_names_and_no_others() -> None:
    assert set(knormpress.__all__) == PROMISED
    own = {
        name
        for name in dir(knormpress)
        if not name.startswith("_") and getattr(getattr(knormpress, name), "__module__", "").startswith("knormpress.")
    }
    assert own == PROMISED - {"__version__"}
    for name in own:
        assert inspect.getdoc(getattr(knormpress, name))
    with pytest.raises(AttributeError, match="no attribute 'KnormCash'"):
        knormpress.KnormCash  # noqa: B018


def test_torch_comes_with_the_first_name_that_needs_it() -> None:
    program = (
        "import sys; before = len(sys.modules)\n"
        "import knormpress\n"
        "knormpress.KnormPress(0.5), dir(knormpress)\n"
        "assert not {'torch', 'transformers', 'numpy', 'statistics'} & sys.modules.keys()\n"
        # 67 on Python 3.11, nearly all of the standard library.
        "assert len(sys.modules) - before < 85\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
    names: dict[str, object] = {}
    exec("from knormpress import *", names)
    assert names.keys() - {"__builtins__"} == PROMISED


def test_the_package_says_that_it_is_typed() -> None:
    assert (resources.files("knormpress") / "py.typed").is_file()

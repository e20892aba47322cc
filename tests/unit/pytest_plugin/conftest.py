"""What tests of the plugin share: a stored run that many of them begin with is made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Stored = Callable[[str, Callable[[], object]], None]


@pytest.fixture(scope="package")
def _runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def stored(_runs: Path) -> Stored:
    """Puts into the current folder what a run called ``name`` stores: ``make`` runs only where no test has had it."""

    def stored(name: str, make: Callable[[], object]) -> None:
        if not (_runs / name).exists():
            make()
            shutil.copytree(".benchmarks", _runs / name)
        shutil.copytree(_runs / name, ".benchmarks", dirs_exist_ok=True)

    return stored

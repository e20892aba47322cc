"""What tests of commands share: options that make them quick, and a sweep that was measured once."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from knormpress.cli.app import main

Fails = Callable[..., str]


class Swept(NamedTuple):
    """A finished sweep: the command without ``--output``, its results file, and what it wrote to stdout and stderr."""

    command: list[str]
    results: Path
    out: str
    err: str

    def copied(self, folder: Path) -> list[str]:
        """The command with ``folder`` for its results, which holds a copy of them."""
        shutil.copy(self.results, folder)
        return [*self.command, "--output", str(folder)]


@pytest.fixture(scope="session")
def tiny(model_folder: Path) -> list[str]:
    """Options that make a command quick."""
    given = {"model": model_folder, "corpus": model_folder / "text.txt", "device": "cpu", "prompt_tokens": 48}
    given |= {"new_tokens": 3, "rounds": 1, "seconds": 0, "num_wikitext_samples": 1}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command runs in a folder of its own, outside of any repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def swept(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """A sweep over the keep ratios 1.0 and 0.5."""
    folder = tmp_path_factory.mktemp("swept")
    command = ["sweep", *tiny, "--prune_after", "16", "--skip_layers", "none", "--keep_ratios", "1.0,0.5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            assert main([*command, "--output", str(folder)]) == 0
    return Swept(command, folder / "results.jsonl", out.getvalue(), err.getvalue())


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command that must fail and leave the folder's files as they are, and returns its one line."""

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}

    def run(*arguments: str) -> str:
        before = files()
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        *progress, line = captured.err.splitlines()
        assert line.startswith("error: ")
        assert not any(word in captured.err for word in ("Traceback", "Usage:"))
        assert all(told.startswith(("text: ", "[", "1 of 2 cells", "no retrieval: ", "no plan: ")) for told in progress)
        assert files() == before
        return line

    return run

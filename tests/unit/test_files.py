"""Places that can't be written to are said in one line, before anything is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from knormpress.cli.app import main
from knormpress.errors import KnormError
from knormpress.files import make_room
from knormpress.records.jsonl import append_record
from tests.record_factory import make_records


def test_a_folder_is_made_and_a_file_in_its_way_is_named(tmp_path: Path) -> None:
    make_room(tmp_path / "new" / "summary.md")
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "summary.md", tmp_path / "new"):
        with pytest.raises(KnormError, match=str(path.name) if path.is_dir() else "file"):
            make_room(path)


@pytest.mark.parametrize(
    "command", [["plot", "results.jsonl", "--output", "file"], ["compare", "--markdown", "file/x.md"]]
)
def test_commands_say_so_in_one_line(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for record in make_records([1.0, 0.9]):
        append_record(tmp_path / "results.jsonl", record)
    (tmp_path / "file").write_text("mine")
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "file" in line
    assert (tmp_path / "file").read_text() == "mine"

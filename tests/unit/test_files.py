"""Places that can't be written to are said in one line, before anything is measured."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from knormpress.cli.app import main
from knormpress.errors import KnormError
from knormpress.files import replacing, room_for
from knormpress.records.jsonl import append_record
from tests.record_factory import make_records


def test_a_folder_is_made_and_a_file_in_its_way_is_named(tmp_path: Path) -> None:
    with room_for(tmp_path / "new" / "summary.md"):
        assert (tmp_path / "new").is_dir()
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "summary.md", tmp_path / "new"):
        with pytest.raises(KnormError, match=str(path.name) if path.is_dir() else "file"), room_for(path):
            pass


def test_after_an_error_only_folders_that_were_made_and_are_empty_go(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    kept, gone = tmp_path / "kept" / "x" / "file", tmp_path / "old" / "a" / "b" / "file"

    def stopped() -> None:
        with room_for(gone, kept, gone.with_name("other")):
            kept.write_text("written before the error")
            assert gone.parent.is_dir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert kept.exists()
    assert list((tmp_path / "old").iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        ["compare", "--markdown", "missing/in/x.md"],
        ["compare", "--markdown", "missing/in/x.md", "--thresholds", "x=1"],
        ["report", "--output", "missing/page.html", "--markdown", "file/x.md"],
    ],
)
def test_a_command_that_ends_in_an_error_leaves_no_folder(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "results").mkdir()
    for record in make_records([1.0, 0.9]):
        append_record(tmp_path / "results" / "results.jsonl", record)
    before = set(tmp_path.rglob("*"))
    assert main(command) == 2
    assert set(tmp_path.rglob("*")) == before


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


@pytest.mark.skipif(sys.platform == "win32", reason="devices have no paths there")
def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """A process with the right to do so would rename its file over /dev/null."""
    device = tmp_path / "device"
    os.mkfifo(device)
    with pytest.raises(OSError, match="not a file"), replacing(device) as temporary:
        temporary.write_text("new")
    with pytest.raises(KnormError, match="device is a device"), room_for(device):
        pass
    assert device.is_fifo()
    assert list(tmp_path.iterdir()) == [device]


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right of their own there")
def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link, file = tmp_path / "link", tmp_path / "folder" / "file"
    link.symlink_to(file)
    with replacing(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert file.read_text() == "new"
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "folder", file, link]


@pytest.mark.parametrize(
    ("named", "owner", "method", "command"),
    [
        ("page.html", Path, "write_text", ["report", "results.jsonl", "--output", "page.html"]),
        ("summary.md", Path, "write_text", ["compare", "--markdown", "summary.md"]),
        ("knormpress_", Figure, "savefig", ["plot", "results.jsonl"]),
    ],
)
def test_a_full_disk_is_one_line_that_names_the_file(
    named: str,
    owner: type,
    method: str,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for record in make_records([1.0, 0.9]):
        append_record(tmp_path / "results.jsonl", record)
    before = set(tmp_path.iterdir())

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(owner, method, full)
    monkeypatch.setattr("knormpress.cli.app.judge_runs", lambda *args: ([], [], []))
    assert main(command) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert named in line
    assert os.strerror(errno.ENOSPC) in line
    assert set(tmp_path.iterdir()) == before

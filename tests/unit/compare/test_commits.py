"""What the head of a comparison is: the working tree as it is, or an error if git can't commit it."""

from __future__ import annotations

from pathlib import Path

import pytest

from knormpress.compare.commits import uncommitted, untracked
from knormpress.errors import KnormError
from tests.repository import run_git


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one commit."""
    monkeypatch.chdir(tmp_path)
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "n")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "n@example.org")
    run_git("init", "-q")
    (tmp_path / "file.txt").write_text("committed")
    run_git("add", "-A")
    run_git("commit", "-q", "-m", "first")
    return tmp_path


def test_uncommitted_changes_are_a_commit_of_their_own(repository: Path) -> None:
    assert uncommitted() is None
    (repository / "file.txt").write_text("changed")
    (repository / "untracked.txt").write_text("")
    assert untracked(Path(".benchmarks")) == ["untracked.txt"]
    commit = uncommitted()
    assert commit is not None
    assert run_git("show", f"{commit}:file.txt") == "changed"
    assert "untracked" not in run_git("ls-tree", "--name-only", commit)
    assert (repository / "file.txt").read_text() == "changed"
    assert run_git("stash", "list") == ""


def test_untracked_files_are_found_from_a_folder_too(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "untracked.txt").write_text("")
    (repository / "folder").mkdir()
    (repository / ".benchmarks").mkdir()
    (repository / ".benchmarks" / "run.json").write_text("")
    monkeypatch.chdir(repository / "folder")
    assert untracked(Path(".benchmarks")) == ["untracked.txt"]
    assert uncommitted() is None


def test_changes_that_git_cant_commit_are_not_left_out_in_silence(repository: Path) -> None:
    (repository / "new.txt").write_text("new")
    run_git("add", "-N", "new.txt")
    (repository / "file.txt").write_text("changed")
    with pytest.raises(KnormError, match="commit them first"):
        uncommitted()

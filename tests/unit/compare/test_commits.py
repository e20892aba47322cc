"""What the head of a comparison is: the working tree as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from knormpress.compare.commits import uncommitted
from tests.repository import run_git


def test_uncommitted_changes_are_a_commit_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "n")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "n@example.org")
    run_git("init", "-q")
    (tmp_path / "file.txt").write_text("committed")
    run_git("add", "-A")
    run_git("commit", "-q", "-m", "first")
    assert uncommitted() is None
    (tmp_path / "file.txt").write_text("changed")
    (tmp_path / "untracked.txt").write_text("")
    commit = uncommitted()
    assert commit is not None
    assert run_git("show", f"{commit}:file.txt") == "changed"
    assert "untracked" not in run_git("ls-tree", "--name-only", commit)
    assert (tmp_path / "file.txt").read_text() == "changed"
    assert run_git("stash", "list") == ""

"""What a record says of the machine and of the code that measured."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from knormpress.workload.environment import describe_environment

CPU = torch.device("cpu")


def test_the_commit_is_that_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    outside = describe_environment(CPU)
    assert (outside.git_commit, outside.git_dirty) == (None, None)

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
        return subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "code.py").write_text("a = 1\n")
    git("add", ".")
    git("commit", "-qm", "one")
    (tmp_path / "results.jsonl").write_text("")
    inside = describe_environment(CPU)
    assert inside.git_commit == git("rev-parse", "HEAD")
    assert inside.git_dirty is False
    (tmp_path / "code.py").write_text("a = 2\n")
    assert describe_environment(CPU).git_dirty is True

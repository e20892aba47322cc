"""A git repository of empty commits, made without checking anything out."""

from __future__ import annotations

import subprocess
from itertools import count
from pathlib import Path

__all__ = ["Repository", "run_git"]

_NAME = ("-c", "user.name=n", "-c", "user.email=n@example.org")


def run_git(*arguments: str, folder: Path | None = None) -> str:
    """What git prints, under a name that commits can be made with; git must not fail."""
    command = ["git", *_NAME, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


class Repository:
    """A repository in ``folder``, whose commits come from whichever commits a test says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.git("init", "-q")
        self._tree = self.git("write-tree")
        self._numbers = count()

    def git(self, *arguments: str) -> str:
        """What git prints here."""
        return run_git(*arguments, folder=self.folder)

    def commit(self, *parents: str) -> str:
        """A commit that comes from ``parents``, and from nothing where there are none."""
        before = [word for parent in parents for word in ("-p", parent)]
        return self.git("commit-tree", self._tree, *before, "-m", str(next(self._numbers)))

    def line(self, length: int, start: str | None = None) -> list[str]:
        """So many commits in a line, oldest first, from ``start`` on."""
        commits = [] if start is None else [start]
        for _ in range(length):
            commits.append(self.commit(*commits[-1:]))
        return commits[-length:]

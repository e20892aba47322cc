"""What git knows: the commit under test, and the commits it came from."""

from __future__ import annotations

import subprocess
from pathlib import Path

from knormpress.errors import KnormError

__all__ = ["ancestors", "git", "head", "is_dirty", "is_shallow"]


def git(*arguments: str, folder: Path | None = None) -> str | None:
    """What git prints, or None where it fails or is not there."""
    try:
        ran = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=60, check=False, cwd=folder, encoding="utf-8"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def head() -> str | None:
    """The commit that is checked out around the current directory; None outside of a repository."""
    return git("rev-parse", "HEAD")


def is_dirty() -> bool | None:
    """Whether a tracked file was changed: untracked results change no measurement. None outside of a repository."""
    changed = git("status", "--porcelain", "--untracked-files=no")
    return None if changed is None else bool(changed)


def is_shallow(folder: Path | None = None) -> bool:
    """Whether the clone lacks commits."""
    return git("rev-parse", "--is-shallow-repository", folder=folder) == "true"


def ancestors(commit: str, folder: Path | None = None) -> list[str]:
    """``commit`` and all that it came from, the nearest first, in the repository around ``folder`` or the current one.

    Over merges, near is what the longest way to it makes near: so no commit stands before one that came from it, and
    the two sides of a merge take turns, the first parent's ahead.

    Raises:
        KnormError: the repository does not have that commit.
    """
    found = git("rev-list", "--topo-order", "--parents", commit, folder=folder)
    if found is None:
        raise KnormError(f"git does not know the commit {commit}; fetch it, or run this in its repository")
    steps: dict[str, int] = {}
    for line in found.splitlines():
        child, *parents = line.split()
        behind = steps.setdefault(child, 0) + 1
        for parent in parents:
            steps[parent] = max(steps.get(parent, 0), behind)
    return sorted(steps, key=steps.__getitem__)

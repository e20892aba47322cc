"""Ask git for the current commit and its ancestors."""

from __future__ import annotations

import functools
import getpass
import subprocess
from pathlib import Path

from knormpress.errors import KnormError

__all__ = ["ancestors", "git", "head", "is_dirty", "is_shallow", "tree", "user"]


def git(*arguments: str, folder: Path | None = None) -> str | None:
    """Run git and return its output; None if it fails or is not installed."""
    try:
        ran = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=60, check=False, cwd=folder, encoding="utf-8"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def head() -> str | None:
    """The commit that is checked out in the current directory's repository; None outside of a repository."""
    return git("rev-parse", "HEAD")


def user() -> str:
    """Who works here: as git writes it into commits, else the name of the login, else ``unknown``."""
    name, email = git("config", "user.name"), git("config", "user.email")
    if name:
        return f"{name} <{email}>" if email else name
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):
        # In a container the user may be a number without a name.
        return "unknown"


@functools.cache
def tree(commit: str) -> str | None:
    """The hash of the files of ``commit``: equal for two commits whose files are; None if git doesn't know it."""
    return git("rev-parse", "--verify", "--quiet", f"{commit}^{{tree}}")


def is_dirty() -> bool | None:
    """Whether a tracked file was changed (untracked files don't count); None outside of a repository."""
    changed = git("status", "--porcelain", "--untracked-files=no")
    return None if changed is None else bool(changed)


def is_shallow(folder: Path | None = None) -> bool:
    """Whether the repository is a shallow clone, which lacks older commits."""
    return git("rev-parse", "--is-shallow-repository", folder=folder) == "true"


def ancestors(commit: str, folder: Path | None = None) -> list[str]:
    """``commit`` and all its ancestors, the nearest first, in the repository of ``folder`` or the current directory.

    The distance to an ancestor is the longest path to it. So a commit never comes before its descendants, and the two
    sides of a merge alternate.

    Raises:
        KnormError: the repository does not have this commit.
    """
    lines = git("rev-list", "--topo-order", "--parents", commit, folder=folder)
    if lines is None:
        raise KnormError(f"git does not know the commit {commit}; fetch it, or run this in its repository")
    distances: dict[str, int] = {}
    for line in lines.splitlines():
        child, *parents = line.split()
        distance = distances.setdefault(child, 0) + 1
        for parent in parents:
            distances[parent] = max(distances.get(parent, 0), distance)
    return sorted(distances, key=distances.__getitem__)

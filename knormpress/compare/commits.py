"""Measure two commits in turn on this machine: base, head, head, base. Each has its own checkout and processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from knormpress.errors import KnormError
from knormpress.records.git import git, is_dirty

__all__ = ["measure_in_turn", "resolve_commit", "uncommitted", "untracked"]

_PASSED, _TESTS_FAILED = 0, 1
_STDERR = 2


def resolve_commit(name: str) -> str:
    """The full hash of the commit that ``name`` stands for.

    Raises:
        KnormError: there is no such commit.
    """
    commit = git("rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}")
    if commit is None:
        raise KnormError(f"git knows no commit {name!r}; fetch it first, or name another commit")
    return commit


def uncommitted() -> str | None:
    """A commit, on no branch, that holds the working tree with its uncommitted changes; None if there are none.

    Untracked files are not in it. Neither the tree nor the index is touched.

    Raises:
        KnormError: git can't make such a commit, as during a merge with conflicts, or after ``git add -N``.
    """
    commit = git("stash", "create")
    if not commit and is_dirty():
        raise KnormError("git can't make a commit of the uncommitted changes (see git status); commit them first")
    return commit or None


def untracked(storage: Path) -> list[str]:
    """The files that git neither tracks nor ignores, without those in the folder ``storage``."""
    others = git("ls-files", "--others", "--exclude-standard", f"--exclude={storage.name}", "--full-name", ":/")
    return (others or "").splitlines()


def measure_in_turn(
    base: str, head: str, pytest_arguments: Sequence[str], storage: Path, say: Callable[[str], None]
) -> list[str]:
    """Run pytest in checkouts of ``base`` and ``head``, in the order base, head, head, base, and store every entry.

    Both run with this interpreter and its packages; a checkout's own package comes first on the path.

    Args:
        base, head: full hashes.
        pytest_arguments: arguments for pytest, such as ``["tests/perf"]``.
        storage: the folder for the entries.
        say: called with a line for each step.

    Returns:
        A message for each run of ``head`` with failed tests (comparisons aside); empty if all tests passed.

    Raises:
        KnormError: a checkout can't be made, or pytest could not run the tests.
    """
    storage = storage.resolve()
    faults = []
    with tempfile.TemporaryDirectory(prefix="knormpress-") as folder:
        checkouts = {"base": Path(folder) / "base", "head": Path(folder) / "head"}
        try:
            for side, commit in (("base", base), ("head", head)):
                if git("worktree", "add", "--detach", str(checkouts[side]), commit) is None:
                    raise KnormError(f"git can't check out {commit[:12]} into {checkouts[side]}; see git worktree list")
            start = time.monotonic()
            for number, side in enumerate(("base", "head", "head", "base"), start=1):
                spent = time.monotonic() - start
                left = f", about {spent / (number - 1) * (5 - number):.0f} s left" if number > 1 else ""
                say(f"run {number} of 4: {side}{left}")
                status = _pytest(checkouts[side], [*pytest_arguments, "--knorm-save"], storage)
                if status not in (_PASSED, _TESTS_FAILED):
                    raise KnormError(f"pytest ended with status {status} in the checkout of {side}; see its output")
                if side == "head" and status == _TESTS_FAILED:
                    faults.append(f"run {number} of 4: tests of head failed, see pytest's output above")
        finally:
            for checkout in checkouts.values():
                git("worktree", "remove", "--force", str(checkout))
    return faults


def _pytest(checkout: Path, arguments: Sequence[str], storage: Path) -> int:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(checkout), os.getenv("PYTHONPATH"))))}
    command = [sys.executable, "-m", "pytest", *arguments, f"--benchmark-storage=file://{storage}"]
    # stdout is only for the verdicts.
    return subprocess.run(command, cwd=checkout, env=environment, stdout=_STDERR, check=False).returncode

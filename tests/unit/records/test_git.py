"""What git knows of commits: in which order they came, and where it knows nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from knormpress.errors import KnormError
from knormpress.records.git import ancestors, git, head, is_dirty, is_shallow, user
from tests.repository import Repository, run_git


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return Repository(tmp_path_factory.mktemp("git") / "repository")


def test_the_nearest_comes_first(repository: Repository) -> None:
    line = repository.line(4)
    assert ancestors(line[3], repository.folder) == line[::-1]
    assert ancestors(line[1], repository.folder) == [line[1], line[0]]


def test_a_commit_of_another_branch_is_no_ancestor(repository: Repository) -> None:
    line = repository.line(3)
    aside = repository.commit(line[0])
    assert ancestors(aside, repository.folder) == [aside, line[0]]


def test_over_a_merge_the_two_sides_take_turns(repository: Repository) -> None:
    """A side branch of many commits does not stand before the parent of the merge."""
    line = repository.line(4)
    side = repository.line(3, start=line[0])
    merge = repository.commit(line[3], side[2])
    found = ancestors(merge, repository.folder)
    assert found[:3] == [merge, line[3], side[2]]
    assert [set(found[3:5]), set(found[5:7])] == [{line[2], side[1]}, {line[1], side[0]}]
    assert found[7:] == [line[0]]


def test_a_commit_never_stands_before_one_that_came_from_it(repository: Repository) -> None:
    """One commit off the oldest, merged: the oldest is two steps away by that side, and still older than the others."""
    line = repository.line(4)
    side = repository.commit(line[0])
    merge = repository.commit(line[3], side)
    assert ancestors(merge, repository.folder) == [merge, line[3], side, line[2], line[1], line[0]]


def test_a_commit_that_is_not_there_is_named(repository: Repository) -> None:
    with pytest.raises(KnormError, match="b" * 40):
        ancestors("b" * 40, repository.folder)


def test_what_is_checked_out(repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = tmp_path / "clone"
    repository.git("update-ref", "HEAD", (commits := repository.line(2))[1])
    run_git("clone", "-q", "--depth", "1", repository.folder.as_uri(), str(clone))
    assert not is_shallow(repository.folder)
    assert is_shallow(clone)
    monkeypatch.chdir(clone)
    assert head() == commits[1]
    assert is_dirty() is False
    (clone / "results").touch()
    assert is_dirty() is False
    run_git("add", "results")
    assert is_dirty() is True


def test_outside_of_a_repository_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert (head(), is_dirty(), is_shallow()) == (None, None, False)
    monkeypatch.setenv("PATH", "")
    assert git("version") is None


def test_a_user_without_a_name_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)
    assert user() == "unknown"
    monkeypatch.setenv("LOGNAME", "ada")
    assert user() == "ada"

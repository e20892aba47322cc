"""Pins, accepted losses and new names of tests, as the history keeps them."""

from __future__ import annotations

from pathlib import Path

import pytest

from knormpress.errors import KnormError
from knormpress.records.decisions import Acceptance, Pin, Rename, decide, read_decisions
from knormpress.records.history import History, store
from tests.entry_factory import COMMIT, make_entry

EARLY, LATE = "2026-01-01T00:00:00+00:00", "2030-01-01T00:00:00+00:00"


def test_decisions_are_read_back_oldest_first(tmp_path: Path) -> None:
    accepted = Acceptance(metric="bytes", before="1 MB", now="2 MB", why="why", entry=make_entry(), created=LATE)
    made = [Pin(commit=COMMIT, created=EARLY), Rename(old="a", new="b"), accepted]
    for decision in reversed(made):
        decide(tmp_path, decision)
    assert list(read_decisions(tmp_path)) == made
    history = History.read(tmp_path)
    assert history.notes == ()
    assert (history.pinned, history.accepted) == (COMMIT, (accepted,))


def test_the_newest_pin_holds_and_a_pin_can_be_taken_out(tmp_path: Path) -> None:
    for decision in (Pin(commit="a" * 40, created=EARLY), Pin(commit=None, created=LATE)):
        decide(tmp_path, decision)
    assert History.read(tmp_path).pinned is None
    decide(tmp_path, Pin(commit="b" * 40, created=LATE + "1"))
    assert History.read(tmp_path).pinned == "b" * 40


def test_who_decided_is_what_git_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config"
    config.write_text("[user]\nname = Ada\nemail = ada@example.org\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.chdir(tmp_path)
    assert Pin(commit=None).who == "Ada <ada@example.org>"
    config.write_text("")
    monkeypatch.setenv("LOGNAME", "login")
    assert Pin(commit=None).who == "login"


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("t.py::a", "t.py::b", {"t.py::b", "t.py::b[1]", "t.py::ab", "t.py::c", "tt.py::a"}),
        ("t.py", "p/t.py", {"p/t.py::a", "p/t.py::a[1]", "p/t.py::ab", "p/t.py::c", "tt.py::a"}),
        ("t.py::a[1]", "t.py::a[2]", {"t.py::a", "t.py::a[2]", "t.py::ab", "t.py::c", "tt.py::a"}),
    ],
)
def test_a_renamed_test_function_or_file_keeps_its_runs(tmp_path: Path, old: str, new: str, names: set[str]) -> None:
    for test in ("t.py::a", "t.py::a[1]", "t.py::ab", "t.py::c", "tt.py::a"):
        store(tmp_path, make_entry(run="r", test=test))
    decide(tmp_path, Rename(old=old, new=new))
    assert {entry.test for entry in History.read(tmp_path).entries} == names


def test_renames_follow_each_other_and_leave_later_runs_alone(tmp_path: Path) -> None:
    accepted = Acceptance(metric="bytes", before="", now="", why="", entry=make_entry(test="t.py::a", created=EARLY))
    decide(tmp_path, accepted)
    store(tmp_path, make_entry(run="1", test="t.py::a", created=EARLY))
    store(tmp_path, make_entry(run="2", test="t.py::a", created=LATE))
    for old, new, day in (("t.py::a", "t.py::b", "2026-02-01"), ("t.py::b", "t.py::c", "2026-03-01")):
        decide(tmp_path, Rename(old=old, new=new, created=day))
    history = History.read(tmp_path)
    assert [entry.test for entry in history.entries] == ["t.py::c", "t.py::a"]
    assert history.accepted[0].entry.test == "t.py::c"


@pytest.mark.parametrize("text", ["", "{", '{"kind": "other"}', '{"kind": "pin", "commit": 5}'])
def test_a_broken_decision_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "knormpress" / "decisions" / "x.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(KnormError, match=r"x\.jsonl is not a decision") as caught:
        History.read(tmp_path)
    assert "\n" not in str(caught.value)

"""What a search has measured, kept so that it can go on: nothing of another search is believed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from knormpress import KnormPress
from knormpress.errors import KnormError
from knormpress.tune.notes import Damage, Notes

PRESS = KnormPress(0.5)
FOUND = Damage(0.1, -0.2, 0.3, 0.9)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "notes.jsonl"


def test_what_was_noted_is_found_again(path: Path) -> None:
    notes = Notes(path, {"context": 512})
    assert not notes.goes_on
    assert notes.get(PRESS, few=False) is None
    notes.note(PRESS, FOUND, few=False)
    again = Notes(path, {"context": 512})
    assert again.goes_on
    assert again.get(PRESS, few=False) == FOUND
    assert again.get(replace(PRESS, keep_recent=1), few=False) is None
    assert again.get(PRESS, few=True) is None


def test_a_line_that_was_cut_short_is_passed_over(path: Path) -> None:
    Notes(path, {}).note(PRESS, FOUND, few=False)
    with path.open("a") as file:
        file.write('["half a li')
    again = Notes(path, {})
    assert again.get(PRESS, few=False) == FOUND
    again.note(replace(PRESS, keep_recent=1), FOUND, few=False)
    assert Notes(path, {}).get(replace(PRESS, keep_recent=1), few=False) == FOUND


@pytest.mark.parametrize(("identity", "fresh"), [({"context": 1024}, False), ({"context": 512}, True)])
def test_what_is_of_another_search_or_to_be_forgotten_is(path: Path, identity: dict[str, int], fresh: bool) -> None:
    Notes(path, {"context": 512}).note(PRESS, FOUND, few=False)
    notes = Notes(path, identity, fresh=fresh)
    assert not notes.goes_on
    assert notes.get(PRESS, few=False) is None


def test_what_another_search_writes_into_the_file_is_not_believed(path: Path) -> None:
    first = Notes(path, {"context": 512})
    second = Notes(path, {"context": 1024})
    first.note(PRESS, FOUND, few=False)
    second.note(replace(PRESS, keep_recent=1), FOUND, few=False)
    again = Notes(path, {"context": 1024})
    assert again.goes_on
    assert again.get(PRESS, few=False) is None
    assert again.get(replace(PRESS, keep_recent=1), few=False) == FOUND


def test_what_is_no_text_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_bytes(b"\xff\xfe\n")
    assert not Notes(path, {"context": 512}).goes_on
    assert Notes(path, {"context": 512}).goes_on


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KnormError, match=r"file.*--output"):
        Notes(tmp_path / "file" / "notes.jsonl", {})


def test_a_fall_of_the_likelihood_is_luck_and_counts_as_none() -> None:
    assert Damage(kl=0.4, nll=0.2, answer_nll=0.0, found=1.0).text == pytest.approx(0.3)
    assert Damage(kl=0.4, nll=-0.2, answer_nll=0.0, found=1.0).text == 0.2

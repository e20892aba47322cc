"""The stored runs as they are written and read, and storages that are broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from knormpress.errors import KnormError
from knormpress.records.history import History, shortened, store
from knormpress.records.schema import SCHEMA_VERSION
from tests.entry_factory import COMMIT, make_entry


def write(storage: Path, name: str, text: str) -> None:
    (storage / name).parent.mkdir(parents=True, exist_ok=True)
    (storage / name).write_text(text, encoding="utf-8")


def test_what_is_stored_is_read_back(tmp_path: Path) -> None:
    entries = [make_entry(run=run, test=f"t.py::{n}") for run in ("a", "b") for n in range(2)]
    files = {store(tmp_path, entry) for entry in entries}
    assert {file.name for file in files} == {f"{COMMIT[:12]}_{run}.jsonl" for run in "ab"}
    history = History.read(tmp_path)
    assert sorted(history.entries, key=lambda entry: (entry.run, entry.test)) == entries
    assert (history.outdated, history.notes) == ({}, ())
    assert {entry.run for entry in history.without({"a"}).entries} == {"b"}
    assert History.read(tmp_path / "nothing").entries == ()


def test_entries_are_in_the_order_of_their_making(tmp_path: Path) -> None:
    for run, day in (("a", 2), ("b", 1), ("c", 3)):
        store(tmp_path, make_entry(run=run, created=f"2026-01-0{day}"))
    assert [entry.run for entry in History.read(tmp_path).entries] == ["b", "a", "c"]


def test_the_files_of_pytest_benchmark_are_read_too(tmp_path: Path) -> None:
    entry = make_entry(run="x")
    benchmarks = [{"extra_info": {"knormpress": entry.model_dump(mode="json")}}, {"extra_info": {}}, {"other": 1}]
    write(tmp_path, "Linux-CPython/0001_x.json", json.dumps({"benchmarks": benchmarks}))
    store(tmp_path, entry)
    write(tmp_path, "notes.json", '{"something": "else"}')
    history = History.read(tmp_path)
    assert history.entries == (entry,)
    (note,) = history.notes
    assert str(tmp_path / "notes.json") in note


def test_an_entry_of_another_schema_version_is_set_aside(tmp_path: Path) -> None:
    data = json.loads(make_entry(test="t.py::old").model_dump_json()) | {"schema_version": 1}
    write(tmp_path, "knormpress/x.jsonl", json.dumps(data))
    history = History.read(tmp_path)
    assert (history.entries, history.outdated) == ((), {"t.py::old": 1})


WHOLE = make_entry().model_dump_json()
LACKING = json.dumps({name: value for name, value in json.loads(WHOLE).items() if name != "model"})


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("0001_x.json", WHOLE[: len(WHOLE) // 2], "JSON.*reference"),
        ("knormpress/x.jsonl", WHOLE[: len(WHOLE) // 2], "line 1.*JSON.*reference"),
        ("knormpress/x.jsonl", f"{WHOLE}\n\n{WHOLE[:100]}", "line 3"),
        ("knormpress/x.jsonl", LACKING, f"line 1.*schema version {SCHEMA_VERSION}.*model"),
        ("knormpress/x.jsonl", "5", "line 1.*5"),
        ("knormpress/x.jsonl", '["x"]', "line 1.*'x'"),
        ("knormpress/x.jsonl", "null", "line 1.*None"),
        ("knormpress/x.jsonl", "[" * 100_000, "line 1"),
    ],
    ids=lambda value: value[:20],
)
def test_a_broken_file_is_an_error(tmp_path: Path, name: str, text: str, named: str) -> None:
    """What it held may be the very baseline."""
    write(tmp_path, name, text)
    with pytest.raises(KnormError, match=f"{Path(name).name}.*{named}") as caught:
        History.read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.json", "knormpress/x.jsonl"])
def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(KnormError, match="can't be read"):
        History.read(tmp_path)


def test_a_long_value_is_cut() -> None:
    assert shortened("x" * 160) == "x" * 160
    assert shortened("x" * 161) == "x" * 157 + "..."

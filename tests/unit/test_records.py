from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from knormpress.errors import KnormError
from knormpress.records import SCHEMA_VERSION, Record, Run, append_record, read_records
from tests.record_factory import make_record


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results" / "records.jsonl"


def as_json(record: Record) -> dict[str, Any]:
    fields = json.loads(record.model_dump_json())
    assert isinstance(fields, dict)
    return fields


def test_records_come_back_equal_and_in_order(path: Path) -> None:
    records = [make_record(0.9), make_record(0.7, plan=(1.0, 0.5), ttft_cold_s=1.5, prefill_chunk=256)]
    for record in records:
        append_record(path, record)
    assert list(read_records(path)) == records


def test_every_line_is_plain_json_even_with_a_figure_that_is_not_finite(path: Path) -> None:
    record = make_record()
    run = Run(ttft_s=math.inf, gaps_s=(math.nan, -math.inf))
    latency = record.latency.model_copy(update={"candidate": (run,)})
    append_record(path, record.model_copy(update={"latency": latency}))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    (read,) = read_records(path)
    (run,) = read.latency.candidate
    assert run.ttft_s == math.inf
    assert math.isnan(run.gaps_s[0])
    assert run.gaps_s[1] == -math.inf


def test_records_from_before_the_weights_were_timed_still_read(path: Path) -> None:
    record = make_record(weights_tpot_s=0.015)
    fields = as_json(record)
    assert fields["latency"].pop("weights_tpot_s") == 0.015
    path.parent.mkdir()
    path.write_text(json.dumps(fields))
    (read,) = read_records(path)
    assert read.latency.weights_tpot_s is None
    assert read.latency.baseline == record.latency.baseline


@pytest.mark.parametrize("name", ["维基 text", "line\u2028separator", "next\x85line", "tab\tand\nnewline"])
def test_names_of_any_kind_survive(path: Path, name: str) -> None:
    record = make_record(text_name=name)
    append_record(path, record)
    append_record(path, record)
    assert [read.text.name for read in read_records(path)] == [name, name]


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_kill_at_any_moment_leaves_the_old_file_whole(
    path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_record(path, make_record(0.9))
    before = path.read_bytes()

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if moment == "write":
        monkeypatch.setattr(Record, "model_dump_json", killed)
    elif moment == "fsync":
        monkeypatch.setattr(os, "fsync", killed)
    else:
        monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        append_record(path, make_record(0.7))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_the_file_is_never_written_in_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill just before the rename, with no cleanup, would leave the old file and, beside it, a complete new one."""
    append_record(path, make_record(0.9))
    before = path.read_bytes()
    seen: list[tuple[bytes, bytes]] = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        seen.append((target.read_bytes(), self.read_bytes()))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    append_record(path, make_record(0.7))
    ((old, new),) = seen
    assert old == before
    assert new == path.read_bytes()
    assert len(list(read_records(path))) == 2


def test_a_file_cut_in_half_is_named_and_left_as_it_is(path: Path) -> None:
    append_record(path, make_record(0.9))
    first = len(path.read_bytes())
    append_record(path, make_record(0.7))
    cut = path.read_bytes()[: first + 400]
    path.write_bytes(cut)
    with pytest.raises(KnormError, match=r"records\.jsonl line 2 is not a whole record.*--fresh$") as caught:
        list(read_records(path))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == cut


def test_whole_records_before_the_cut_are_given_first(path: Path) -> None:
    append_record(path, make_record(0.9))
    path.write_bytes(path.read_bytes() + b'{"schema_version":2,')
    records = read_records(path)
    assert next(records).policy.keep_ratio == 0.9
    with pytest.raises(KnormError, match="line 2"):
        next(records)


def test_a_cut_line_does_not_swallow_the_record_appended_after_it(path: Path) -> None:
    append_record(path, make_record(0.9))
    cut = path.read_bytes()[:400]
    path.write_bytes(cut)
    append_record(path, make_record(0.7))
    assert path.read_bytes().startswith(cut + b"\n")
    lines = path.read_bytes().splitlines()
    assert Record.model_validate_json(lines[1]) == make_record(0.7)
    with pytest.raises(KnormError, match="line 1"):
        list(read_records(path))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"loss": 0.5}', "created: Field required"),
        ("[1, 2, 3]", "the line: Input should be an object"),
        ("keep_ratio,ttft", "the line: Invalid JSON"),
        ("\ufeff{}", "the line: Invalid JSON"),
    ],
)
def test_a_foreign_file_is_refused_in_one_line(path: Path, text: str, named: str) -> None:
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(KnormError, match=f"line 1 is not a whole record of schema version 2 .{named}") as caught:
        list(read_records(path))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_text_are_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    with pytest.raises(KnormError, match="line 1 is not a whole record"):
        list(read_records(path))


def test_another_schema_version_is_named(path: Path) -> None:
    path.parent.mkdir()
    fields = as_json(make_record()) | {"schema_version": SCHEMA_VERSION + 1, "new_field": 1}
    path.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(KnormError, match="its schema_version is 3"):
        list(read_records(path))


def test_an_unknown_field_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps(as_json(make_record()) | {"temperature": 1.0}), encoding="utf-8")
    with pytest.raises(KnormError, match="temperature: Extra inputs are not permitted"):
        list(read_records(path))


def test_empty_lines_are_passed_over(path: Path) -> None:
    append_record(path, make_record())
    path.write_bytes(b"\n" + path.read_bytes() + b"\n  \r\n")
    assert len(list(read_records(path))) == 1


def test_a_file_that_is_not_there_is_named(path: Path) -> None:
    with pytest.raises(KnormError, match=r"no records can be read from .*records\.jsonl \(No such file"):
        list(read_records(path))


@pytest.mark.skipif(sys.platform == "win32", reason="there processes don't take turns")
def test_two_processes_lose_no_record(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    code = (
        "import sys; from pathlib import Path; from knormpress.records import append_record\n"
        "from tests.record_factory import make_record\n"
        "for seed in range(15): append_record(Path(sys.argv[1]), make_record(seed=seed))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(2)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    assert len(list(read_records(path))) == 30

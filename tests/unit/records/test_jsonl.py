"""Files of records: whole at every moment, read back as they were, and refused in one line where they are broken."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from knormpress.errors import KnormError
from knormpress.records.figures import Run
from knormpress.records.jsonl import append_record, read_entries, read_records
from knormpress.records.schema import SCHEMA_VERSION, Record
from tests.entry_factory import make_entry, make_tasks
from tests.record_factory import make_record

ROOT = Path(__file__).parents[3]
LOCK = ".knormpress.lock"


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


def test_records_from_before_there_were_device_maps_are_read(path: Path) -> None:
    record = make_record()
    fields = as_json(record)
    del fields["environment"]["device_map"]
    path.parent.mkdir()
    path.write_text(json.dumps(fields) + "\n", encoding="utf-8")
    assert list(read_records(path)) == [record]


def test_records_from_before_there_were_ways_are_read(path: Path) -> None:
    record = make_record()
    fields = as_json(record)
    del fields["conditions"]["candidate_chunk"], fields["conditions"]["reused_tokens"]
    path.parent.mkdir()
    path.write_text(json.dumps(fields) + "\n", encoding="utf-8")
    assert list(read_records(path)) == [record]


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
    assert {file.name for file in path.parent.iterdir()} <= {path.name, LOCK}


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


def refused(path: Path, named: str) -> str:
    """The one line that the records of ``path`` are refused with, which has to match ``named``."""
    with pytest.raises(KnormError, match=named) as caught:
        list(read_records(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_cut_in_half_is_named_and_left_as_it_is(path: Path) -> None:
    append_record(path, make_record(0.9))
    first = len(path.read_bytes())
    append_record(path, make_record(0.7))
    cut = path.read_bytes()[: first + 400]
    path.write_bytes(cut)
    records = read_records(path)
    assert next(records).policy.keep_ratio == 0.9
    with pytest.raises(KnormError, match=r"records\.jsonl line 2"):
        next(records)
    assert "--fresh" in refused(path, r"records\.jsonl line 2")
    assert path.read_bytes() == cut


def test_a_cut_line_does_not_swallow_the_record_appended_after_it(path: Path) -> None:
    append_record(path, make_record(0.9))
    cut = path.read_bytes()[:400]
    path.write_bytes(cut)
    append_record(path, make_record(0.7))
    assert path.read_bytes().startswith(cut + b"\n")
    assert Record.model_validate_json(path.read_bytes().splitlines()[1]) == make_record(0.7)
    refused(path, "line 1")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{"loss": 0.5}', "created"),
        (b"[1, 2, 3]", "object"),
        (b"keep_ratio,ttft", "JSON"),
        (b"\xef\xbb\xbf{}", "JSON"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "JSON"),
    ],
)
def test_a_foreign_file_is_refused(path: Path, content: bytes, named: str) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    refused(path, f"line 1 .*schema version {SCHEMA_VERSION}.*{named}")
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"schema_version": SCHEMA_VERSION + 1, "new_field": 1}, f"schema_version is {SCHEMA_VERSION + 1}"),
        ({"temperature": 1.0}, "temperature"),
        ({"created": None}, "created"),
    ],
)
def test_a_record_of_another_form_is_refused(path: Path, fields: dict[str, object], named: str) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps(as_json(make_record()) | fields), encoding="utf-8")
    refused(path, named)


def test_empty_lines_are_passed_over(path: Path) -> None:
    append_record(path, make_record())
    path.write_bytes(b"\n" + path.read_bytes() + b"\n  \r\n")
    assert len(list(read_records(path))) == 1


def test_a_file_that_is_not_there_is_named(path: Path) -> None:
    refused(path, r"records\.jsonl .*No such file")


def test_whoever_appends_waits_for_the_one_who_does(path: Path) -> None:
    path.parent.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with FileLock(path.parent / LOCK):
            waiting = pool.submit(append_record, path, make_record())
            assert wait([waiting], timeout=0.2).not_done
            assert not path.exists()
        waiting.result(timeout=60)
    assert list(read_records(path)) == [make_record()]


WRITER = """
import sys
from pathlib import Path
from knormpress.records.jsonl import append_record
from tests.record_factory import make_record

records = [make_record(seed=seed, method=sys.argv[2]) for seed in range(15)]
print("ready", flush=True)
sys.stdin.readline()
for record in records:
    append_record(Path(sys.argv[1]), record)
"""


def test_two_processes_that_append_at_once_lose_no_record(path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*command, name], cwd=ROOT, **pipes) for name in "ab"]
    # They begin together, whichever was ready first.
    assert [writer.stdout.readline() for writer in writers if writer.stdout] == ["ready\n"] * 2
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=120)
    assert [writer.returncode for writer in writers] == [0, 0]
    for name in "ab":
        written = [record for record in read_records(path) if record.policy.method == name]
        assert written == [make_record(seed=seed, method=name) for seed in range(15)]


def test_a_file_of_entries_is_told_from_one_of_records(path: Path) -> None:
    entries = [make_entry(parts=()).model_copy(update={"lm_eval": make_tasks(right)}) for right in (40, 30)]
    for entry in entries:
        append_record(path, entry)
    found = read_entries(path)
    assert found is not None
    assert list(found) == entries
    other = path.with_name("other.jsonl")
    assert read_entries(other) is None
    for text in ("", "[]", "broken", make_record().model_dump_json()):
        other.write_text(text, encoding="utf-8")
        assert read_entries(other) is None


def test_an_entry_without_tasks_of_the_harness_is_read_and_a_broken_one_refused(path: Path) -> None:
    """Those of earlier versions have none."""
    old = json.loads(make_entry().model_dump_json())
    del old["lm_eval"]
    path.parent.mkdir()
    path.write_text(json.dumps(old), encoding="utf-8")
    found = read_entries(path)
    assert found is not None
    assert [entry.lm_eval for entry in found] == [None]
    path.write_text(json.dumps(old) + "\n" + '{"run": 1}', encoding="utf-8")
    broken = read_entries(path)
    assert broken is not None
    with pytest.raises(KnormError, match="line 2 is not a complete entry"):
        list(broken)

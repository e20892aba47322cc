"""Which stored run is the baseline, and storages that are broken."""

from __future__ import annotations

import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from knormpress.errors import KnormError
from knormpress.history import History, judge_commits, judge_newest, store
from knormpress.records import Entry
from knormpress.verdicts import THRESHOLDS, Verdict
from tests.entry_factory import make_entry


def git(*arguments: str, folder: Path) -> str:
    command = ["git", "-c", "user.name=n", "-c", "user.email=n@example.org", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Four commits in a line, oldest first; the last is checked out."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git("init", "-q", folder=folder)
    commits = []
    for number in range(4):
        git("commit", "-q", "--allow-empty", "-m", str(number), folder=folder)
        commits.append(git("rev-parse", "HEAD", folder=folder))
    monkeypatch.chdir(folder)
    return commits


def verdict(history: list[Entry], now: Entry) -> Verdict:
    return History(tuple(history)).verdict([now], THRESHOLDS)


def test_the_nearest_ancestor_with_data_is_the_baseline(line: list[str]) -> None:
    stored = [make_entry(run=f"run-{n}", commit=commit) for n, commit in enumerate(line[:2])]
    found = verdict(stored, make_entry(run="now", commit=line[3]))
    assert found.word == "ok"
    assert found.reason.endswith(f"against {line[1][:12]}")


def test_a_clean_commit_is_compared_with_itself_only_for_want_of_another(line: list[str]) -> None:
    own = make_entry(run="earlier", commit=line[3])
    now = make_entry(run="now", commit=line[3])
    assert verdict([own], now).reason.endswith(f"against {line[3][:12]}")
    assert verdict([own, make_entry(run="older", commit=line[0])], now).reason.endswith(f"against {line[0][:12]}")


def test_a_dirty_tree_is_compared_with_its_own_commit_and_is_no_baseline(line: list[str]) -> None:
    clean, dirty = make_entry(run="clean", commit=line[3]), make_entry(run="dirty", commit=line[3], dirty=True)
    older = make_entry(run="older", commit=line[0])
    assert verdict([older, clean], dirty).reason.endswith(f"against {line[3][:12]}")
    found = verdict([dirty], make_entry(run="now", commit=line[3]))
    assert (found.word, found.reason) == ("no-baseline", "all 1 earlier runs failed, regressed or were dirty")


@pytest.mark.parametrize("spoilt", [{"passed": False}, {"verdicts": {"tpot": "regressed"}}, {"dirty": True}])
def test_a_bad_run_never_becomes_the_baseline(line: list[str], spoilt: dict[str, object]) -> None:
    sound, bad = make_entry(run="0", commit=line[0]), make_entry(run="1", commit=line[1], **spoilt)
    assert verdict([sound, bad], make_entry(run="now", commit=line[3])).reason.endswith(f"against {line[0][:12]}")


def test_a_commit_of_another_branch_is_no_ancestor(line: list[str]) -> None:
    git("checkout", "-q", "--detach", line[0], folder=Path.cwd())
    git("commit", "-q", "--allow-empty", "-m", "aside", folder=Path.cwd())
    aside = git("rev-parse", "HEAD", folder=Path.cwd())
    found = verdict([make_entry(commit=line[2])], make_entry(run="now", commit=aside))
    assert (found.word, found.reason) == ("no-baseline", f"none of 1 stored runs is of an ancestor of {aside[:12]}")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"fingerprint": "e" * 64}, "model was ffff"),
        ({"dtype": "bfloat16"}, "dtype was float32 and is bfloat16"),
        ({"method": "other"}, r"method was KnormPress\(keep_ratio=0.9\) and is other"),
        ({"prompt_tokens": 2048}, "prompt_tokens was 1024 and is 2048"),
    ],
)
def test_other_conditions_are_incomparable(line: list[str], changed: dict[str, object], named: str) -> None:
    found = verdict([make_entry(commit=line[0])], make_entry(run="now", commit=line[3], **changed))
    assert found.word == "incomparable"
    assert re.match(named, found.reason)


def test_the_same_machine_goes_before_a_nearer_commit(line: list[str]) -> None:
    here = make_entry(run="here", commit=line[0])
    there = make_entry(run="there", commit=line[2], device_name="another processor")
    now = make_entry(run="now", commit=line[3])
    assert verdict([here, there], now).reason.endswith(f"against {line[0][:12]}")
    assert f"against {line[2][:12]} on another machine" in verdict([there], now).reason


def test_new_and_first(line: list[str]) -> None:
    now = make_entry(run="now", commit=line[3])
    assert verdict([], now).word == "no-baseline"
    assert verdict([make_entry(test="tests/test_y.py::test_y")], now).word == "new"


def test_runs_of_the_baseline_are_pooled(line: list[str]) -> None:
    stored = [make_entry(run=str(n), commit=line[0], seed=n) for n in range(3)]
    assert verdict(stored, make_entry(run="now", commit=line[3])).reason.endswith(f"against {line[0][:12]}, 3 runs")


def test_without_git_the_newest_run_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stored = [make_entry(run=str(n), commit=None, created=f"2026-0{n}-01T00:00:00+00:00") for n in (1, 2)]
    found = verdict(stored, make_entry(run="now", commit=None))
    assert found.reason.endswith("against no commit, 2 runs (no git to tell the ancestor)")


def test_a_shallow_clone_that_lacks_the_baseline_is_an_error(line: list[str], tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git("clone", "-q", "--depth", "1", Path.cwd().as_uri(), str(clone), folder=tmp_path)
    stored, now = [make_entry(commit=line[0])], make_entry(run="now", commit=line[3])
    assert verdict(stored, now).word == "ok"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(clone)
        with pytest.raises(KnormError, match=r"this clone is shallow, .* fetch-depth: 0"):
            verdict(stored, now)


def test_what_is_stored_is_read_back(tmp_path: Path) -> None:
    entries = [make_entry(run=run, test=f"t.py::{n}") for run in ("a", "b") for n in range(2)]
    for entry in entries:
        store(tmp_path, entry)
    assert sorted(History.read(tmp_path).entries, key=lambda entry: (entry.run, entry.test)) == entries
    assert History.read(tmp_path / "nothing").entries == ()


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    entries = [make_entry(run=f"run-{n % 3}", test=f"t.py::{n}", parts=("memory",)) for n in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda entry: store(tmp_path, entry), entries))
    assert len(History.read(tmp_path).entries) == 24


def test_pytest_benchmarks_own_files_are_read(tmp_path: Path) -> None:
    entry = make_entry(run="x")
    benchmarks = [{"extra_info": {"knormpress": entry.model_dump(mode="json")}}, {"extra_info": {}}, {"other": 1}]
    file = tmp_path / "Linux-CPython" / "0001_x.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"benchmarks": benchmarks}))
    store(tmp_path, entry)
    (tmp_path / "notes.json").write_text('{"something": "else"}')
    history = History.read(tmp_path)
    assert history.entries == (entry,)
    assert history.notes == (f"{tmp_path / 'notes.json'} is no file of pytest-benchmark and was passed over",)


@pytest.mark.parametrize("name", ["0001_x.json", "knormpress/x.jsonl"])
def test_a_file_cut_short_is_an_error(tmp_path: Path, name: str) -> None:
    text = make_entry().model_dump_json()
    (tmp_path / "knormpress").mkdir()
    (tmp_path / name).write_text(text[: len(text) // 2])
    with pytest.raises(KnormError, match=r"is no whole JSON .* a baseline may be lost with it") as caught:
        History.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_entry_with_a_field_too_few_is_an_error(tmp_path: Path) -> None:
    data = json.loads(make_entry().model_dump_json())
    del data["model"]
    (tmp_path / "knormpress").mkdir()
    (tmp_path / "knormpress" / "x.jsonl").write_text(json.dumps(data))
    with pytest.raises(KnormError, match=r"x.jsonl line 1 is not a whole entry of schema version 2 \(model:"):
        History.read(tmp_path)


def test_another_schema_version_is_incomparable(tmp_path: Path, line: list[str]) -> None:
    data = json.loads(make_entry(commit=line[0]).model_dump_json()) | {"schema_version": 1}
    (tmp_path / "knormpress").mkdir()
    (tmp_path / "knormpress" / "x.jsonl").write_text(json.dumps(data))
    found = History.read(tmp_path).verdict([make_entry(run="now", commit=line[3])], THRESHOLDS)
    assert (found.word, found.reason) == (
        "incomparable",
        "stored by schema version 1, this is 2: measure the baseline again",
    )


def test_the_newest_run_and_what_has_vanished(line: list[str]) -> None:
    early, late = "2026-01-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00"
    stored = [
        make_entry(run="a", test="t.py::kept", commit=line[0], created=early),
        make_entry(run="a", test="t.py::gone", commit=line[0], created=early),
        make_entry(run="b", test="t.py::kept", commit=line[3], created=late),
    ]
    verdicts = judge_newest(History(tuple(stored)), THRESHOLDS)
    assert {found.test: found.word for found in verdicts} == {"t.py::kept": "ok", "t.py::gone": "missing"}
    with pytest.raises(KnormError, match="no run is stored; make one with"):
        judge_newest(History(()), THRESHOLDS)


def test_two_commits(line: list[str]) -> None:
    stored = [
        make_entry(run="1", commit=line[0], noise=0.001),
        make_entry(run="2", commit=line[3], noise=0.001, tpot=40.0),
        make_entry(run="3", commit=line[3], noise=0.001, tpot=40.0, seed=1),
        make_entry(run="4", commit=line[0], noise=0.001, seed=1),
        make_entry(run="4", test="t.py::gone", commit=line[0]),
    ]
    verdicts = judge_commits(History(tuple(stored)), line[0], line[3], THRESHOLDS)
    assert {found.test: found.word for found in verdicts} == {
        "tests/test_x.py::test_x": "regressed",
        "t.py::gone": "missing",
    }
    assert "2 runs" in verdicts[0].reason
    with pytest.raises(KnormError, match="no test of bbbbbbbbbbbb has stored an entry"):
        judge_commits(History(tuple(stored)), line[0], "b" * 40, THRESHOLDS)


def test_over_a_merge_the_nearer_side_is_the_baseline(line: list[str]) -> None:
    """A side branch of many commits does not stand before the parent of the merge."""
    here = Path.cwd()
    git("checkout", "-q", "-b", "side", line[0], folder=here)
    side = []
    for number in range(3):
        git("commit", "-q", "--allow-empty", "-m", f"side {number}", folder=here)
        side.append(git("rev-parse", "HEAD", folder=here))
    git("checkout", "-q", "--detach", line[3], folder=here)
    git("merge", "-q", "--no-ff", "-m", "merge", "side", folder=here)
    now = make_entry(run="now", commit=git("rev-parse", "HEAD", folder=here))
    for far, near in ((side[0], line[3]), (side[1], line[3]), (line[1], side[2]), (line[0], side[0])):
        stored = [make_entry(run="far", commit=far), make_entry(run="near", commit=near)]
        assert verdict(stored, now).reason.endswith(f"against {near[:12]}")


def test_a_commit_never_stands_before_one_that_came_from_it(line: list[str]) -> None:
    """One commit off the oldest, merged: the oldest is two steps away by that side, and still older than the others."""
    here = Path.cwd()
    git("checkout", "-q", "-b", "side", line[0], folder=here)
    git("commit", "-q", "--allow-empty", "-m", "side", folder=here)
    git("checkout", "-q", "--detach", line[3], folder=here)
    git("merge", "-q", "--no-ff", "-m", "merge", "side", folder=here)
    now = make_entry(run="now", commit=git("rev-parse", "HEAD", folder=here))
    stored = [make_entry(run="old", commit=line[0]), make_entry(run="new", commit=line[1])]
    assert verdict(stored, now).reason.endswith(f"against {line[1][:12]}")


@pytest.mark.parametrize("text", ["5", '["x"]', "null"])
def test_a_line_that_is_no_entry_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "knormpress").mkdir()
    (tmp_path / "knormpress" / "x.jsonl").write_text(text)
    with pytest.raises(KnormError, match=r"x.jsonl line 1 is no entry but"):
        History.read(tmp_path)


@pytest.mark.parametrize("name", ["x.json", "knormpress/x.jsonl"])
def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(KnormError, match="can't be read"):
        History.read(tmp_path)


def spoilt(entry: Entry, **changed: object) -> Entry:
    assert entry.quality is not None
    documents = tuple(document.model_copy(update=changed) for document in entry.quality.documents)
    return entry.model_copy(update={"quality": entry.quality.model_copy(update={"documents": documents})})


@pytest.mark.parametrize("changed", [{"kl": float("nan")}, {"candidate_nll": (float("nan"),) * 256}])
def test_what_is_no_number_is_never_ok(line: list[str], changed: dict[str, object], tmp_path: Path) -> None:
    now, sound = make_entry(run="now", commit=line[3]), make_entry(run="0", commit=line[0])
    assert verdict([sound], spoilt(now, **changed)).word == "regressed"
    store(tmp_path, spoilt(sound, **changed))
    (read,) = History.read(tmp_path).entries
    found = {finding.metric: finding.word for finding in verdict([read], now).findings}
    assert (found["ppl"], found["kl"], found["bytes"]) == ("incomparable", "incomparable", "ok")


def test_times_and_bytes_that_are_no_number_are_incomparable(line: list[str]) -> None:
    now, sound = make_entry(run="now", commit=line[3]), make_entry(run="0", commit=line[0])
    assert sound.latency is not None
    assert sound.memory is not None
    runs = tuple(run.model_copy(update={"ttft_s": float("nan")}) for run in sound.latency.candidate)
    broken = {
        "latency": sound.latency.model_copy(update={"candidate": runs}),
        "memory": sound.memory.model_copy(update={"candidate_cache_bytes": 0}),
    }
    found = {f.metric: f.word for f in verdict([sound.model_copy(update=broken)], now).findings}
    assert (found["ttft"], found["bytes"], found["tpot"]) == ("incomparable", "incomparable", "ok")


def test_a_loss_in_too_few_runs_for_an_interval_is_noise(line: list[str]) -> None:
    """One pair may be anything: it neither fails a test nor is it praised."""
    for tpot in (150.0, -60.0):
        stored, now = make_entry(commit=line[0], rounds=1), make_entry(run="now", commit=line[3], rounds=1, tpot=tpot)
        found = {finding.metric: finding for finding in verdict([stored], now).findings}
        assert found["tpot"].word == "noise"
        assert "too few runs for an interval" in found["tpot"].reason

"""Which of the stored runs is the baseline of a run, and the verdicts on what is stored."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from knormpress.compare.stored import judge_commits, judge_entries, judge_newest, vanished_tests
from knormpress.compare.verdicts import THRESHOLDS, Verdict
from knormpress.errors import KnormError
from knormpress.records.history import History
from knormpress.records.schema import Entry
from tests.entry_factory import make_entry
from tests.repository import Repository, run_git

EARLY, LATE = "2026-01-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return Repository(tmp_path_factory.mktemp("stored") / "repository")


@pytest.fixture(scope="module")
def line(repository: Repository) -> list[str]:
    """Four commits in a line, oldest first."""
    return repository.line(4)


class Judge:
    """Judges an entry by stored ones, in the test's repository."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository.folder

    def __call__(self, stored: list[Entry], now: Entry, base: str | None = None) -> Verdict:
        return judge_entries(History(tuple(stored), repository=self.repository), [now], THRESHOLDS, base)

    def baseline(self, stored: list[Entry], now: Entry, base: str | None = None) -> str:
        """The commit that the entry was compared with, shortened, and what else is said of the baseline."""
        where = re.search(r"\b[0-9a-f]{12}\b.*", self(stored, now, base).reason)
        assert where
        return where[0]


@pytest.fixture(scope="module")
def verdict(repository: Repository) -> Judge:
    return Judge(repository)


def test_the_nearest_ancestor_with_data_is_the_baseline(verdict: Judge, line: list[str]) -> None:
    stored = [make_entry(run=f"run-{n}", commit=commit) for n, commit in enumerate(line[:2])]
    now = make_entry(run="now", commit=line[3])
    assert verdict(stored, now).word == "ok"
    assert verdict.baseline(stored, now) == line[1][:12]


def test_a_clean_commit_is_compared_with_itself_only_for_want_of_another(verdict: Judge, line: list[str]) -> None:
    own, older = make_entry(run="earlier", commit=line[3]), make_entry(run="older", commit=line[0])
    now = make_entry(run="now", commit=line[3])
    assert verdict.baseline([own], now) == line[3][:12]
    assert verdict.baseline([own, older], now) == line[0][:12]


def test_a_dirty_tree_is_compared_with_its_own_commit_and_is_no_baseline(verdict: Judge, line: list[str]) -> None:
    clean, dirty = make_entry(run="clean", commit=line[3]), make_entry(run="dirty", commit=line[3], dirty=True)
    older = make_entry(run="older", commit=line[0])
    assert verdict.baseline([older, clean], dirty) == line[3][:12]
    judged = verdict([dirty], make_entry(run="now", commit=line[3]))
    assert judged.word == "no-baseline"


@pytest.mark.parametrize("spoilt", [{"passed": False}, {"verdicts": {"tpot": "regressed"}}, {"dirty": True}])
def test_a_bad_run_never_becomes_the_baseline(verdict: Judge, line: list[str], spoilt: dict[str, object]) -> None:
    sound, bad = make_entry(run="0", commit=line[0]), make_entry(run="1", commit=line[1], **spoilt)
    assert verdict.baseline([sound, bad], make_entry(run="now", commit=line[3])) == line[0][:12]


def test_a_commit_of_another_branch_is_no_baseline(verdict: Judge, line: list[str], repository: Repository) -> None:
    aside = repository.commit(line[0])
    judged = verdict([make_entry(commit=line[2])], make_entry(run="now", commit=aside))
    assert judged.word == "no-baseline"
    assert f"ancestor of {aside[:12]}" in judged.reason


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"fingerprint": "e" * 64}, ("model", "fff", "eee")),
        ({"dtype": "bfloat16"}, ("dtype", "float32", "bfloat16")),
        ({"method": "other"}, ("method", "KnormPress(keep_ratio=0.9)", "other")),
        ({"prompt_tokens": 2048}, ("prompt_tokens", "1024", "2048")),
    ],
)
def test_other_conditions_are_incomparable(
    verdict: Judge, line: list[str], changed: dict[str, object], named: tuple[str, ...]
) -> None:
    judged = verdict([make_entry(commit=line[0])], make_entry(run="now", commit=line[3], **changed))
    assert judged.word == "incomparable"
    assert [part for part in named if part not in judged.reason] == []


def test_a_condition_that_only_one_side_has_is_incomparable(verdict: Judge, line: list[str]) -> None:
    now = make_entry(run="now", commit=line[3])
    more = now.model_copy(update={"conditions": {**now.conditions, "prefill_chunk": 256}})
    for old, new in ((now, more), (more, now)):
        judged = verdict([old.model_copy(update={"run": "old"})], new)
        assert judged.word == "incomparable"
        assert "prefill_chunk" in judged.reason


def test_the_same_machine_goes_before_a_nearer_commit(verdict: Judge, line: list[str]) -> None:
    here = make_entry(run="here", commit=line[0])
    there = make_entry(run="there", commit=line[2], device_name="another processor")
    now = make_entry(run="now", commit=line[3])
    assert verdict.baseline([here, there], now) == line[0][:12]
    assert verdict.baseline([there], now).startswith(f"{line[2][:12]} on another machine")


def test_new_and_first(verdict: Judge, line: list[str]) -> None:
    now = make_entry(run="now", commit=line[3])
    assert verdict([], now).word == "no-baseline"
    assert verdict([make_entry(test="tests/test_y.py::test_y")], now).word == "new"


def test_the_newest_runs_of_the_baseline_are_pooled(verdict: Judge, line: list[str]) -> None:
    now = make_entry(run="now", commit=line[3])
    days = [f"2026-01-0{n + 1}T00:00:00+00:00" for n in range(7)]
    stored = [make_entry(run=str(n), commit=line[0], seed=n, created=day) for n, day in enumerate(days)]
    assert verdict.baseline(stored[:3], now) == f"{line[0][:12]}, 3 runs"
    assert verdict.baseline(stored, now) == f"{line[0][:12]}, 5 runs"
    # The two oldest do not count.
    spoilt = [make_entry(run=str(n), commit=line[0], tpot=300.0, created=day) for n, day in enumerate(days[:2])]
    assert verdict([*spoilt, *stored[2:]], now) == verdict(stored, now)


def test_a_base_that_is_given_stands_before_the_nearest(verdict: Judge, line: list[str]) -> None:
    stored = [make_entry(run=f"run-{n}", commit=commit) for n, commit in enumerate(line[:2])]
    now = make_entry(run="now", commit=line[3])
    assert verdict.baseline(stored, now, base=line[0]) == line[0][:12]
    judged = verdict(stored, now, base=line[2])
    assert judged.word == "no-baseline"
    assert line[2][:12] in judged.reason


def test_without_git_the_newest_runs_stand() -> None:
    stored = [make_entry(run=str(n), commit=None, created=f"2026-0{n}-01T00:00:00+00:00") for n in (1, 2)]
    judged = judge_entries(History(tuple(stored)), [make_entry(run="now", commit=None)], THRESHOLDS)
    assert judged.word == "ok"
    assert "2 runs" in judged.reason
    assert "no git" in judged.reason


def test_a_shallow_clone_that_lacks_the_baseline_is_an_error(
    line: list[str], repository: Repository, tmp_path: Path
) -> None:
    repository.git("update-ref", "HEAD", line[3])
    clone = tmp_path / "clone"
    run_git("clone", "-q", "--depth", "1", repository.folder.as_uri(), str(clone))
    history = History((make_entry(commit=line[0]),), repository=clone)
    with pytest.raises(KnormError, match=r"shallow.*fetch-depth: 0"):
        judge_entries(history, [make_entry(run="now", commit=line[3])], THRESHOLDS)


def test_another_schema_version_is_incomparable() -> None:
    now = make_entry()
    judged = judge_entries(History((), outdated={now.test: 1}), [now], THRESHOLDS)
    assert judged.word == "incomparable"
    assert "version 1" in judged.reason


def test_the_newest_run_and_what_has_vanished(line: list[str], repository: Repository) -> None:
    stored = [
        make_entry(run="a", test="t.py::kept", commit=line[0], created=EARLY),
        make_entry(run="a", test="t.py::gone", commit=line[0], created=EARLY),
        make_entry(run="b", test="t.py::kept", commit=line[3], created=LATE),
    ]
    verdicts = judge_newest(History(tuple(stored), repository=repository.folder), THRESHOLDS)
    assert {judged.test: judged.word for judged in verdicts} == {"t.py::kept": "ok", "t.py::gone": "missing"}
    with pytest.raises(KnormError, match="--knorm-save"):
        judge_newest(History(()), THRESHOLDS)


@pytest.mark.parametrize(
    ("own", "word"),
    [
        ({"tpot": "noise", "throughput": "noise", "tpot_s": "incomparable", "bytes": "ok"}, "noise"),
        ({"tpot": "regressed"}, "regressed"),
        ({}, "regressed"),
    ],
)
def test_a_time_regressed_only_if_it_did_so_in_its_own_run(
    line: list[str], repository: Repository, own: dict[str, str], word: str
) -> None:
    before = make_entry(run="a", commit=line[0], created=EARLY, noise=0.001, tpot=0.0)
    now = make_entry(run="b", commit=line[3], created=LATE, noise=0.001, tpot=30.0, verdicts=own)
    (judged,) = judge_newest(History((before, now), repository=repository.folder), THRESHOLDS)
    assert judged.word == word
    assert ("noise in its own run" in judged.reason) == (word == "noise")
    larger = make_entry(run="b", commit=line[3], created=LATE, keep_ratio=1.0, method=before.method, verdicts=own)
    (judged,) = judge_newest(History((before, larger), repository=repository.folder), THRESHOLDS)
    assert next(one.word for one in judged.findings if one.metric == "bytes") == "regressed", (
        "exact figures do not vary"
    )


def test_only_expected_tests_of_the_run_before_have_vanished() -> None:
    stored = [
        make_entry(run="old", test="t.py::older", created="2025-01-01T00:00:00+00:00"),
        *(make_entry(run="a", test=f"t.py::{name}", created=EARLY) for name in ("kept", "gone", "elsewhere")),
        make_entry(run="b", test="t.py::kept", created=LATE),
    ]
    history = History(tuple(stored))
    (missing,) = vanished_tests(history, "b", ["t.py::kept"], lambda test: "elsewhere" not in test)
    assert (missing.test, missing.word) == ("t.py::gone", "missing")
    assert EARLY[:10] in missing.reason
    assert vanished_tests(History(tuple(stored[4:])), "b", [], lambda _: True) == []


def test_two_commits() -> None:
    base, head = "a" * 40, "b" * 40
    stored = [
        make_entry(run="1", commit=base, noise=0.001),
        make_entry(run="2", commit=head, noise=0.001, tpot=40.0),
        make_entry(run="3", commit=head, noise=0.001, tpot=40.0, seed=1),
        make_entry(run="4", commit=base, noise=0.001, seed=1),
        make_entry(run="4", test="t.py::gone", commit=base),
    ]
    history = History(tuple(stored))
    verdicts = judge_commits(history, base, head, THRESHOLDS)
    words = {"tests/test_x.py::test_x": "regressed", "t.py::gone": "missing"}
    assert {judged.test: judged.word for judged in verdicts} == words
    assert "2 runs" in verdicts[0].reason
    with pytest.raises(KnormError, match="c" * 12):
        judge_commits(history, base, "c" * 40, THRESHOLDS)

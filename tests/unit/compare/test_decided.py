"""A pinned commit, accepted losses and renamed tests: how they are decided, and what they change in a verdict."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from knormpress.compare.decided import accept, pin, rename
from knormpress.compare.stored import judge_entries
from knormpress.compare.verdicts import THRESHOLDS, Verdict
from knormpress.errors import KnormError
from knormpress.records.decisions import Acceptance, Decision, Pin
from knormpress.records.history import History
from knormpress.records.schema import Entry
from tests.entry_factory import make_entry
from tests.repository import Repository

TEST = make_entry().test


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return Repository(tmp_path_factory.mktemp("decided") / "repository")


@pytest.fixture(scope="module")
def line(repository: Repository) -> list[str]:
    """Eight commits in a line, oldest first."""
    return repository.line(8)


class Past:
    """Runs of one test, one for each commit, whose cache takes so many % more bytes; judged as they come."""

    def __init__(self, repository: Repository, *decisions: Decision) -> None:
        self.history = History((), repository=repository.folder, decisions=decisions)

    def run(self, commit: str | None, more: float, **how: object) -> Verdict:
        number = len(self.history.entries)
        entry = make_entry(
            run=str(number), commit=commit, created=f"2026-01-{number + 1:02}", parts=("memory", "quality"), **how
        )
        assert entry.memory
        grown = round(entry.memory.baseline_cache_bytes * 0.5 * (1 + more / 100))
        memory = {"candidate_cache_bytes": grown, "candidate_decoded_bytes": None}
        entry = entry.model_copy(update={"memory": entry.memory.model_copy(update=memory)})
        verdict = judge_entries(self.history, [entry], THRESHOLDS)
        words = {finding.metric: finding.word for finding in verdict.findings}
        self._add((entry.model_copy(update={"verdicts": words}),), ())
        return verdict

    def accept(self, metric: str = "bytes") -> list[Acceptance]:
        made = accept(self.history, TEST, metric, "it is worth it", THRESHOLDS)
        self._add((), made)
        return made

    def _add(self, entries: Sequence[Entry], decisions: Sequence[Decision]) -> None:
        old = self.history
        both = (*old.entries, *entries), (*old.decisions, *decisions)
        self.history = History(both[0], repository=old.repository, decisions=both[1])


def words(verdict: Verdict) -> dict[str, str]:
    return {finding.metric: finding.word for finding in verdict.findings}


def test_losses_within_the_threshold_add_up_unseen_without_a_pin(repository: Repository, line: list[str]) -> None:
    past = Past(repository)
    assert [past.run(commit, 0.3 * n).word for n, commit in enumerate(line[:5])] == ["no-baseline", *["ok"] * 4]


def test_a_loss_against_the_pin_fails_and_says_so(repository: Repository, line: list[str]) -> None:
    past = Past(repository, Pin(commit=line[0]))
    found = [past.run(commit, 0.3 * n) for n, commit in enumerate(line[:3])]
    assert [verdict.word for verdict in found] == ["no-baseline", "ok", "regressed"]
    assert f"bytes +0.6 %, allowed 0.5 %, since the pinned {line[0][:12]}" in found[2].reason
    assert f"against {line[1][:12]}" in found[2].reason
    # What failed is no reference, so the next is not compared with it.
    assert f"against {line[1][:12]}" in past.run(line[3], 0.6).reason


def test_a_loss_against_the_nearest_ancestor_is_told_as_before(repository: Repository, line: list[str]) -> None:
    past = Past(repository, Pin(commit=line[0]))
    past.run(line[0], 0)
    past.run(line[1], 0)
    assert "since" not in past.run(line[2], 5).reason


def test_a_pin_that_nothing_is_stored_of_is_told(repository: Repository, line: list[str]) -> None:
    past = Past(repository, Pin(commit=line[0]))
    past.run(line[1], 0)
    judged = past.run(line[2], 0)
    assert judged.word == "ok"
    assert f"not compared with the pinned {line[0][:12]}: no usable run" in judged.reason


def test_a_pin_is_the_reference_where_no_ancestor_has_data(repository: Repository, line: list[str]) -> None:
    aside = repository.commit(line[0])
    past = Past(repository, Pin(commit=aside))
    past.run(aside, 0)
    judged = past.run(line[1], 0)
    assert judged.word == "ok"
    assert words(judged) == {"bytes": "ok", "ppl": "ok", "kl": "ok"}
    assert f"only the pinned commit can be compared: against {aside[:12]}" in judged.reason
    assert past.run(repository.commit(line[0]), 5).word == "regressed"


def test_the_pin_counts_for_no_commit_that_was_asked_for(repository: Repository, line: list[str]) -> None:
    past = Past(repository, Pin(commit=line[0]))
    for n, commit in enumerate(line[:2]):
        past.run(commit, 0.3 * n)
    now = past.history.entries[-1].model_copy(update={"run": "now"})
    assert "pinned" not in judge_entries(past.history, [now], THRESHOLDS, line[1]).reason


def test_an_accepted_loss_is_failed_by_neither_ancestor_nor_pin(repository: Repository, line: list[str]) -> None:
    past = Past(repository, Pin(commit=line[0]))
    past.run(line[0], 0)
    assert past.run(line[1], 5).word == "regressed"
    (made,) = past.accept()
    assert (made.metric, made.entry.test, made.entry.quality) == ("bytes", TEST, None)
    assert (made.before, made.now) == ("23.59 MB", "24.77 MB")
    # The same commit again, the next, and those that have a sound reference of their own.
    for commit in (line[1], line[2], line[3]):
        judged = past.run(commit, 5)
        assert judged.word == "ok"
    assert "it is worth it" not in judged.reason, "its reference is at the accepted level itself"
    first = judge_entries(past.history, [past.history.entries[1].model_copy(update={"run": "x"})], THRESHOLDS)
    assert f"bytes as accepted at {line[1][:12]} by" in first.reason
    assert "it is worth it" in first.reason


def test_what_grows_on_from_the_accepted_level_fails(repository: Repository, line: list[str]) -> None:
    past = Past(repository, Pin(commit=line[0]))
    past.run(line[0], 0)
    past.run(line[1], 5)
    past.accept()
    assert [past.run(commit, more).word for commit, more in zip(line[2:4], (5.0, 5.4), strict=True)] == ["ok", "ok"]
    judged = past.run(line[4], 5.7)
    assert judged.word == "regressed"
    assert f"since it was accepted at {line[1][:12]}" in judged.reason


def test_without_a_pin_an_accepted_level_is_none(repository: Repository, line: list[str]) -> None:
    past = Past(repository)
    past.run(line[0], 0)
    past.run(line[1], 5)
    past.accept()
    grown = [past.run(commit, more).word for commit, more in zip(line[2:5], (5.4, 5.8, 6.2), strict=True)]
    assert grown == ["ok", "ok", "ok"]


@pytest.mark.parametrize("pinned", [False, True])
def test_later_runs_of_the_accepted_commit_stand_before_the_accepted_level(
    repository: Repository, line: list[str], pinned: bool
) -> None:
    past = Past(repository, *([Pin(commit=line[1])] if pinned else []))
    past.run(line[0], 0)
    past.run(line[1], 5)
    past.accept()
    assert past.run(line[1], 4.8).word == "ok"
    judged = past.run(line[2], 5.4)
    assert judged.word == "regressed"
    assert "accepted" not in judged.reason


def test_what_was_accepted_up_to_a_base_does_not_replace_its_runs(repository: Repository, line: list[str]) -> None:
    past = Past(repository)
    past.run(line[0], 0)
    past.run(line[1], 5)
    past.accept()
    base = repository.commit(line[1])
    past.run(base, 4.8)
    past.run(line[2], 5.4)
    now = past.history.entries[-1].model_copy(update={"run": "now"})
    assert judge_entries(past.history, [now], THRESHOLDS, base).word == "regressed"


def test_an_accepted_time_counts_on_its_own_machine_alone(repository: Repository, line: list[str]) -> None:
    days = (f"2026-01-{day:02}" for day in range(1, 9))

    def entry(commit: str, tpot: float, **how: object) -> Entry:
        return make_entry(run=(day := next(days)), created=day, commit=commit, tpot=tpot, noise=0.001, **how)

    before = entry(line[0], 0.0)
    lost = entry(line[1], 30.0, verdicts={"tpot": "regressed"})
    history = History((before, lost), repository=repository.folder)
    (made,) = accept(history, TEST, "tpot", "it is worth it", THRESHOLDS)
    history = History(history.entries, repository=repository.folder, decisions=(made,))
    assert words(judge_entries(history, [entry(line[2], 30.0)], THRESHOLDS))["tpot"] == "ok"
    judged = judge_entries(history, [entry(line[2], 30.0, device_name="another processor")], THRESHOLDS)
    assert words(judged)["tpot"] == "regressed"
    assert f"tpot was accepted at {line[1][:12]}, on another machine, so it is not applied" in judged.reason


def test_an_accepted_level_under_other_versions_is_told_of(repository: Repository, line: list[str]) -> None:
    before, lost = (
        make_entry(
            run=run, created=f"2026-01-0{run}", commit=line[int(run)], parts=("cost",), keep_ratio=ratio, method="m"
        )
        for run, ratio in (("0", 0.5), ("1", 0.9))
    )
    lost = lost.model_copy(update={"verdicts": {"moved": "regressed"}})
    history = History((before, lost), repository=repository.folder)
    made = accept(history, TEST, "moved", "it is worth it", THRESHOLDS)
    history = History(history.entries, repository=repository.folder, decisions=tuple(made))
    environment = lost.environment.model_copy(update={"torch": "3.0", "git_commit": line[2]})
    now = lost.model_copy(update={"run": "now", "environment": environment})
    told = f"moved was accepted at {line[1][:12]}, under other versions, so it is not applied"
    assert told in judge_entries(history, [now], THRESHOLDS).reason
    assert "is not applied" not in judge_entries(history, [lost], THRESHOLDS).reason


def test_only_the_accepted_metric_moves(repository: Repository, line: list[str]) -> None:
    past = Past(repository)
    past.run(line[0], 0, ppl=1.0)
    assert words(past.run(line[1], 5, ppl=9.0)) == {"bytes": "regressed", "ppl": "regressed", "kl": "regressed"}
    past.accept()
    assert words(past.run(line[2], 5, ppl=9.0)) == {"bytes": "ok", "ppl": "regressed", "kl": "regressed"}


def test_what_was_accepted_on_another_branch_counts_only_there(repository: Repository, line: list[str]) -> None:
    past = Past(repository)
    past.run(line[0], 0)
    aside = repository.commit(line[0])
    past.run(aside, 5)
    past.accept()
    assert past.run(line[1], 5).word == "regressed"
    assert past.run(repository.commit(aside), 5).word == "ok"


def test_an_accepted_level_under_other_conditions_does_not_count(repository: Repository, line: list[str]) -> None:
    past = Past(repository)
    past.run(line[0], 0)
    past.run(line[0], 0, prompt_tokens=2048)
    past.run(line[1], 5)
    past.accept()
    assert past.run(line[2], 5, prompt_tokens=2048).word == "regressed"


def test_the_later_of_two_accepted_levels_holds_without_git_too(repository: Repository) -> None:
    past = Past(repository)
    for more in (5, 10):
        past.run(None, 0 if more == 5 else 5)
        assert past.run(None, more).word == "regressed"
        past.accept()
    assert past.run(None, 10).word == "ok"
    assert past.run(None, 11).word == "regressed"


def test_two_commits_are_compared_with_what_was_accepted_between_them(repository: Repository, line: list[str]) -> None:
    past = Past(repository)
    past.run(line[0], 0)
    past.run(line[1], 5)
    past.accept()
    now = past.history.entries[-1].model_copy(update={"run": "now"})
    assert judge_entries(past.history, [now], THRESHOLDS, line[0]).word == "ok"


def test_an_error_says_what_can_be_accepted(repository: Repository, line: list[str]) -> None:
    past = Past(repository)
    past.run(line[0], 0)
    past.run(line[1], 5)

    def refused(test: str, metric: str, why: str, *named: str) -> None:
        with pytest.raises(KnormError) as caught:
            accept(past.history, test, metric, why, THRESHOLDS)
        assert [part for part in named if part not in str(caught.value)] == []

    refused(TEST, "byte", "why", "'byte'", "decoded_bytes")
    refused(TEST, "bytes", " ", "--why")
    refused("t.py::none", "bytes", "why", "t.py::none", TEST)
    refused(TEST, "ppl", "why", "ppl lost nothing")
    past.accept()
    refused(TEST, "bytes", "why", "bytes lost nothing")
    past.run(line[2], 9, dirty=True)
    refused(TEST, "bytes", "why", "uncommitted")


def test_a_function_is_accepted_with_all_its_tests_that_lost() -> None:
    entries = [
        make_entry(run=run, test=f"t.py::test[{n}]", commit=None, ppl=ppl, created=f"2026-01-0{run}")
        for run, loss in (("1", 0.0), ("2", 20.0))
        for n, ppl in enumerate((loss, loss, 1.0))
    ]
    made = accept(History(tuple(entries)), "t.py::test", "ppl", "why", THRESHOLDS)
    assert [one.entry.test for one in made] == ["t.py::test[0]", "t.py::test[1]"]
    assert {one.entry.latency for one in made} == {None}


def test_a_commit_is_pinned_once_and_only_where_it_can_be_compared_with(
    repository: Repository, line: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository.folder)
    repository.git("update-ref", "HEAD", line[2])
    history = History((make_entry(commit=line[0]),))
    made = pin(history, line[0][:12])
    assert made is not None
    assert made.commit == line[0]
    assert pin(History(history.entries, decisions=(made,)), line[0]) is None
    assert pin(history, "HEAD"), "this run will store it"
    assert pin(history, "none") is None, "nothing is pinned"
    unpinned = pin(History((), decisions=(made,)), "none")
    assert unpinned is not None
    assert unpinned.commit is None
    for name, named in ((line[1], "--knorm-save"), ("nonsense", "'nonsense'")):
        with pytest.raises(KnormError, match=named):
            pin(history, name)


def test_a_renamed_test_is_one_test_not_two() -> None:
    history = History((make_entry(run="1", test="t.py::a"), make_entry(run="2", test="t.py::b")))
    made = rename(history, "t.py::a", "t.py::b")
    assert (made.old, made.new) == ("t.py::a", "t.py::b")
    with pytest.raises(KnormError, match=r"t\.py::c is stored; wanted a test, such as t\.py::a"):
        rename(history, "t.py::c", "t.py::b")
    both = History((*history.entries, make_entry(run="1", test="t.py::b")))
    with pytest.raises(KnormError, match="two tests"):
        rename(both, "t.py::a", "t.py::b")

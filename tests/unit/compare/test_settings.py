"""Which records stand beside each other, and in what they differ."""

from __future__ import annotations

from typing import Any

import pytest

from knormpress.compare.settings import differences, group_records, newest
from knormpress.records.schema import Record
from tests.record_factory import make_planned, make_record, make_records


def test_groups_fall_in_keep_ratio_and_the_later_of_two_cells_stands() -> None:
    records = [*make_records([0.7, 1.0, 0.9]), make_record(0.9, seed=2), make_record(0.9, prompt_tokens=512)]
    groups = group_records(records)
    assert [[record.keep_ratio for record in group] for group in groups] == [[1.0, 0.9, 0.7], [0.9]]
    assert groups[0][1] is records[3]


def test_a_plan_is_another_cell_than_the_ratio_of_its_mean() -> None:
    records = [make_record(0.7), make_record(0.7, plan=(0.4, 1.0)), make_record(0.7, plan=(1.0, 0.4))]
    assert [len(group) for group in group_records(records)] == [3]
    assert [len(group) for group in group_records(records[1:])] == [2]


def test_a_plan_joins_the_ratios_that_it_can_be_compared_with() -> None:
    """What a plan decides itself, skip_layers and keep_recent, does not matter; all else does."""
    ratios, plan = [make_record(0.9), make_record(0.7)], make_record(plan=(0.4, 1.0), text_name="prose")
    assert [len(group) for group in group_records([plan, *ratios])] == [2, 1]
    policy = plan.policy.model_copy(update={"keep_recent": 32, "skip_layers": ()})
    same = plan.model_copy(update={"policy": policy, "text": ratios[0].text})
    assert [len(group) for group in group_records([same, *ratios])] == [3]
    for other in ({"prune_after": 16}, {"schedule": "iterative"}):
        apart = same.model_copy(update={"policy": policy.model_copy(update=other)})
        assert [len(group) for group in group_records([apart, *ratios])] == [2, 1]


def test_the_further_ways_of_a_plans_prompt_stand_below_the_plan() -> None:
    """In whatever order they were measured; and each is a cell of its own, by its sizes too."""
    ratios, ways = make_records([1.0, 0.1], prompt_tokens=4096), make_planned()
    for records in ([*ratios, *ways], [*reversed(ways), *ratios]):
        assert [record.row for record in group_records(records)[0]] == [
            "1.0",
            "plan 0.40",
            "plan 0.40\nin chunks",
            "plan 0.40\nreused",
            "0.1",
        ]
    assert [len(group) for group in group_records(ways)] == [3]
    sizes = [*make_planned(prompt_tokens=4096), make_planned(candidate_chunk=512)[0], make_planned(reused_tokens=9)[0]]
    assert len(newest(sizes)) == 5
    assert differences(ways) == {"way of the prompt": ["whole", "in chunks", "reused"]}
    assert len(group_records([*ratios, *make_planned(text_name="prose")])) == 2


def test_differences_are_named() -> None:
    records = [make_record(0.9), make_record(0.8, device="cuda", prompt_tokens=2048)]
    assert differences([]) == differences(records[:1]) == {}
    assert differences(records) == {
        "device": ["cpu (Synthetic CPU @ 2.50 GHz)", "cuda (Synthetic CPU @ 2.50 GHz)"],
        "prompt tokens": [1024, 2048],
        "context tokens": [1024, 2048],
    }


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"fingerprint": "e" * 64}, "model"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"threads": 8}, "threads"),
        ({"device_map": "disk: all"}, "device"),
        ({"text_name": "prose"}, "text"),
        ({"documents": 9}, "samples"),
        ({"scored": 100}, "scored tokens"),
        ({"prefill_chunk": 256}, "prefill chunk"),
        ({"new_tokens": 8}, "new tokens"),
        ({"method": "random"}, "method"),
    ],
)
def test_records_that_differ_are_no_group(changed: dict[str, Any], named: str) -> None:
    records = [make_record(0.9), make_record(0.9, **changed)]
    assert list(differences(records)) == [named]
    assert len(group_records(records)) == 2


def test_rounds_make_no_difference() -> None:
    """How many pairs it took is told by the interval."""
    assert differences([make_record(0.9), make_record(0.8, rounds=20)]) == {}


def at_commit(record: Record, commit: str) -> Record:
    return record.model_copy(update={"environment": record.environment.model_copy(update={"git_commit": commit})})


def test_of_a_cell_measured_at_two_commits_the_newest_is_shown() -> None:
    old = [at_commit(make_record(ratio), "a" * 40) for ratio in (1.0, 0.9)]
    new = [at_commit(make_record(ratio), "b" * 40) for ratio in (1.0, 0.9)]
    assert newest([*old, *new]) == new
    assert group_records([*old, *new]) == [new]
    assert differences(newest([*old, *new])) == {}
    assert len(group_records([*old, new[0]])) == 2, "one picture may not mix two commits"

"""What was found, item by item, and the figures derived from it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from knormpress.records.retrieval import Answer, Item, Retrieval
from knormpress.stats.intervals import Change
from knormpress.stats.shares import share_of


def item(
    task: str = "list",
    text: int = 0,
    name: str = "apple",
    *,
    found: bool = True,
    nll: float = 0.5,
    chosen: bool | None = None,
    tokens: int = 2,
) -> Item:
    """An item with a full cache that was surer by 0.5 nats than a candidate of ``nll`` 0.5."""
    return Item(
        task=task,
        text=text,
        name=name,
        length=1_060,
        depth=0.04,
        tokens=tokens,
        full=Answer(nll=0.0, found=True),
        candidate=Answer(nll=nll, found=found, chosen=chosen),
    )


def retrieval(*items: Item, **asked: int) -> Retrieval:
    return Retrieval(asked=asked or {"list": len(items)}, items=items)


def test_the_items_of_a_text_count_as_one_text() -> None:
    """Also where another task has a text of the same number."""
    lists = [item(text=text, name=str(row), found=text > 0) for text in range(5) for row in range(4)]
    found = retrieval(*lists, *(item("passkey", text, "pass key") for text in range(3)), list=24, passkey=9)
    assert found.share == share_of([(0, 4), *[(4, 4)] * 4, *[(1, 1)] * 3])
    assert found.of("passkey").share == share_of([(1, 1)] * 3)
    assert found.of("passkey").asked == {"passkey": 9}
    assert found.of("list", "passkey") == found
    assert found.of("json") == retrieval().model_copy(update={"asked": {}})


def test_only_items_with_other_values_can_be_chosen() -> None:
    found = retrieval(item(chosen=True), item(name="b", chosen=False), item(name="c"))
    assert found.chosen == (1, 2)
    assert retrieval(item()).chosen == (0, 0)


def test_the_rise_is_the_mean_over_items() -> None:
    assert retrieval(item(nll=0.5), item(name="b", nll=2.5)).nll_rise == pytest.approx(1.5)
    assert retrieval().nll_rise is None


def test_items_are_compared_with_their_like() -> None:
    """Whatever their order, and without those that either full cache did not solve."""
    before = retrieval(item(name="a"), item(name="b"), item(name="c", found=False))
    after = retrieval(item(name="c"), item(name="d"), item(name="a", found=False))
    assert [(old.name, new.name) for old, new in after.paired(before)] == [("a", "a"), ("c", "c")]
    assert [new.candidate.found for _, new in after.paired(before)] == [False, True]
    assert after.found_since(before).percent == 0.0
    assert before.paired(after) == [(new, old) for old, new in reversed(after.paired(before))]


def test_a_task_and_a_number_of_a_text_are_part_of_an_item() -> None:
    before = retrieval(item("list", 0, "a"), item("list", 1, "a"), item("json", 0, "a"))
    assert len(before.paired(before)) == 3
    assert len({one.key for one in before.items}) == 3
    assert retrieval(item("json", 1, "a")).paired(before) == []


def test_the_change_since_another_run_has_the_sign_of_what_is_found() -> None:
    names = [str(number) for number in range(10)]
    good = retrieval(*(item(name=name) for name in names))
    bad = retrieval(*(item(name=name, found=number < 2) for number, name in enumerate(names)))
    worse, better = bad.found_since(good), good.found_since(bad)
    assert (worse.percent, better.percent) == (-80.0, 80.0)
    assert worse.high is not None
    assert worse.high < 0
    assert good.found_since(good) == Change(0.0, 0.0, 0.0)


def test_the_perplexity_of_answers_is_that_of_their_tokens() -> None:
    before = retrieval(*(item(text=text, nll=1.0, tokens=4) for text in range(8)))
    after = retrieval(*(item(text=text, nll=1.4, tokens=4) for text in range(8)))
    change = after.answers_since(before)
    assert change.percent == pytest.approx(100 * math.expm1(0.1))
    assert change.ends == pytest.approx((change.percent, change.percent))
    assert before.answers_since(after).percent == pytest.approx(100 * math.expm1(-0.1))


def test_texts_are_what_varies_between_answers() -> None:
    """Four items in each text all change alike."""
    names = "abcd"
    before = retrieval(*(item(text=text, name=name) for text in range(8) for name in names))
    after = retrieval(*(item(text=text, name=name, nll=0.5 + text / 2) for text in range(8) for name in names))
    low, high = after.answers_since(before).ends
    assert high - low > 100.0


def test_nothing_in_common_is_no_change_without_an_interval() -> None:
    before, after = retrieval(item(name="a")), retrieval(item(name="b"))
    assert after.found_since(before) == after.answers_since(before) == Change(0.0, None, None)


def test_a_label_says_where_the_item_is() -> None:
    assert item("passkey", 7, "pass key").label == "passkey 7: pass key (1,060 tokens, depth 0.04)"


def test_it_is_stored_and_read_back() -> None:
    found = retrieval(item(chosen=True), item(name="b", found=False), list=4)
    assert Retrieval.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize("changed", [{"found": "maybe"}, {"nll": None}, {"shown": 1}])
def test_what_is_not_an_answer_is_not_read(changed: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Answer.model_validate({"nll": 0.5, "found": True, **changed})

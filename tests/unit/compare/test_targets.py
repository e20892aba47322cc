"""A plan judged by its targets: by the whole interval, never by the point."""

from __future__ import annotations

import pytest

from knormpress.compare.targets import judge_plan
from tests.plan_factory import TUNED, make_plan, make_point


@pytest.mark.parametrize(
    ("ppl", "ends", "words"),
    [
        # make_point's interval reaches from 0.6 to 1.8 of the change.
        (2.7, (0.9, 0.99), ("met", "met")),
        (2.9, (0.89, 0.99), ("not decided", "not decided")),
        (9.0, (0.6, 0.89), ("not met", "not met")),
    ],
)
def test_the_interval_decides(ppl: float, ends: tuple[float, float], words: tuple[str, str]) -> None:
    point = make_point("tuned", 0.4, ppl, (36, 40), press=TUNED).model_copy(update={"ends": ends})
    sentences = judge_plan(make_plan(frontier=(point,)))
    assert tuple(sentence.split(": ")[1].partition(",")[0] for sentence in sentences) == words


def test_what_was_not_measured_is_not_judged() -> None:
    assert judge_plan(make_plan(frontier=())) == []
    assert len(judge_plan(make_plan())) == 1  # its share has no interval
    other = make_point("keydiff", 0.4, 1.0, press=TUNED)
    assert judge_plan(make_plan(frontier=(other,))) == []

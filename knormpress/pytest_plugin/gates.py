"""What becomes of a test whose gate has decided, or could not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from knormpress.stats.gates import Decision

__all__ = ["expect_decided", "settle"]

_UNDECIDED = pytest.StashKey[list[str]]()


def settle(test: pytest.Item, decision: Decision, figures: str) -> None:
    """Fail ``test`` if a gate's ``decision`` says so; if it is inconclusive, note this for ``expect_decided``.

    The test goes on: a gate that can't decide must not keep a later one from failing the test.
    """
    print(figures)
    if decision == "fail":
        pytest.fail(figures, pytrace=False)
    if decision == "inconclusive":
        test.stash.setdefault(_UNDECIDED, []).append(figures)


def expect_decided(test: pytest.Item) -> None:
    """Make ``test``, which has passed otherwise, an expected failure if one of its gates was inconclusive."""
    if undecided := test.stash.get(_UNDECIDED, []):
        del test.stash[_UNDECIDED]
        pytest.xfail(f"inconclusive: {'; '.join(undecided)}")

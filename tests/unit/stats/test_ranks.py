"""The rank correlation of two figures."""

from __future__ import annotations

import math

import pytest

from knormpress.stats.ranks import rank_correlation


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ((1.0, 8.0, 9.0, 9.5), 1.0),
        ((4.0, 3.0, 2.0, -9.0), -1.0),
        # 1 - 6 (1 + 1 + 0 + 0) / (4 (16 - 1))
        ((2.0, 1.0, 3.0, 4.0), 0.8),
    ],
)
def test_only_the_order_counts(second: tuple[float, ...], expected: float) -> None:
    assert rank_correlation((1.0, 2.0, 3.0, 4.0), second) == pytest.approx(expected)


def test_what_never_differs_has_no_order() -> None:
    assert math.isnan(rank_correlation((1.0, 1.0, 1.0), (1.0, 2.0, 3.0)))
    assert math.isnan(rank_correlation((1.0, 2.0, 3.0), (5.0, 5.0, 5.0)))

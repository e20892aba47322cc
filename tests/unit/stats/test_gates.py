"""A gate is decided by a whole interval or not at all."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knormpress.stats.gates import documents_to_decide, gate, passkey_gate
from knormpress.stats.intervals import Change


@pytest.mark.parametrize(
    ("low", "high", "decision"),
    [
        (-1.0, 4.9, "pass"),
        (-5.0, 5.0, "pass"),
        (4.0, 5.1, "inconclusive"),
        (5.0, 5.1, "inconclusive"),
        (-5.1, 0.0, "inconclusive"),
        (-5.1, -5.0, "inconclusive"),
        (-9.0, 9.0, "inconclusive"),
        (5.1, 9.0, "fail"),
        (-9.0, -5.1, "fail"),
        (None, None, "inconclusive"),
        (0.0, None, "inconclusive"),
        (None, 0.0, "inconclusive"),
    ],
)
def test_a_gate_needs_the_whole_interval(low: float | None, high: float | None, decision: str) -> None:
    assert gate(Change(0.0, low, high), 5.0) == decision


@pytest.mark.parametrize(
    ("found", "known", "share", "decision", "measured"),
    [
        (40, 40, 0.9, "pass", "100 % (91..100)"),
        (38, 40, 0.9, "inconclusive", "95 % (83..99)"),
        (30, 40, 0.9, "fail", "75 % (60..86)"),
        (30, 40, 0.5, "pass", "wanted 50 %"),
        (0, 0, 0.9, "inconclusive", "no passkey"),
    ],
)
def test_the_passkey_gate(found: int, known: int, share: float, decision: str, measured: str) -> None:
    verdict, text = passkey_gate(found, known, share)
    assert verdict == decision
    assert measured in text
    if known:
        assert f"{found} of the {known}" in text
        assert f"wanted {100 * share:g} %" in text


@pytest.mark.parametrize(
    ("percent", "low", "high", "more"),
    [
        # Half as wide an interval takes four times the documents.
        (3.0, -1.0, 7.0, 30),
        (7.0, 3.0, 11.0, 30),
        (-7.0, -11.0, -3.0, 30),
        (-3.0, -7.0, 1.0, 30),
        (5.0, 4.0, 6.0, None),
        (3.0, None, None, None),
        (3.0, None, 7.0, None),
        (3.0, -1.0, None, None),
    ],
)
def test_how_many_more_documents_would_decide(
    percent: float, low: float | None, high: float | None, more: int | None
) -> None:
    assert documents_to_decide(Change(percent, low, high), 5.0, 10) == more


@given(st.floats(-20, 20), st.floats(0.1, 20), st.integers(2, 50))
def test_so_many_documents_do_decide(middle: float, width: float, documents: int) -> None:
    change = Change(middle, middle - width, middle + width)
    more = documents_to_decide(change, 5.0, documents)
    if gate(change, 5.0) != "inconclusive" or more is None:
        return
    narrow = width * math.sqrt(documents / (documents + more)) * (1 - 1e-9)
    assert gate(Change(middle, middle - narrow, middle + narrow), 5.0) != "inconclusive"

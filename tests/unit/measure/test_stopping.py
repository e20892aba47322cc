"""Timing stops as soon as its intervals are narrow. They must cover the truth all the same."""

from __future__ import annotations

import numpy as np
import pytest

from knormpress.stats import intervals
from tests.simulated import MACHINES, covers


def test_the_intervals_cover_the_truth_under_their_own_stopping_rule() -> None:
    """The real loop, rule and intervals, on times of which the truth is known; the clock alone is made up."""
    trials, held = 150, []
    for name, machine in MACHINES.items():
        found = [one[:2] for one in covers(machine, trials, seed=3)]
        held.append(np.mean(found))
        # The binomial standard error of one machine is 1.3 %.
        assert held[-1] > 0.95 - 2.5 * 0.013, name
    # And of all together 0.4 %.
    assert np.mean(held) > 0.94


def test_control_an_interval_that_is_too_narrow_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for 90 % covers that at most, and less by what stopping takes."""
    monkeypatch.setattr(intervals, "_CONFIDENCE", 0.9)
    found = [one[:2] for one in covers(MACHINES["normal, 2 %, precision 1.5"], 300, seed=3)]
    # The binomial standard error is 1.2 %.
    assert np.mean(found) < 0.92

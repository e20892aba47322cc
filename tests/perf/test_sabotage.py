"""A decode loop made slower by a tenth must be seen. It is timed, so it stands here and not among the unit tests."""

from __future__ import annotations

import time
from contextlib import contextmanager

import pytest

from knormpress import KnormPress
from knormpress.intervals import ratio_change
from knormpress.metrics import time_in_turn
from knormpress.verdicts import THRESHOLDS

MOST_TURNS = 3


class SlowerByATenth:
    """A method whose decoded tokens, but for the first, each wait for a tenth of what the token before took."""

    def __init__(self, method):
        self.method = method

    @contextmanager
    def __call__(self, model):
        since = None

        def wait(_module, args):
            nonlocal since
            if args[0].shape[1] == 1:
                if since is not None:
                    time.sleep((time.perf_counter() - since) / 10)
                since = time.perf_counter()

        handle = model.get_decoder().layers[0].register_forward_pre_hook(wait)
        try:
            with self.method(model) as new_cache:
                yield new_cache
        finally:
            handle.remove()


def test_decoding_slower_by_a_tenth_is_seen(knorm_bench, quick):
    """Measured with more and more pairs while the verdict on them would be noise."""
    if quick:
        pytest.skip("a tenth is seen in long measurements only")
    (prompt,) = knorm_bench.documents(length=64, count=1)
    press, allowed = KnormPress(0.9, prune_after=32), THRESHOLDS["tpot"]
    sound, slower = [], []
    for _ in range(MOST_TURNS):
        found = time_in_turn(knorm_bench.model, press, SlowerByATenth(press), prompt, new_tokens=16, rounds=12)
        sound += [baseline.tpot_s for baseline, _ in found.pairs]
        slower += [candidate.tpot_s for _, candidate in found.pairs]
        change = ratio_change(sound, slower)
        low, high = change.ends
        if low > 0 and change.percent > allowed:
            return
        assert high > allowed, f"a decode loop slower by 10 % was measured as {change} ({change.interval})"
    pytest.xfail(f"inconclusive: this machine is too noisy now to see a tenth, {change} ({change.interval})")

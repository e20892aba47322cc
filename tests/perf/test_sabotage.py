"""A decode loop made slower by a tenth must be seen. It is timed, so it stands here and not among the unit tests."""

from __future__ import annotations

import time
from contextlib import contextmanager

import pytest

from knormpress import KnormPress
from knormpress.compare.verdicts import THRESHOLDS, judge
from knormpress.measure.latency import measure_latency
from tests.entry_factory import make_entry

MOST_TURNS = 3
# Of runs of about a second.
PAIRS = 10


class SlowerByATenth:
    """A method whose decoded tokens each wait for a tenth of what the pass before took."""

    def __init__(self, method):
        self.method = method

    @contextmanager
    def __call__(self, model):
        since = None

        def wait(_module, args):
            nonlocal since
            if args[0].shape[1] == 1:
                time.sleep((time.perf_counter() - since) / 10)
            since = time.perf_counter()

        handle = model.get_decoder().layers[0].register_forward_pre_hook(wait)
        try:
            with self.method(model) as new_cache:
                yield new_cache
        finally:
            handle.remove()


def test_decoding_slower_by_a_tenth_is_seen(knorm_bench, quick):
    """Judged as stored runs are, with more pairs for as long as the verdict is noise.

    Unlike stored runs, both are timed beside the same runs of the full cache; what another speed of the machine does to
    runs that are not is simulated, see ``tests.simulated``.
    """
    if quick:
        pytest.skip("a tenth is seen in long measurements only")
    (prompt,) = knorm_bench.documents(length=64, count=1)
    sound = KnormPress(0.9, prune_after=32)
    before, now = [], []
    for _ in range(MOST_TURNS):
        timed = measure_latency(knorm_bench.model, [sound, SlowerByATenth(sound)], prompt, new_tokens=16, rounds=PAIRS)
        for side, latency in zip((before, now), timed, strict=True):
            side.append(make_entry(parts=()).model_copy(update={"latency": latency}))
        (tpot,) = (f for f in judge(before, now, THRESHOLDS, "sound").findings if f.metric == "tpot")
        if tpot.word == "regressed":
            return
        said = f"a decode loop slower by 10 % was measured as {tpot.change} ({tpot.change.interval}): {tpot.word}"
        assert tpot.word == "noise", said
    low, high = tpot.change.ends
    assert high - low > THRESHOLDS["tpot"], f"{said}, and not for want of precision"
    pytest.xfail(f"inconclusive: this machine is too noisy now, {said}")

"""A fixed piece of work, timed: whether the machine ran at one speed all through a measurement."""

from __future__ import annotations

import statistics
import time

import torch

from knormpress.devices import synchronize

__all__ = ["calibrate"]

_LOOPS = 31
_WIDTH = 512
_COPIED = 2**21  # floats: 8 MB, more than the caches of most processors


def calibrate(device: torch.device) -> float:
    """Median seconds of one loop of a fixed work on ``device``: a matrix product and a copy through memory.

    The two are what a model's prefill and its decoding wait for. The figure is good for nothing but comparing it with
    another one of the same device: taken before and after a measurement, it tells whether the speed moved meanwhile.
    """
    square = torch.ones(_WIDTH, _WIDTH, device=device)
    source, target = torch.ones(_COPIED, device=device), torch.empty(_COPIED, device=device)

    def loop() -> float:
        synchronize(device)
        start = time.perf_counter()
        torch.mm(square, square)
        target.copy_(source)
        synchronize(device)
        return time.perf_counter() - start

    loop()
    return statistics.median(loop() for _ in range(_LOOPS))

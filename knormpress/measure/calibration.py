"""Time a fixed workload, to see whether the machine's speed changed during a measurement."""

from __future__ import annotations

import statistics
import time

import torch

from knormpress.workload.devices import synchronize

__all__ = ["calibrate"]

_LOOPS = 31
_WIDTH = 512
_COPIED = 2**21  # floats: 8 MB, more than the caches of most processors


def calibrate(device: torch.device) -> float:
    """The median time in seconds of a fixed workload on ``device``: a matrix product and a copy in memory.

    These two limit a model's prefill and its decoding. The figure has one use: to be compared with another one of the
    same device. Taken before and after a measurement, it shows whether the speed changed.
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

"""Time to first token, and the gap before each further one.

**TTFT** runs from the call, with the prompt on the device, until the first new token's id is on the host. Each **gap**
runs from one token's id on the host to the next. The device is synchronised before every reading of the clock. **TPOT**
is the mean gap: (time of last token - time of first) / (new tokens - 1). **Throughput** is new tokens / whole time.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from knormpress.devices import synchronize
from knormpress.errors import KnormError
from knormpress.intervals import ratio_change
from knormpress.metrics.calibration import calibrate
from knormpress.metrics.forward import Method, prefill

__all__ = ["Repeat", "TimedPairs", "Timing", "time_generation", "time_in_turn", "until_enough"]

# Enough decoding for allocators and kernels to have met every shape class; more would only cost time.
_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Timing:
    """One timed generation, in seconds."""

    ttft_s: float
    gaps_s: tuple[float, ...]

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first; of a run with more than that one."""
        return sum(self.gaps_s) / len(self.gaps_s)


def time_generation(
    model: PreTrainedModel,
    prompt: Tensor,
    new_cache: Callable[[], Cache],
    *,
    new_tokens: int,
    prefill_chunk: int | None = None,
) -> Timing:
    """Generate greedily and time every token.

    A loop of its own rather than ``generate()``, whose set-up would be counted as the model's. It does not stop at an
    end-of-text token, so that every run has the same length. Making the cache is inside the clock: whoever uses a
    method pays for its cache, and so does the baseline. Python's garbage collector runs before the clock starts and not
    while it runs.

    Args:
        model: on the device to be timed.
        prompt: (1, n) token ids, already on that device.
        new_cache: makes the empty cache of this run.
        new_tokens: how many tokens to generate, at least 1.
        prefill_chunk: tokens of the prompt a forward pass takes at most; None sends it whole.

    Raises:
        KnormError: no prompt or no new token was asked for.
    """
    if prompt.numel() == 0 or new_tokens < 1:
        raise KnormError(
            f"got a prompt of {prompt.numel()} tokens and {new_tokens} new tokens to time; wanted at least 1 of each"
        )
    device = prompt.device

    def clock() -> float:
        synchronize(device)
        return time.perf_counter()

    with torch.inference_mode(), _collector_paused():
        readings = [clock()]
        cache = new_cache()
        token = prefill(model, prompt, cache, chunk=prefill_chunk).argmax(dim=-1, keepdim=True)
        token.item()
        readings.append(clock())
        for _ in range(new_tokens - 1):
            token = prefill(model, token, cache).argmax(dim=-1, keepdim=True)
            token.item()
            readings.append(clock())
    ttft, *gaps = (after - before for before, after in pairwise(readings))
    return Timing(ttft_s=ttft, gaps_s=tuple(gaps))


@dataclass(frozen=True)
class TimedPairs:
    """What ``time_in_turn`` found.

    Args:
        pairs: (baseline, candidate), neighbours in time.
        stopped: ``"precise"`` if the intervals were narrow enough, ``"time"`` if the time was up before, ``"rounds"``
            if no precision was asked for.
        calibration_s: seconds of ``calibrate`` before and after.
    """

    pairs: tuple[tuple[Timing, Timing], ...]
    stopped: Literal["precise", "time", "rounds"]
    calibration_s: tuple[float, float]


Repeat: TypeAlias = Callable[[Callable[[], None], Callable[[], None]], None]
"""Calls ``before`` and then ``run``, over and over until ``before`` raises."""


def until_enough(before: Callable[[], None], run: Callable[[], None]) -> None:
    """Repeat with no clock of its own."""
    while True:
        before()
        run()


class _Enough(BaseException):
    """Ends ``Repeat``; no Exception, so that whoever repeats does not take it for a failed test."""


def time_in_turn(
    model: PreTrainedModel,
    baseline: Method,
    candidate: Method,
    prompt: Tensor,
    *,
    new_tokens: int,
    rounds: int,
    precision: float | None = None,
    seconds: float = math.inf,
    prefill_chunk: int | None = None,
    after_run: Callable[[], None] = lambda: None,
    repeat: Repeat = until_enough,
) -> TimedPairs:
    """Time two methods in turn in the order A B B A A B ..., so that a drift of the machine meets both alike.

    Each method's context is entered around its own runs only. One short run of each comes first and is not counted.

    Args:
        model, prompt, new_tokens, prefill_chunk: as for ``time_generation``.
        baseline, candidate: the methods A and B.
        rounds: pairs to measure at least, 1 or more.
        precision: go on until neither end of the 95 % intervals of TTFT's and TPOT's change is farther than so many
            percent from its middle; None stops at ``rounds``.
        seconds: beyond ``rounds``, begin no pair once so many seconds have passed.
        after_run: called after each run, warm-up included.
        repeat: runs the candidate, see ``Repeat``; pytest-benchmark times it by its own clock so.

    Raises:
        KnormError: ``rounds`` is below 1, or as for ``time_generation``.
    """
    if rounds < 1:
        raise KnormError(f"rounds is {rounds}; wanted at least 1")
    baselines: list[Timing] = []
    candidates: list[Timing] = []
    stopped: Literal["precise", "time", "rounds"] = "rounds"

    def run(method: Method, tokens: int, runs: list[Timing]) -> None:
        with method(model) as new_cache:
            runs.append(time_generation(model, prompt, new_cache, new_tokens=tokens, prefill_chunk=prefill_chunk))
        after_run()

    def before() -> None:
        nonlocal stopped
        if len(candidates) > len(baselines):
            run(baseline, new_tokens, baselines)
        if len(candidates) >= rounds:
            if precision is None:
                raise _Enough
            stopped = "precise" if _widest(baselines, candidates) <= precision else "time"
            if stopped == "precise" or time.perf_counter() - start >= seconds:
                raise _Enough
        if len(candidates) % 2 == 0:
            run(baseline, new_tokens, baselines)

    with _imports_exempt_from_collection():
        for method in (baseline, candidate):
            run(method, min(new_tokens, _WARM_UP_TOKENS), [])
        speed_before = calibrate(prompt.device)
        start = time.perf_counter()
        with suppress(_Enough):
            repeat(before, lambda: run(candidate, new_tokens, candidates))
        if len(candidates) > len(baselines):  # it did not repeat until the end
            run(baseline, new_tokens, baselines)
        speed_after = calibrate(prompt.device)
    return TimedPairs(tuple(zip(baselines, candidates, strict=True)), stopped, (speed_before, speed_after))


def _widest(baselines: list[Timing], candidates: list[Timing]) -> float:
    """The largest distance in % from a change of TTFT or TPOT to an end of its interval."""
    changes = [ratio_change([t.ttft_s for t in baselines], [t.ttft_s for t in candidates])]
    if baselines[0].gaps_s:
        changes.append(ratio_change([t.tpot_s for t in baselines], [t.tpot_s for t in candidates]))
    if any(change.low is None for change in changes):
        return math.inf
    return max(abs(end - change.percent) for change in changes for end in change.ends)


@contextmanager
def _imports_exempt_from_collection() -> Iterator[None]:
    """Make the collections before each run quick: what imports have left behind need not be looked through again."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _collector_paused() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

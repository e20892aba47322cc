"""Time to first token, and the gap before each further one.

**TTFT** runs from the call, with the prompt on the device, until the first new token's id is on the host. Each **gap**
runs from one token's id on the host to the next. The device is synchronised before every reading of the clock. **TPOT**
is the mean gap: (time of last token - time of first) / (new tokens - 1). **Throughput** is new tokens / whole time.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from knormpress.devices import synchronize
from knormpress.errors import KnormError
from knormpress.metrics.forward import Method, prefill

__all__ = ["Timing", "time_generation", "time_in_turn"]

# Enough decoding for allocators and kernels to have met every shape class; more would only cost time.
_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Timing:
    """One timed generation, in seconds."""

    ttft_s: float
    gaps_s: tuple[float, ...]

    @property
    def total_s(self) -> float:
        """From the call to the last token."""
        return self.ttft_s + sum(self.gaps_s)

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first; 0 for a single token."""
        return sum(self.gaps_s) / len(self.gaps_s) if self.gaps_s else 0.0

    @property
    def tokens_per_s(self) -> float:
        """New tokens / whole time, the prompt's time included."""
        return (1 + len(self.gaps_s)) / self.total_s


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


def time_in_turn(
    model: PreTrainedModel,
    baseline: Method,
    candidate: Method,
    prompt: Tensor,
    *,
    new_tokens: int,
    rounds: int,
    prefill_chunk: int | None = None,
    after_run: Callable[[], None] = lambda: None,
) -> list[tuple[Timing, Timing]]:
    """Time two methods in turn in the order A B B A A B ..., so that a drift of the machine meets both alike.

    Each method's context is entered around its own runs only. One short run of each comes first and is not counted.

    Args:
        model, prompt, new_tokens, prefill_chunk: as for ``time_generation``.
        baseline, candidate: the methods A and B.
        rounds: pairs to measure, at least 1.
        after_run: called after each run, warm-up included: 2 * (rounds + 1) times.

    Returns:
        ``rounds`` pairs (baseline, candidate); the runs of a pair are neighbours in time.

    Raises:
        KnormError: ``rounds`` is below 1, or as for ``time_generation``.
    """
    if rounds < 1:
        raise KnormError(f"rounds is {rounds}; wanted at least 1")

    def run(method: Method, tokens: int) -> Timing:
        with method(model) as new_cache:
            timing = time_generation(model, prompt, new_cache, new_tokens=tokens, prefill_chunk=prefill_chunk)
        after_run()
        return timing

    pairs = []
    with _imports_exempt_from_collection():
        for method in (baseline, candidate):
            run(method, min(new_tokens, _WARM_UP_TOKENS))
        for turn in range(rounds):
            if turn % 2 == 0:
                first = run(baseline, new_tokens)
                pairs.append((first, run(candidate, new_tokens)))
            else:
                second = run(candidate, new_tokens)
                pairs.append((run(baseline, new_tokens), second))
    return pairs


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

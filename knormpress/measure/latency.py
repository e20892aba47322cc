"""Measure the time to first token, and the gap before each further token.

**TTFT** runs from the call, with the prompt on the device, until the first new token's id is on the host. Each **gap**
runs from one token's id on the host to the next. The device is synchronised before the clock is read. **TPOT**
is the mean gap: (time of last token - time of first) / (new tokens - 1). **Throughput** is new tokens / whole time.
"""

from __future__ import annotations

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from knormpress.errors import KnormError
from knormpress.measure.calibration import calibrate
from knormpress.measure.pairs import Pairs, Repeat, in_turn, until_enough
from knormpress.measure.prefill import Way, begun, prefill
from knormpress.methods.full import FullCache
from knormpress.methods.method import Method, caches_of
from knormpress.records.figures import Latency, Run
from knormpress.stats.intervals import is_precise
from knormpress.workload.devices import devices_of, synchronize

__all__ = ["are_precise", "cold_ttft", "measure_latency", "time_generation", "weights_tpot"]

# Enough tokens for allocators and kernels to see every kind of shape.
_WARM_UP_TOKENS = 4

# So few that the cache costs nothing compared with the weights, but enough for a median.
_SHORT_PROMPT = 16
_SHORT_ANSWER = 16


def time_generation(
    model: PreTrainedModel,
    prompt: Tensor,
    new_cache: Callable[[], Cache],
    *,
    new_tokens: int,
    prefill_chunk: int | None = None,
) -> Run:
    """Generate greedily and time every token.

    It does not use ``generate()``, whose set-up would add to the time, and does not stop at an end-of-text token, so
    that all runs have the same length. The time includes making the cache, for a method as for the full cache. Python's
    garbage collector runs before the clock starts, and not while it runs.

    Args:
        model: a model on the device to time.
        prompt: (1, n) token ids, already on that device.
        new_cache: makes the empty cache of this run.
        new_tokens: how many tokens to generate, at least 1.
        prefill_chunk: the most tokens of the prompt in one forward pass; None sends it in one pass.

    Raises:
        KnormError: the prompt is empty, or ``new_tokens`` is below 1.
    """
    if prompt.numel() == 0 or new_tokens < 1:
        raise KnormError(
            f"got a prompt of {prompt.numel()} tokens and {new_tokens} new tokens to time; wanted at least 1 of each"
        )
    devices = devices_of(model)

    def clock() -> float:
        for device in devices:
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
    return Run(ttft_s=ttft, gaps_s=tuple(gaps))


def measure_latency(
    model: PreTrainedModel,
    methods: Sequence[Method],
    prompt: Tensor,
    *,
    new_tokens: int,
    rounds: int,
    precision: float | None = None,
    seconds: float = math.inf,
    prefill_chunk: int | None = None,
    ways: Sequence[Way] | None = None,
    baseline: Method | None = None,
    after_run: Callable[[], None] = lambda: None,
    repeat: Repeat = until_enough,
    is_warm: bool = False,
) -> list[Latency]:
    """Time generations with the full cache and with each method in turn, see ``pairs.in_turn``.

    The methods share the full cache's runs, so that they can be compared with each other as well. Each method's context
    is entered only for its own runs. One short warm-up run of each comes first, without counting.

    Args:
        model, prompt, new_tokens, prefill_chunk: as for ``time_generation``.
        methods: the candidates.
        rounds: the least number of pairs, 1 or more.
        precision: a method's runs end when both ends of the 95 % intervals of TTFT's and TPOT's change are within this
            many percent of the change; None stops at ``rounds``.
        seconds: after ``rounds``, start no more A B B A once this time for each method has passed.
        ways: how each method's cache takes the prompt; as the full cache does unless given. A context that is reused is
            computed and saved before any clock starts; loading it is in the time.
        baseline: what is measured in turn with the methods; the full cache unless given.
        after_run: called after each run, with warm-up.
        repeat: runs the methods, see ``pairs.Repeat``.
        is_warm: leave the warm-up runs out: the same prompt has just been through the cache of each method.

    Returns:
        One result for each method.

    Raises:
        KnormError: ``rounds`` is below 1, or as for ``time_generation``.
    """

    def run(which: Method, ids: Tensor, chunk: int | None, tokens: int) -> Run:
        with caches_of(which, model) as new_cache:
            timed = time_generation(model, ids, new_cache, new_tokens=tokens, prefill_chunk=chunk)
        after_run()
        return timed

    ways = ways or [Way(prefill_chunk)] * len(methods)
    with ExitStack() as contexts:
        sides = [(baseline or FullCache(), prompt, prefill_chunk)]
        for method, way in zip(methods, ways, strict=True):
            sides.append((*contexts.enter_context(begun(model, method, prompt, way)), way.chunk))
        contexts.enter_context(_imports_exempt_from_collection())
        for side in [] if is_warm else sides:
            run(*side, min(new_tokens, _WARM_UP_TOKENS))
        speed_before = _speed(model)
        pairs_of_methods = in_turn(
            *(functools.partial(run, *side, new_tokens) for side in sides),
            rounds=rounds,
            is_precise=None if precision is None else lambda pairs: are_precise(pairs, precision),
            seconds=seconds * len(methods),
            repeat=repeat,
        )
        speed = (speed_before, _speed(model))
    return [_latency(pairs, speed) for pairs in pairs_of_methods]


def _speed(model: PreTrainedModel) -> float:
    """The time of the fixed workload; on several devices their geometric mean, in which each counts as much."""
    return statistics.geometric_mean(map(calibrate, devices_of(model)))


def are_precise(pairs: Pairs[Run], precision: float) -> bool:
    """Whether the intervals of TTFT's and TPOT's change reach no further than ``precision`` % from the change.

    Timing stops by this rule; the intervals cover what they say under it, see ``stats.intervals``.
    """
    latency = _latency(pairs, (1.0, 1.0))
    return is_precise([latency.ttft, latency.tpot] if latency.decodes else [latency.ttft], precision)


def weights_tpot(model: PreTrainedModel, prompt: Tensor) -> float:
    """Seconds per token with an almost empty cache, where the weights take nearly all of the time.

    No cache can be faster, since stored tokens only add to it. It is the median gap of one generation with the full
    cache after the first 16 tokens of ``prompt`` (1, n); the model should be warm.
    """
    with FullCache()(model) as new_cache:
        run = time_generation(model, prompt[:, :_SHORT_PROMPT], new_cache, new_tokens=_SHORT_ANSWER)
    return statistics.median(run.gaps_s)


_process_is_cold = True


def cold_ttft(model: PreTrainedModel, prompt: Tensor, *, prefill_chunk: int | None) -> float | None:
    """Seconds to the first token in the first call of this process, with the full cache; None in later calls.

    Args:
        model: a model on the device to time.
        prompt: (1, n) token ids.
        prefill_chunk: the most tokens in one forward pass; None sends the prompt in one pass.
    """
    global _process_is_cold  # noqa: PLW0603 - being cold is a state of the process
    if not _process_is_cold:
        return None
    _process_is_cold = False
    with FullCache()(model) as new_cache:
        return time_generation(model, prompt, new_cache, new_tokens=1, prefill_chunk=prefill_chunk).ttft_s


def _latency(pairs: Pairs[Run], speed: tuple[float, float]) -> Latency:
    return Latency(
        baseline=tuple(pairs.baseline),
        candidate=tuple(pairs.candidate),
        stopped=pairs.stopped,
        calibration_s=speed,
        ttft_cold_s=None,
    )


@contextmanager
def _imports_exempt_from_collection() -> Iterator[None]:
    """Speed up the garbage collection before each run: exempt the objects that exist now."""
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

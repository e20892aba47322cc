"""Measure the bytes that filled caches hold, and the memory that the device reports."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import Cache, PreTrainedModel

from knormpress.errors import KnormError
from knormpress.measure.prefill import Way, begun, decode, expect_within_policy, prefill, slots_of
from knormpress.methods.full import FullCache
from knormpress.methods.method import Method, caches_of, describe_method, policy_of
from knormpress.policy.policy import Policy
from knormpress.records.figures import Memory, Reading
from knormpress.workload.devices import PeakMemory, devices_of, synchronize

__all__ = ["cache_bytes", "measure_memory"]

# A full cache takes all decoded tokens before these in one pass.
_ONE_BY_ONE = 32


def cache_bytes(cache: Cache) -> int:
    """The exact number of bytes of storage that ``cache`` holds, on any device.

    Counts each storage once, in full: a view keeps all of a larger tensor in memory. Tensors are searched in the cache,
    its layers and all objects that those own, except for model modules; quantised tensors count by their parts.
    """
    storages = (tensor.untyped_storage() for tensor in _tensors(cache, set()))
    return sum({(str(storage.device), storage.data_ptr()): storage.nbytes() for storage in storages}.values())


def measure_memory(
    model: PreTrainedModel,
    methods: Sequence[Method],
    prompt: Tensor,
    *,
    prefill_chunk: int | None = None,
    ways: Sequence[Way] | None = None,
    decoded_tokens: int = 0,
    policies: Sequence[Policy | None] | None = None,
    after_run: Callable[[], None] = lambda: None,
) -> list[Memory]:
    """Prefill ``prompt`` into the full cache and into each method's, in separate passes, and read their memory.

    This is never part of a timed run, since reading the memory takes time.

    Args:
        model: a model on the device to measure.
        methods: make the candidates' caches.
        prompt: (1, n) token ids on the model's device.
        prefill_chunk: the most tokens in one forward pass; None sends the prompt in one pass.
        ways: how each candidate takes the prompt; as the full cache does unless given. Computing a context that it
            reuses is not in the readings.
        decoded_tokens: after the prompt, decode this many tokens and read the caches' bytes again; 0 decodes none. The
            last 32 are chosen and fed one by one; those before them are the prompt's, fed by ``prefill.decode``.
        policies: what each method should follow; its own ``press`` unless given.
        after_run: called after each pass.

    Returns:
        One result for each method; the full cache is read once for all of them.

    Raises:
        KnormError: a method made no cache, its cache holds nothing, or it should drop tokens and holds as much as the
            full cache; or a proportional policy is in use, and its bound was passed while decoding.
    """
    full = _memory_of(model, FullCache(), prompt, prefill_chunk, decoded_tokens)
    after_run()
    measured = []
    wanted, ways = policies or [*map(policy_of, methods)], ways or [Way(prefill_chunk)] * len(methods)
    for method, policy, way in zip(methods, wanted, ways, strict=True):
        with begun(model, method, prompt, way) as (candidate, left):
            own = _memory_of(model, candidate, left, way.chunk, decoded_tokens)
        after_run()
        memory = Memory(
            baseline_cache_bytes=full.prompt_bytes,
            candidate_cache_bytes=own.prompt_bytes,
            baseline_device=full.readings,
            candidate_device=own.readings,
            decoded_tokens=decoded_tokens,
            baseline_decoded_bytes=full.decoded_bytes,
            candidate_decoded_bytes=own.decoded_bytes,
        )
        _check_pruned(method, policy, memory, prompt.shape[-1], drops=sum(own.slots) < sum(full.slots))
        measured.append(memory)
    return measured


class _Side(NamedTuple):
    slots: list[int]
    prompt_bytes: int
    decoded_bytes: int | None
    readings: tuple[Reading, ...]


def _memory_of(
    model: PreTrainedModel, method: Method, prompt: Tensor, prefill_chunk: int | None, decoded_tokens: int
) -> _Side:
    """The bytes that the cache holds after the prompt and after decoding, and the devices' readings for the prompt."""
    devices = devices_of(model)
    gc.collect()
    with torch.inference_mode(), caches_of(method, model) as new_cache:
        with ExitStack() as stack:
            peaks = [stack.enter_context(PeakMemory(device)) for device in devices]
            cache = new_cache()
            token = prefill(model, prompt, cache, chunk=prefill_chunk).argmax(dim=-1, keepdim=True)
            for device in devices:
                synchronize(device)
        slots, prompt_bytes = slots_of(cache), cache_bytes(cache)
        known = max(0, decoded_tokens - _ONE_BY_ONE)
        decode(model, prompt.repeat(1, -(-known // prompt.shape[-1]))[:, :known], cache)
        for _ in range(decoded_tokens - known):
            token = prefill(model, token, cache).argmax(dim=-1, keepdim=True)
        decoded_bytes = cache_bytes(cache) if decoded_tokens else None
        expect_within_policy(method, cache)
    readings = tuple(
        reading if len(devices) == 1 else reading.model_copy(update={"name": f"{reading.name} ({peak.device})"})
        for peak in peaks
        for reading in peak.readings
    )
    return _Side(slots, prompt_bytes, decoded_bytes, readings)


def _check_pruned(method: Method, policy: Policy | None, memory: Memory, tokens: int, *, drops: bool) -> None:
    name = describe_method(method)
    if not memory.candidate_cache_bytes:
        raise KnormError(f"the cache of {name} holds 0 bytes after {tokens} tokens; wanted one that stores its tokens")
    # A cache of small heads may drop tokens and still be no smaller, as it must know their positions.
    if policy is None or not policy.drops or tokens < policy.prune_after or drops:
        return
    if memory.candidate_cache_bytes >= memory.baseline_cache_bytes:
        raise KnormError(
            f"{name} holds {memory.candidate_cache_bytes:,} bytes after {tokens} tokens and the full cache "
            f"{memory.baseline_cache_bytes:,}, so nothing was pruned; check that the method prunes within the prompt"
        )


def _tensors(value: Any, visited: set[int]) -> Iterator[Tensor]:
    if id(value) in visited or isinstance(value, (nn.Module, type)):
        return
    visited.add(id(value))
    parts: Any = ()
    if isinstance(value, Tensor):
        if not is_traceable_wrapper_subclass(value):
            yield value
            return
        names, _ = value.__tensor_flatten__()
        parts = [getattr(value, name) for name in names]
    elif isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, (list, tuple, set)):
        parts = value
    elif hasattr(value, "__dict__"):
        parts = vars(value).values()
    for part in parts:
        yield from _tensors(part, visited)

"""Measure the bytes that filled caches hold, and the memory that the device reports."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import Cache, PreTrainedModel

from knormpress.measure.prefill import prefill
from knormpress.methods.full import FullCache
from knormpress.methods.method import Method
from knormpress.records.schema import Memory, Reading
from knormpress.workload.devices import PeakMemory, synchronize

__all__ = ["cache_bytes", "measure_memory"]


def cache_bytes(cache: Cache) -> int:
    """The exact number of bytes of storage that ``cache`` holds, on any device.

    Counts each storage once, in full: a view keeps all of a larger tensor in memory. Tensors are searched in the cache,
    its layers and all objects that those own, except for model modules; quantised tensors count by their parts.
    """
    storages = (tensor.untyped_storage() for tensor in _tensors(cache, set()))
    return sum({(str(storage.device), storage.data_ptr()): storage.nbytes() for storage in storages}.values())


def measure_memory(
    model: PreTrainedModel,
    method: Method,
    prompt: Tensor,
    *,
    prefill_chunk: int | None = None,
    after_run: Callable[[], None] = lambda: None,
) -> Memory:
    """Prefill ``prompt`` into the full cache and into the method's, in separate passes, and read their memory.

    This is never part of a timed run, since reading the memory takes time.

    Args:
        model: a model on the device to measure.
        method: makes the candidate's cache.
        prompt: (1, n) token ids on the model's device.
        prefill_chunk: the most tokens in one forward pass; None sends the prompt in one pass.
        after_run: called after each pass.
    """
    sides = []
    for which in (FullCache(), method):
        sides.append(_memory_of(model, which, prompt, prefill_chunk))
        after_run()
    (full_bytes, full_device), (method_bytes, method_device) = sides
    return Memory(
        baseline_cache_bytes=full_bytes,
        candidate_cache_bytes=method_bytes,
        baseline_device=full_device,
        candidate_device=method_device,
    )


def _memory_of(
    model: PreTrainedModel, method: Method, prompt: Tensor, prefill_chunk: int | None
) -> tuple[int, tuple[Reading, ...]]:
    """The bytes that the cache holds after the prompt, and the device's readings for the pass."""
    gc.collect()
    with torch.inference_mode(), method(model) as new_cache, PeakMemory(prompt.device) as peak:
        cache = new_cache()
        prefill(model, prompt, cache, chunk=prefill_chunk)
        synchronize(prompt.device)
    return cache_bytes(cache), tuple(peak.readings)


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

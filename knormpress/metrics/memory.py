"""Bytes a filled cache holds, and what the device reports beside them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import Cache, PreTrainedModel

from knormpress.devices import PeakMemory, Reading, synchronize
from knormpress.metrics.forward import Method, prefill

__all__ = ["MemoryUse", "cache_bytes", "measure_memory"]


@dataclass(frozen=True)
class MemoryUse:
    """What one prefill cost: bytes the cache holds after the prompt, and the device's readings over the pass."""

    cache_bytes: int
    device: tuple[Reading, ...]


def cache_bytes(cache: Cache) -> int:
    """Bytes of storage that ``cache`` really holds, exactly, on any device.

    Counts whole storages, each once: a view into a larger tensor holds on to all of it. Tensors are found in the cache,
    its layers and whatever objects those own, model modules excepted; quantised tensors are counted by their parts.
    """
    storages = (tensor.untyped_storage() for tensor in _tensors(cache, set()))
    return sum({(str(storage.device), storage.data_ptr()): storage.nbytes() for storage in storages}.values())


def measure_memory(
    model: PreTrainedModel, method: Method, prompt: Tensor, *, prefill_chunk: int | None = None
) -> MemoryUse:
    """Prefill ``prompt`` once and read the memory it takes. Never part of a timed run: reading costs time.

    Args:
        model: on the device to be measured.
        method: makes the cache.
        prompt: (1, n) token ids on the model's device.
        prefill_chunk: tokens a forward pass takes at most; None sends the prompt whole.
    """
    gc.collect()
    with torch.inference_mode(), method(model) as new_cache, PeakMemory(prompt.device) as peak:
        cache = new_cache()
        prefill(model, prompt, cache, chunk=prefill_chunk)
        synchronize(prompt.device)
    return MemoryUse(cache_bytes=cache_bytes(cache), device=tuple(peak.readings))


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

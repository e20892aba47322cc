"""Where the time of a decoded token goes, and the least that it could take."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache, PreTrainedModel

from knormpress.cache import attention

__all__ = ["PARTS", "Spent", "bytes_a_second", "spent"]

PARTS = ("weights", "attention", "cache", "the rest")


class Spent(NamedTuple):
    """Seconds of one decoded token, by ``PARTS``, and the bytes that it must read: weights, keys and values."""

    seconds: dict[str, float]
    read: int


def spent(model: PreTrainedModel, cache: Cache, step: Callable[[], object], *, tokens: int) -> Spent:
    """Time ``tokens`` calls of ``step``, each of which decodes into ``cache``; the median of each part."""
    rounds = []
    with _parts(model, cache) as parts:
        for _ in range(tokens):
            parts.clear()
            start = time.perf_counter()
            step()
            whole = time.perf_counter() - start
            rounds.append({**parts, "the rest": whole - parts.total()})
    tensors = [*model.parameters(), *(part for layer in cache.layers for part in (layer.keys, layer.values))]
    return Spent({part: median(each[part] for each in rounds) for part in PARTS}, sum(each.nbytes for each in tensors))


@contextmanager
def _parts(model: PreTrainedModel, cache: Cache) -> Iterator[Counter[str]]:
    """Sums of seconds: in linear layers, in attention without them, and in the cache with its masks."""
    parts: Counter[str] = Counter()

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                parts[part] += time.perf_counter() - start

        return run

    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    calls = [
        *(("weights", linear, "forward") for linear in linears),
        ("attention", functional, "scaled_dot_product_attention"),
        ("attention", attention, "split_attention"),
        *(("cache", cache, name) for name in ("update", "mask_for") if hasattr(cache, name)),
    ]
    with ExitStack() as patches:
        for part, owner, name in calls:
            patches.enter_context(patch.object(owner, name, timed(part, getattr(owner, name))))
        yield parts


def bytes_a_second() -> float:
    """How fast this machine reads memory: the best of ten sums of 256 MiB."""
    block = torch.ones(1 << 26)

    def seconds() -> float:
        start = time.perf_counter()
        block.sum()
        return time.perf_counter() - start

    return block.nbytes / min(seconds() for _ in range(10))

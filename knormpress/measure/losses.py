"""Known losses, planted into any method on purpose: they show which gates would see them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from knormpress.cache.hooks import is_attention
from knormpress.cache.layer import KnormLayer
from knormpress.cache.scores.controls import random_order
from knormpress.errors import KnormError
from knormpress.measure.memory import cache_bytes
from knormpress.methods.full import FullCache
from knormpress.methods.method import Method
from knormpress.records.retrieval import Retrieval

__all__ = ["LOSSES", "Loss", "UnplantableError"]


class UnplantableError(KnormError):
    """The loss can't be planted into this method."""


@dataclass(frozen=True)
class Loss:
    """A loss, and how to plant it.

    Args:
        title: the loss in words.
        kinds: the measurements that it changes, as fields of ``records.schema.Result``.
        method: makes a method that loses so much from a sound one.
        retrieval: what is found with the loss.
    """

    title: str
    kinds: frozenset[str]
    method: Callable[[Method], Method] = field(default_factory=lambda: lambda method: method)
    retrieval: Callable[[Retrieval], Retrieval] = field(default_factory=lambda: lambda retrieval: retrieval)


def _hooked(hooks: Callable[[PreTrainedModel, list[Cache]], Iterator[Any]]) -> Callable[[Method], Method]:
    """Methods with hooks on the model, which may use the caches made so far."""

    def plant(method: Method) -> Method:
        @contextmanager
        def planted(model: PreTrainedModel) -> Iterator[Callable[[], Cache]]:
            made: list[Cache] = []
            with ExitStack() as stack, method(model) as new_cache:
                for handle in hooks(model, made):
                    stack.callback(handle.remove)

                def make() -> Cache:
                    made[:] = [new_cache()]
                    return made[0]

                yield make

        return planted

    return plant


def _larger(model: PreTrainedModel, made: list[Cache]) -> Iterator[Any]:
    def add(*_: Any) -> None:
        for cache in made:
            vars(cache).pop("planted", None)
            extra = torch.empty(cache_bytes(cache) // 20, dtype=torch.uint8)
            vars(cache)["planted"] = extra

    yield model.register_forward_hook(add)


def _reading(model: PreTrainedModel, made: list[Cache]) -> Iterator[Any]:
    def read(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        hidden[0, 0, 0].item()

    for module in model.modules():
        if is_attention(module):
            yield module.register_forward_pre_hook(read, with_kwargs=True)


def _slower(model: PreTrainedModel, made: list[Cache]) -> Iterator[Any]:
    since = 0.0

    def begin(*_: Any) -> None:
        nonlocal since
        since = time.perf_counter()

    def wait(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        ids: Tensor = args[0] if args else kwargs["input_ids"]
        if ids.shape[-1] == 1:
            time.sleep((time.perf_counter() - since) / 10)

    yield model.register_forward_pre_hook(begin)
    yield model.register_forward_hook(wait, with_kwargs=True)


def _one_layer_at_random(method: Method) -> Method:
    @contextmanager
    def planted(model: PreTrainedModel) -> Iterator[Callable[[], Cache]]:
        with method(model) as new_cache:

            def make() -> Cache:
                cache = new_cache()
                pruned = [layer for layer in cache.layers if isinstance(layer, KnormLayer) and layer.ratio < 1.0]
                if not pruned:
                    raise UnplantableError("no layer chooses tokens by a score; wanted a KnormCache that prunes")
                # In the middle layers of some models random tokens are as good as any; in a late one they are a loss.
                pruned[len(pruned) * 5 // 6].score = random_order
                return cache

            yield make

    return planted


def _ten_points_lower(retrieval: Retrieval) -> Retrieval:
    found = [place for place, item in enumerate(retrieval.items) if item.candidate.found]
    lost = min(len(found), -(-len(retrieval.items) // 10))
    chosen = {found[number * len(found) // lost] for number in range(lost)}
    items = [
        item.model_copy(update={"candidate": item.candidate.model_copy(update={"found": False})})
        if place in chosen
        else item
        for place, item in enumerate(retrieval.items)
    ]
    return retrieval.model_copy(update={"items": tuple(items)})


_ALL: Final = frozenset({"latency", "memory", "quality", "retrieval", "cost"})

LOSSES: Final[dict[str, Loss]] = {
    "bytes": Loss("5 % more bytes in the cache", frozenset({"memory"}), _hooked(_larger)),
    "host-read": Loss("one more host read a layer", frozenset({"cost"}), _hooked(_reading)),
    "decode-time": Loss("a tenth more time for each decoded token", frozenset({"latency"}), _hooked(_slower)),
    "random-layer": Loss("one layer keeps random tokens", frozenset({"quality", "retrieval"}), _one_layer_at_random),
    "retrieval": Loss("ten of 100 items no longer found", frozenset({"retrieval"}), retrieval=_ten_points_lower),
    "never-evicts": Loss("a full cache under the method's name", _ALL, lambda method: FullCache()),
}
"""The losses by name."""

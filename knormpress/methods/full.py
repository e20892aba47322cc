"""The full cache, which every method is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import Cache, DynamicCache, PreTrainedModel

__all__ = ["FullCache"]


@dataclass(frozen=True)
class FullCache:
    """The full cache: transformers' own cache for the model, which drops nothing."""

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[Callable[[], Cache]]:
        yield lambda: DynamicCache(config=model.config)

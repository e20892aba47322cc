"""Context managers in which ``generate()`` uses another cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Cache, PreTrainedModel

from knormpress.cache.cache import KnormCache
from knormpress.cache.layer import Score
from knormpress.cache.pruning import key_norms
from knormpress.policy.policy import Policy

__all__ = ["generation_through", "pruned_generation"]


@contextmanager
def pruned_generation(
    model: PreTrainedModel, press: Policy, score: Score = key_norms
) -> Iterator[Callable[[], KnormCache]]:
    """Give every ``generate()`` of ``model`` a fresh ``KnormCache``, see ``generation_through``.

    Yields a function that makes such a cache.
    """

    def new_cache() -> KnormCache:
        return KnormCache(model, press, score)

    new_cache()  # raise errors about the model or the press here, not during generation
    with generation_through(model, new_cache):
        yield new_cache


@contextmanager
def generation_through(model: PreTrainedModel, new_cache: Callable[[], Cache]) -> Iterator[None]:
    """Give every ``generate()`` of ``model`` a cache from ``new_cache``, unless the call passes a cache or disables it.

    Contexts may be nested: the innermost one is used.
    """

    def generate(*args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config
        if kwargs.get("past_key_values") is None and kwargs.get("use_cache", config.use_cache) is not False:
            kwargs["past_key_values"] = new_cache()
        return original(*args, **kwargs)

    target: Any = model
    original = target.generate
    outer = vars(model).get("generate")
    target.generate = generate
    try:
        yield
    finally:
        if outer is None:
            del target.generate
        else:
            target.generate = outer

"""``generate()`` with another cache, for as long as a context lasts."""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from transformers import Cache, PreTrainedModel

from knormpress.cache.cache import KnormCache
from knormpress.cache.score import Score
from knormpress.errors import KnormError
from knormpress.policy.policy import Policy

__all__ = ["generation_through", "pruned_generation"]


@contextmanager
def pruned_generation(
    model: PreTrainedModel, press: Policy, score: Score | None = None, prefill_chunk: int | None = None
) -> Iterator[Callable[[], KnormCache]]:
    """Give every ``generate()`` of ``model`` a fresh ``KnormCache``, see ``generation_through``.

    Yields a function that makes such a cache.
    """

    def new_cache() -> KnormCache:
        return KnormCache(model, press, score)

    new_cache()  # raise errors about the model or the press here, not during generation
    with generation_through(model, new_cache, prefill_chunk):
        yield new_cache


@contextmanager
def generation_through(
    model: PreTrainedModel, new_cache: Callable[[], Cache], prefill_chunk: int | None = None
) -> Iterator[None]:
    """Give every ``generate()`` of ``model`` a cache from ``new_cache``, unless the call passes a cache or disables it.

    With ``prefill_chunk``, the prompt is sent in chunks of at most so many tokens; it stands for the
    ``prefill_chunk_size`` of ``generate()``, where the call gives none.

    Contexts may be nested, in any order of leaving: the innermost one that is open is used. A context counts for the
    thread or asyncio task that opened it, and for tasks started inside it; another thread opens its own.
    """
    # torch.compile's wrapper hands `generate` on to the model inside it.
    if prefill_chunk is not None and prefill_chunk < 1:
        raise KnormError(f"prefill_chunk is {prefill_chunk}; wanted at least 1 token")
    opened = _Opened(_Generate.on(getattr(model, "_orig_mod", model)), new_cache, prefill_chunk)
    _stack.set((*_stack.get(), opened))
    try:
        yield
    finally:
        opened.is_open = False
        _stack.set(tuple(other for other in _stack.get() if other is not opened))
        opened.wrapper.leave()


class _Opened:
    """One context. Tasks that were started inside it still know it when it has ended, so it says whether it has."""

    def __init__(self, wrapper: _Generate, new_cache: Callable[[], Cache], prefill_chunk: int | None) -> None:
        self.wrapper, self.new_cache, self.prefill_chunk, self.is_open = wrapper, new_cache, prefill_chunk, True


class _Generate:
    """``generate`` of one model while contexts are open; there is one, however many they are."""

    _lock = threading.RLock()

    @classmethod
    def on(cls, model: Any) -> _Generate:
        """The wrapper of ``model``, put in place if no context is open; each call needs one ``leave``."""
        with cls._lock:
            wrapper = vars(model).get("generate")
            if not isinstance(wrapper, _Generate):
                wrapper = cls(model)
                model.generate = wrapper
            wrapper.users += 1
            return wrapper

    def __init__(self, model: Any) -> None:
        self.users = 0
        self._model = weakref.ref(model)
        self._own = vars(model).get("generate")
        self._original = model.generate
        functools.update_wrapper(self, self._original)

    def leave(self) -> None:
        """Take the wrapper away with its last context, unless somebody has put another one over it."""
        with self._lock:
            self.users -= 1
            model = self._model()
            if self.users or model is None or vars(model).get("generate") is not self:
                return
            if self._own is None:
                del model.generate
            else:
                model.generate = self._own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        opened = [one for one in _stack.get() if one.wrapper is self and one.is_open]
        model = self._model()
        if opened and model is not None and kwargs.get("past_key_values") is None:
            config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config
            if kwargs.get("use_cache", config.use_cache) is not False:
                kwargs["past_key_values"] = opened[-1].new_cache()
                if opened[-1].prefill_chunk is not None and config.prefill_chunk_size is None:
                    kwargs.setdefault("prefill_chunk_size", opened[-1].prefill_chunk)
        return self._original(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied: Any = memo.get(id(self._model()))
        return self if copied is None else types.MethodType(type(copied).generate, copied)

    def __reduce__(self) -> Any:
        return getattr, (self._model(), "generate")


_stack: ContextVar[tuple[_Opened, ...]] = ContextVar("knormpress_generation", default=())

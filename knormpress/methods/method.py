"""The type of a method: a callable that takes the model and gives a context in which fresh caches are made."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

from transformers import Cache, PreTrainedModel

from knormpress.errors import KnormError
from knormpress.methods.knorm import KnormPress
from knormpress.policy.policy import Policy

__all__ = ["Method", "MethodFactory", "caches_of", "describe_method", "policy_of"]

Method: TypeAlias = Callable[[PreTrainedModel], AbstractContextManager[Callable[[], Cache]]]
"""``with method(model) as new_cache``: inside the context each call of ``new_cache`` makes a cache of the method."""

MethodFactory: TypeAlias = Callable[[KnormPress], Method]
"""What the name of a method stands for: called with the policy under test, it returns the method."""


@contextmanager
def caches_of(method: Method, model: PreTrainedModel) -> Iterator[Callable[[], Cache]]:
    """The context of ``method``, whose function is checked to make caches.

    Raises:
        KnormError: ``method`` gives no context with a function in it, or what the function makes is not a transformers
            cache, so that the model would use one of its own.
    """
    context: Any = method(model)
    if not hasattr(context, "__enter__"):
        raise KnormError(
            f"{describe_method(method)} returned a {type(context).__name__} for the model; wanted a context manager"
        )
    with context as new_cache:
        if not callable(new_cache):
            raise KnormError(
                f"{describe_method(method)} yields a {type(new_cache).__name__}; wanted a function that makes a fresh "
                "transformers Cache"
            )

        def checked() -> Cache:
            cache = new_cache()
            if not isinstance(cache, Cache):
                raise KnormError(
                    f"{describe_method(method)} made a {type(cache).__name__}; wanted a fresh transformers Cache"
                )
            return cache

        yield checked


def policy_of(method: Method) -> Policy | None:
    """The policy that a method says it follows: itself, or its ``press``."""
    policy = getattr(method, "press", method)
    return policy if isinstance(policy, Policy) else None


def describe_method(method: Any) -> str:
    """A text for ``method`` that is the same for equal methods, in every process."""
    if is_dataclass(method) and not isinstance(method, type):
        # A field that was added later is left out while it has its default, so that the history stays.
        told = (
            each for each in fields(method) if not each.metadata.get("added") or getattr(method, each.name) is not None
        )
        values = ((each.name, getattr(method, each.name)) for each in told)
        return f"{type(method).__qualname__}({', '.join(f'{name}={describe_method(value)}' for name, value in values)})"
    if isinstance(method, functools.partial):
        parts = [*method.args, *(f"{name}={describe_method(value)}" for name, value in method.keywords.items())]
        return f"{describe_method(method.func)}({', '.join(map(str, parts))})"
    if isinstance(method, str | int | float | tuple | list | None):
        return repr(method)
    definition = method if hasattr(method, "__qualname__") else type(method)
    module = definition.__module__
    if module.startswith("knormpress."):
        module = "knormpress.methods"  # wherever it is, so that moving code keeps the history
    return f"{module}.{definition.__qualname__}"

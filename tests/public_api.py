"""What a module promises, and what its docstrings leave unsaid."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

MANY = 2


def faults(module: ModuleType) -> Iterator[str]:
    """What is wrong with the public names of ``module``, each in a few words.

    A name is public that ``__all__`` holds; a package that only holds modules needs none. Each has to exist; modules,
    classes, functions, and a class's public methods and properties need a docstring; where more than two parameters
    are taken, the docstring (for ``__init__`` that of the class) has to name one of them at least. What is defined
    without an underscore has to be in ``__all__``.
    """
    name = module.__name__
    if not module.__doc__:
        yield f"{name} has no docstring"
    listed = getattr(module, "__all__", None)
    own = {public: value for public, value in vars(module).items() if _is_from(module, value)}
    if listed is None:
        if own or not hasattr(module, "__path__"):
            yield f"{name} has no __all__"
        return
    for public in listed:
        if not hasattr(module, public):
            yield f"{name}.{public} is listed and not there"
        elif public in own:
            yield from _unsaid(f"{name}.{public}", own[public])
    for public in own:
        if not public.startswith("_") and public not in listed:
            yield f"{name}.{public} is public and not listed"


def _is_from(module: ModuleType, value: Any) -> bool:
    return (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module.__name__


def _unsaid(name: str, value: Any) -> Iterator[str]:
    words = value.__doc__ or ""
    # A dataclass without a docstring is given its signature for one.
    if not words or words.startswith(f"{value.__name__}("):
        yield f"{name} has no docstring"
        return
    if inspect.isfunction(value):
        yield from _unnamed(name, value, words)
        return
    if "__init__" in vars(value):
        yield from _unnamed(name, value.__init__, words)
    for attribute, member in vars(value).items():
        function = _function(member)
        if attribute.startswith("_") or function is None:
            continue
        own = f"{name}.{attribute}"
        if not function.__doc__:
            yield f"{own} has no docstring"
        else:
            yield from _unnamed(own, function, function.__doc__)


def _function(value: Any) -> Callable[..., Any] | None:
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    return value if inspect.isfunction(value) else None


def _unnamed(name: str, function: Callable[..., Any], words: str) -> Iterator[str]:
    taken = [parameter for parameter in inspect.signature(function).parameters if parameter not in ("self", "cls")]
    if len(taken) > MANY and not any(re.search(rf"\b{re.escape(parameter)}\b", words) for parameter in taken):
        yield f"{name} names none of its parameters {', '.join(taken)}"

"""The registry of cache methods: the full cache, key norms, and the controls that a gate must be seen to fail.

A method is a callable that takes the model and returns a context manager yielding a function that makes a fresh cache.
Other packages add theirs under the entry point group ``knormpress.methods``; a method that is not packaged is named as
``module:object``. Both name a *factory*: called with the ``KnormPress`` under test, for its ``keep_ratio`` and the rest
of the policy, it returns the method. Where a press of the kvpress library is named or returned, it is made a method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from knormpress.cache import Score, pruned_generation
from knormpress.errors import KnormError
from knormpress.kvpress_adapter import KvpressMethod, is_kvpress
from knormpress.metrics import Method
from knormpress.press import KnormPress
from knormpress.pruning import key_norms

__all__ = [
    "FullCache",
    "MethodFactory",
    "ScoredPress",
    "highest_norm",
    "key_difference",
    "make_method",
    "method_names",
    "random_order",
    "recent_window",
]

MethodFactory: TypeAlias = Callable[[KnormPress], Method]

ENTRY_POINT_GROUP = "knormpress.methods"

# The first tokens draw attention whatever they say: Xiao et al., ICLR 2024, arXiv 2309.17453, who keep four of them.
_SINKS = 4
_BELOW_ANY_AGE = -(2**30)

# 31 bits, so that no product of the mixing overflows 64.
_BITS = 0x7FFFFFFF


@dataclass(frozen=True)
class FullCache:
    """The baseline: transformers' own cache for the model, nothing dropped."""

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[Callable[[], Cache]]:
        yield lambda: DynamicCache(config=model.config)


@dataclass(frozen=True)
class ScoredPress:
    """A press that prunes by another score than the key norm, and is the same in everything else.

    Args:
        press: how many tokens to keep, and when.
        score: takes keys (B, H, n, D), integer positions (B, H, n) and the layer's index, returns finite floats
            (B, H, n); the tokens with the lowest are kept.
    """

    press: KnormPress
    score: Score

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[Callable[[], Cache]]:
        return pruned_generation(model, self.press, self.score)


def highest_norm(keys: Tensor, *_: object) -> Tensor:
    """The negative control: keeps the keys that the method drops, the highest norms."""
    return -key_norms(keys)


def random_order(keys: Tensor, positions: Tensor, layer: int) -> Tensor:
    """Keep a random choice of each layer and head, the same on every device and in every run.

    A token's score never changes, so pruning again keeps a uniform choice of all tokens seen.
    """
    heads = torch.arange(keys.shape[1], device=keys.device).view(1, -1, 1)
    # The constant keeps the first token of the first head from mixing to 0, which would always be kept.
    place = heads * 0x85EBCA6B + layer * 0xC2B2AE35 + 0x27D4EB2F
    mixed = (positions.to(torch.int64) * 0x9E3779B1 + place) & _BITS
    for factor in (0x2C1B3C6D, 0x297A2D39):
        mixed = mixed ^ (mixed >> 15)
        mixed = (mixed * factor) & _BITS
    # The upper 24 bits: what float32 holds exactly.
    return (mixed >> 7).float().expand(keys.shape[:-1])


def recent_window(keys: Tensor, positions: Tensor, *_: object) -> Tensor:
    """Keep the first few tokens and the newest, as StreamingLLM does (Xiao et al., ICLR 2024, arXiv 2309.17453).

    A ``layer.Score``: ``keys`` (B, H, n, D) and ``positions`` (B, H, n) to scores (B, H, n), the lowest being kept.
    """
    age = torch.where(positions < _SINKS, _BELOW_ANY_AGE, -positions)
    return age.float().expand(keys.shape[:-1])


def key_difference(keys: Tensor, *_: object) -> Tensor:
    """Keep the keys that point away from the mean of all, as KeyDiff does (Park et al., 2025, arXiv 2504.15364)."""
    directions = torch.nn.functional.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
    return torch.nn.functional.cosine_similarity(directions, directions.mean(dim=2, keepdim=True), dim=-1)


def _full(press: KnormPress) -> Method:
    if press.layer_keep_ratios is not None or press.keep_ratio != 1.0:
        raise KnormError(
            f'method "full" keeps every token, but keep_ratio is {press.keep_ratio}; use 1.0, or another method'
        )
    return FullCache()


def _scored(score: Score) -> MethodFactory:
    return partial(ScoredPress, score=score)


_BUILT_IN: dict[str, MethodFactory] = {
    "full": _full,
    "knorm": lambda press: press,
    "random": _scored(random_order),
    "highest-norm": _scored(highest_norm),
    "recent-window": _scored(recent_window),
    "keydiff": _scored(key_difference),
}


def method_names() -> list[str]:
    """The names ``make_method`` knows: the built-in ones, then those that installed packages add."""
    added = {entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)}
    return [*_BUILT_IN, *sorted(added - _BUILT_IN.keys())]


def make_method(name: str, press: KnormPress) -> Method:
    """The method called ``name``, under the policy ``press``.

    Args:
        name: one of ``method_names()``; or ``module:object`` for a factory of your own, or for a press of kvpress,
            such as ``kvpress:ExpectedAttentionPress``.
        press: the policy; a method that prunes by other rules takes from it what it can use.

    Raises:
        KnormError: there is no such method, or what was found under the name is not a factory of methods.
    """
    found = _BUILT_IN.get(name) or _added_by_package(name) or _from_module(name)
    method: Any = found
    if not is_kvpress(found):
        method = found(press) if callable(found) else None
    if is_kvpress(method):
        return KvpressMethod.of(method, press)
    if not callable(method):
        raise KnormError(
            f"{name!r} does not give a method; wanted a callable that takes a KnormPress and returns a method"
        )
    return cast(Method, method)


def _added_by_package(name: str) -> MethodFactory | None:
    for entry in entry_points(group=ENTRY_POINT_GROUP, name=name):
        try:
            factory: MethodFactory = entry.load()
        except (ImportError, AttributeError) as error:
            raise KnormError(f"method {name!r} stands for {entry.value}, which can't be loaded: {error}") from error
        return factory
    return None


def _from_module(name: str) -> Any:
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise KnormError(f"there is no method {name!r}; wanted one of {', '.join(method_names())}, or module:object")
    hint = "is its folder on PYTHONPATH?"
    if module_name.partition(".")[0] == "kvpress":
        # 0.5.5 wants transformers below 5.3, but works with later ones.
        hint = "install what is missing; pip install --no-deps kvpress, where its pin of transformers is in the way"
    try:
        return getattr(import_module(module_name), attribute)
    # Whatever somebody else's module raises when it is imported.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise KnormError(f"method {name!r} can't be loaded: {reason}; {hint}") from error

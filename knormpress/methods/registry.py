"""Methods by name: the built-in ones, those that installed packages add, and any ``module:object``.

Packages add methods through the entry point group ``knormpress.methods``; a method without a package is named as
``module:object``. Both name a *factory*: called with the ``KnormPress`` under test, which holds the policy, it returns
the method. A press of the kvpress library may be used in place of a factory or a method.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, cast

from knormpress.cache.score import Score
from knormpress.cache.scores.named import SCORES
from knormpress.errors import KnormError
from knormpress.methods.full import FullCache
from knormpress.methods.knorm import KnormPress
from knormpress.methods.kvpress import KvpressMethod, is_kvpress
from knormpress.methods.method import Method, MethodFactory
from knormpress.methods.scores import ScoredPress

__all__ = ["make_method", "method_names"]

ENTRY_POINT_GROUP = "knormpress.methods"


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
    **{name: _scored(score) for name, score in SCORES.items()},
    "knorm": lambda press: press,
}


def method_names() -> list[str]:
    """The names that ``make_method`` accepts: the built-in methods, then those that installed packages add."""
    added = {entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)}
    return [*_BUILT_IN, *sorted(added - _BUILT_IN.keys())]


def make_method(name: str, press: KnormPress) -> Method:
    """The method called ``name``, under the policy ``press``.

    Args:
        name: one of ``method_names()``; or ``module:object`` for your own factory, or for a press of kvpress, such as
            ``kvpress:ExpectedAttentionPress``.
        press: the policy; a method with other rules uses the fields that apply to it.

    Raises:
        KnormError: there is no such method, or the name does not stand for a factory of methods.
    """
    factory = _BUILT_IN.get(name) or _added_by_package(name) or _from_module(name)
    method: Any = factory
    if not is_kvpress(factory):
        method = factory(press) if callable(factory) else None
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
    hint = "put its folder on PYTHONPATH"
    if module_name.partition(".")[0] == "kvpress":
        # kvpress 0.5.5 requires transformers below 5.3, but works with later versions.
        hint = (
            "install the missing package, or kvpress without its limit on transformers: pip install --no-deps kvpress"
        )
    try:
        return getattr(import_module(module_name), attribute)
    # The module is the user's, and may raise anything when it is imported.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise KnormError(f"method {name!r} can't be loaded: {reason}; {hint}") from error

"""KnormPress: keep the cached tokens whose keys have the lowest L2 norm, and measure what that costs and gains."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from knormpress.errors import KnormError
from knormpress.press import KnormPress

if TYPE_CHECKING:
    from knormpress.cache import KnormCache, LayerStats

__all__ = ["KnormCache", "KnormError", "KnormPress", "LayerStats", "__version__"]

__version__ = "0.1.0"

_LAZY = {"KnormCache": "knormpress.cache", "LayerStats": "knormpress.cache"}


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import; `knormpress --help` and the policy do without it.
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

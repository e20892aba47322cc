"""KnormPress: keep the cached tokens whose keys have the lowest L2 norm, and measure what that costs and gains."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from knormpress.errors import KnormError
from knormpress.methods.knorm import KnormPress

if TYPE_CHECKING:
    from knormpress.cache.cache import KnormCache
    from knormpress.cache.layer import LayerStats

__all__ = ["KnormCache", "KnormError", "KnormPress", "LayerStats", "__version__"]

__version__ = "0.1.0"

_LAZY = {"KnormCache": "knormpress.cache.cache", "LayerStats": "knormpress.cache.layer"}


def __getattr__(name: str) -> Any:
    # Importing transformers takes seconds; `knormpress --help` and the policy don't need it.
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

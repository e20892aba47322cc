"""Silence where models are read, so that only KnormPress says something."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import transformers

__all__ = ["quiet"]


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off progress bars and log lines of transformers and accelerate inside the context."""
    logs, spreading = transformers.utils.logging, logging.getLogger("accelerate")
    verbosity, bars, level = logs.get_verbosity(), logs.is_progress_bar_enabled(), spreading.level
    logs.set_verbosity(logs.CRITICAL)
    logs.disable_progress_bar()
    spreading.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        spreading.setLevel(level)
        if bars:
            logs.enable_progress_bar()

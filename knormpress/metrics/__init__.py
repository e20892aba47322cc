"""Numbers from a model and a method: time, memory, quality.

Measuring code knows methods only: a callable that takes the model and returns a context manager yielding a function
that makes a fresh cache (``with method(model) as new_cache``).
"""

from knormpress.metrics.forward import Method, prefill
from knormpress.metrics.latency import Repeat, TimedPairs, Timing, time_generation, time_in_turn, until_enough
from knormpress.metrics.memory import MemoryUse, cache_bytes, measure_memory
from knormpress.metrics.quality import DocumentQuality, MethodScore, score_document

__all__ = [
    "DocumentQuality",
    "MemoryUse",
    "Method",
    "MethodScore",
    "Repeat",
    "TimedPairs",
    "Timing",
    "cache_bytes",
    "measure_memory",
    "prefill",
    "score_document",
    "time_generation",
    "time_in_turn",
    "until_enough",
]

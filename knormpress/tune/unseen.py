"""Measure a plan, other plans and other methods on documents and items that the search did not use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knormpress.cache.cache import KnormCache
from knormpress.cache.layer import KnormLayer
from knormpress.measure.prefill import prefill
from knormpress.measure.quality import measure_quality
from knormpress.measure.retrieval import measure_retrieval
from knormpress.methods.knorm import KnormPress
from knormpress.methods.registry import make_method
from knormpress.progress import Progress, ticking
from knormpress.records.plan import KeptTokens, Point
from knormpress.records.retrieval import Retrieval
from knormpress.workload.bench import Bench
from knormpress.workload.tasks.haystack import Haystack

__all__ = ["Tried", "kept_tokens", "measure_unseen"]

_SHOWN_TOKENS = 96


@dataclass(frozen=True)
class Tried:
    """A policy to measure: its name in the frontier, and its method."""

    name: str
    press: KnormPress
    method: str = "knorm"


def measure_unseen(
    bench: Bench,
    tried: Sequence[Tried],
    texts: Sequence[Tensor],
    *,
    context: int,
    haystacks: Sequence[Haystack],
    progress: Progress,
) -> tuple[Point, ...]:
    """Measure perplexity and retrieval of every policy.

    Args:
        bench: the model.
        tried: the policies.
        texts: token ids (1, context + S + 1) each.
        context: tokens before the first token that is fed.
        haystacks: held-out texts with something to find, if any.
        progress: gets a step for each text.
    """
    methods = [make_method(candidate.method, candidate.press) for candidate in tried]
    tick = ticking(progress, len(texts), "perplexity on unseen documents")
    qualities = measure_quality(bench.model, methods, texts, context=context, after_document=tick)
    found: Sequence[Retrieval | None] = [None] * len(tried)
    if haystacks:
        tick = ticking(progress, len(haystacks), "what is found in unseen texts")
        found = measure_retrieval(bench.model, methods, haystacks, after_text=tick)
    return tuple(
        Point.of(candidate.name, candidate.press, quality, layers=bench.layers, retrieval=retrieval)
        for candidate, quality, retrieval in zip(tried, qualities, found, strict=True)
    )


def kept_tokens(bench: Bench, press: KnormPress, prompt: Tensor) -> KeptTokens:
    """Which tokens from the middle of ``prompt`` (1, n) are kept, for each layer."""
    cache = KnormCache(bench.model, press)
    with torch.inference_mode():
        prefill(bench.model, prompt, cache)
    start = prompt.shape[-1] // 2
    end = min(start + _SHOWN_TOKENS, prompt.shape[-1])
    shares = []
    for layer in cache.layers:
        assert isinstance(layer, KnormLayer)
        positions = layer.positions[0].long().cpu()
        kept = torch.zeros(positions.shape[0], prompt.shape[-1]).scatter_(1, positions, 1.0)
        shares.append(tuple(round(share, 3) for share in kept.mean(dim=0)[start:end].tolist()))
    tokens = [bench.tokenizer.decode([token]) for token in prompt[0, start:end].tolist()]
    return KeptTokens(tokens=tuple(tokens), layers=tuple(shares))

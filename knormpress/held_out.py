"""What a plan is worth on documents and passkeys that its search did not see, beside other methods and plans."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knormpress import bench as benches
from knormpress.bench import Bench
from knormpress.cache import KnormCache, KnormLayer
from knormpress.changes import ppl_change
from knormpress.methods import FullCache, make_method
from knormpress.metrics import Method, prefill
from knormpress.metrics.passkey import score_passkey
from knormpress.plan import KeptTokens, Point
from knormpress.press import KnormPress
from knormpress.progress import Progress, ticking

__all__ = ["Tried", "ask_passkeys", "kept_tokens", "mean_keep", "measure_unseen"]

_SHOWN_TOKENS = 96


@dataclass(frozen=True)
class Tried:
    """A policy to measure: its name in the frontier, the method it is handed to, and whether passkeys are asked."""

    name: str
    press: KnormPress
    method: str = "knorm"
    passkeys: bool = True


def measure_unseen(
    bench: Bench, tried: Sequence[Tried], texts: Sequence[Tensor], *, context: int, passkeys: int, progress: Progress
) -> tuple[Point, ...]:
    """Perplexity and passkeys of every policy.

    Args:
        bench: the model.
        tried: the policies.
        texts: (1, context + S + 1) ids each.
        context: tokens before the first scored prediction's input.
        passkeys: how many held-out prompts are asked; 0 asks none.
        progress: told of every text and prompt.
    """
    methods = [make_method(one.method, one.press) for one in tried]
    tick = ticking(progress, len(texts), "perplexity on unseen documents")
    qualities = benches.quality(bench, texts, methods, context=context, prefill_chunk=None, after_document=tick)
    asked = [index for index, one in enumerate(tried) if one.passkeys and passkeys]
    answers = dict(
        zip(asked, ask_passkeys(bench, [methods[index] for index in asked], passkeys, progress), strict=True)
    )
    points = []
    for index, (one, quality) in enumerate(zip(tried, qualities, strict=True)):
        change = ppl_change(quality.documents)
        points.append(
            Point(
                name=one.name,
                press=one.press,
                mean_keep=mean_keep(one.press, bench.layers),
                ppl=(change.percent, *change.ends),
                kl=statistics.fmean(document.kl for document in quality.documents),
                passkeys=answers.get(index),
            )
        )
    return tuple(points)


def kept_tokens(bench: Bench, press: KnormPress, prompt: Tensor) -> KeptTokens:
    """Which tokens from the middle of ``prompt`` (1, n) stay, layer by layer."""
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
    return KeptTokens(tuple(tokens), tuple(shares))


def mean_keep(press: KnormPress, layers: int) -> float:
    """Mean of the keep ratios of a model's layers."""
    return statistics.fmean(press.ratios(layers))


def ask_passkeys(
    bench: Bench, methods: Sequence[Method], count: int, progress: Progress | None = None
) -> list[tuple[int, int]]:
    """Ask each method's cache for ``count`` held-out keys: how many it found, of those that the full cache finds."""
    if not methods:
        return []
    prompts = bench.passkeys(count=count, which="held-out")
    tick = ticking(progress or Progress(), count, "unseen passkeys")
    found, known = [0] * len(methods), 0
    for prompt in prompts:
        full, scores = score_passkey(bench.model, prompt, FullCache(), methods)
        if full.found:
            known += 1
            found = [before + score.found for before, score in zip(found, scores, strict=True)]
        tick()
    return [(number, known) for number in found]

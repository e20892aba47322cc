"""Keep the keys and values that are long beside their neighbours' (CurDKV, Sengupta et al., arXiv 2509.15038)."""

from __future__ import annotations

import torch
from torch import Tensor

from knormpress.cache.score import StoredTokens
from knormpress.cache.scores.windows import window_sums

__all__ = ["leverage"]

_WINDOW, _SINKS = 16, 4


def leverage(tokens: StoredTokens) -> Tensor:
    """-(share of the squared key norms x share of the squared value norms) (B, H, n) in a window of 16 stored tokens.

    The first four tokens of a row come before all others. Squared norms stand for leverage scores, and windows for the
    whole text, as in kvpress's ``CURPress``.
    """
    dtype = torch.promote_types(tokens.keys.dtype, torch.float32)
    squares = torch.stack([held.to(dtype).square().sum(dim=-1) for held in (tokens.keys, tokens.values)], dim=-1)
    sums = window_sums(squares, tokens.real, _WINDOW).clamp(min=torch.finfo(dtype).tiny)
    shares = (squares / sums).prod(dim=-1)
    return -shares.masked_fill((tokens.positions >= 0) & (tokens.positions < _SINKS), 2)

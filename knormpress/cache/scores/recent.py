"""Keep the first tokens and the newest, as StreamingLLM does (Xiao et al., ICLR 2024, arXiv 2309.17453)."""

from __future__ import annotations

import torch
from torch import Tensor

from knormpress.cache.score import StoredTokens

__all__ = ["recent_window"]

# The first tokens get attention whatever they are; the paper keeps four of them.
_SINKS = 4
_BELOW_ANY_AGE = -(2**30)


def recent_window(tokens: StoredTokens) -> Tensor:
    """(B, H, n): below any other for the first four tokens of a row, then lower the newer a token is."""
    return torch.where(tokens.positions < _SINKS, _BELOW_ANY_AGE, -tokens.positions).float()

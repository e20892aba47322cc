"""Keep the keys that point away from the others (KeyDiff, Park et al., arXiv 2504.15364)."""

from __future__ import annotations

import torch
from torch import Tensor

from knormpress.cache.score import StoredTokens
from knormpress.cache.scores.windows import window_sums

__all__ = ["key_difference", "key_difference_in_windows"]

_WINDOW = 128


def key_difference(tokens: StoredTokens) -> Tensor:
    """Cosine similarity (B, H, n) of each key to the mean direction of its row's keys; the least similar are kept."""
    directions = _directions(tokens)
    # The sum points where the mean does, and a similarity has no length.
    mean = directions.masked_fill(~tokens.real[..., None], 0).sum(dim=2, keepdim=True)
    return torch.nn.functional.cosine_similarity(directions, mean, dim=-1)


def key_difference_in_windows(tokens: StoredTokens) -> Tensor:
    """As ``key_difference``, with the mean over a window of 128 stored tokens in place of all of the row's."""
    directions = _directions(tokens)
    return torch.nn.functional.cosine_similarity(directions, window_sums(directions, tokens.real, _WINDOW), dim=-1)


def _directions(tokens: StoredTokens) -> Tensor:
    keys = tokens.keys.to(torch.promote_types(tokens.keys.dtype, torch.float32))
    return torch.nn.functional.normalize(keys, dim=-1)

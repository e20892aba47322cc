"""Negative controls, which a gate must fail: what KnormPress drops, and a random choice."""

from __future__ import annotations

import torch
from torch import Tensor

from knormpress.cache.score import StoredTokens, key_norms

__all__ = ["highest_norm", "random_order"]

# 31 bits, so that no product in the mixing exceeds 64 bits.
_BITS = 0x7FFFFFFF


def highest_norm(tokens: StoredTokens) -> Tensor:
    """Keep the keys with the highest norms, which KnormPress drops."""
    return -key_norms(tokens)


def random_order(tokens: StoredTokens) -> Tensor:
    """Keep random tokens in each layer and head, the same on every device and in every run.

    A token's score never changes, so repeated pruning keeps a uniform choice of all tokens seen.
    """
    heads = torch.arange(tokens.keys.shape[1], device=tokens.keys.device).view(1, -1, 1)
    # Without the constant the first token of the first head would mix to 0, and would always be kept.
    place = heads * 0x85EBCA6B + tokens.layer * 0xC2B2AE35 + 0x27D4EB2F
    mixed = (tokens.positions.to(torch.int64) * 0x9E3779B1 + place) & _BITS
    for factor in (0x2C1B3C6D, 0x297A2D39):
        mixed = mixed ^ (mixed >> 15)
        mixed = (mixed * factor) & _BITS
    # The upper 24 bits, which float32 holds exactly.
    return (mixed >> 7).float()

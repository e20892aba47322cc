"""Other scores than the key norm, under the same policy: two methods from papers, and two negative controls.

Gates must fail for the controls: ``highest_norm`` keeps what KnormPress drops; ``random_order`` keeps a random choice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from knormpress.cache.generation import pruned_generation
from knormpress.cache.layer import Score
from knormpress.cache.pruning import key_norms
from knormpress.methods.knorm import KnormPress

__all__ = ["ScoredPress", "highest_norm", "key_difference", "random_order", "recent_window"]

# The first tokens get attention whatever they are: Xiao et al., ICLR 2024, arXiv 2309.17453, who keep four of them.
_SINKS = 4
_BELOW_ANY_AGE = -(2**30)

# 31 bits, so that no product in the mixing exceeds 64 bits.
_BITS = 0x7FFFFFFF


@dataclass(frozen=True)
class ScoredPress:
    """A press that prunes by another score than the key norm; everything else is the same.

    Args:
        press: how many tokens to keep, and when.
        score: takes keys (B, H, n, D), integer positions (B, H, n) and the layer's index; returns finite floats
            (B, H, n). The tokens with the lowest are kept.
    """

    press: KnormPress
    score: Score

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[Callable[[], Cache]]:
        return pruned_generation(model, self.press, self.score)


def highest_norm(keys: Tensor, *_: object) -> Tensor:
    """A negative control: keep the keys with the highest norms, which KnormPress drops."""
    return -key_norms(keys)


def random_order(keys: Tensor, positions: Tensor, layer: int) -> Tensor:
    """A negative control: keep random tokens in each layer and head, the same on every device and in every run.

    A token's score never changes, so repeated pruning keeps a uniform choice of all tokens seen.
    """
    heads = torch.arange(keys.shape[1], device=keys.device).view(1, -1, 1)
    # Without the constant the first token of the first head would mix to 0, and would always be kept.
    place = heads * 0x85EBCA6B + layer * 0xC2B2AE35 + 0x27D4EB2F
    mixed = (positions.to(torch.int64) * 0x9E3779B1 + place) & _BITS
    for factor in (0x2C1B3C6D, 0x297A2D39):
        mixed = mixed ^ (mixed >> 15)
        mixed = (mixed * factor) & _BITS
    # The upper 24 bits, which float32 holds exactly.
    return (mixed >> 7).float().expand(keys.shape[:-1])


def recent_window(keys: Tensor, positions: Tensor, *_: object) -> Tensor:
    """Keep the first four tokens and the newest, as StreamingLLM does (Xiao et al., ICLR 2024, arXiv 2309.17453).

    A ``layer.Score``: from ``keys`` (B, H, n, D) and ``positions`` (B, H, n) to scores (B, H, n).
    """
    age = torch.where(positions < _SINKS, _BELOW_ANY_AGE, -positions)
    return age.float().expand(keys.shape[:-1])


def key_difference(keys: Tensor, *_: object) -> Tensor:
    """Keep the keys least similar to the mean direction, as KeyDiff does (Park et al., 2025, arXiv 2504.15364)."""
    directions = torch.nn.functional.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
    return torch.nn.functional.cosine_similarity(directions, directions.mean(dim=2, keepdim=True), dim=-1)

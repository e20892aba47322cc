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
from knormpress.cache.score import Score, StoredTokens, expect_score, key_norms
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
        score: ranks the stored tokens, see ``cache.score``; those with the lowest scores are kept.

    Raises:
        KnormError: ``score`` is not a function of one ``StoredTokens``.
    """

    press: KnormPress
    score: Score

    def __post_init__(self) -> None:
        expect_score(self.score)

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[Callable[[], Cache]]:
        return pruned_generation(model, self.press, self.score)


def highest_norm(tokens: StoredTokens) -> Tensor:
    """A negative control: keep the keys with the highest norms, which KnormPress drops."""
    return -key_norms(tokens)


def random_order(tokens: StoredTokens) -> Tensor:
    """A negative control: keep random tokens in each layer and head, the same on every device and in every run.

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


def recent_window(tokens: StoredTokens) -> Tensor:
    """Keep the first four tokens and the newest, as StreamingLLM does (Xiao et al., ICLR 2024, arXiv 2309.17453)."""
    return torch.where(tokens.positions < _SINKS, _BELOW_ANY_AGE, -tokens.positions).float()


def key_difference(tokens: StoredTokens) -> Tensor:
    """Keep the keys least similar to the mean direction, as KeyDiff does (Park et al., 2025, arXiv 2504.15364)."""
    keys = tokens.keys.to(torch.promote_types(tokens.keys.dtype, torch.float32))
    directions = torch.nn.functional.normalize(keys, dim=-1)
    # The sum points where the mean does, and a similarity has no length.
    mean = directions.masked_fill(~tokens.real[..., None], 0).sum(dim=2, keepdim=True)
    return torch.nn.functional.cosine_similarity(directions, mean, dim=-1)

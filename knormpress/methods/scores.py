"""A press that prunes by another score than the key norm, under the same policy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from transformers import Cache, PreTrainedModel

from knormpress.cache.generation import pruned_generation
from knormpress.cache.score import Score, expect_score
from knormpress.methods.knorm import KnormPress

__all__ = ["ScoredPress"]


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

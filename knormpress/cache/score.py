"""What ranks the stored tokens: a function from what a layer holds to one number for each token."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from knormpress.errors import KnormError

__all__ = ["Score", "StoredTokens", "expect_score", "key_norms", "name_of", "scores_of"]


@dataclass(frozen=True)
class StoredTokens:
    """What one layer holds when it prunes: B rows, H key-value heads, n slots in order of position, head size D.

    Args:
        keys: (B, H, n, D), with the rotation of their original position.
        values: (B, H, n, D).
        positions: (B, H, n), each token's place among its row's own tokens, from 0 and without padding; -1 marks a slot
            that holds padding or is empty.
        layer: the layer's index in the model.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    layer: int

    @property
    def real(self) -> Tensor:
        """(B, H, n): False where a slot holds padding or is empty. Scores of such slots are never used."""
        return self.positions >= 0


Score: TypeAlias = Callable[[StoredTokens], Tensor]
"""From what a layer holds to scores (B, H, n), finite for every real token; the tokens with the lowest are kept.

A row's scores must not depend on the other rows, nor on slots that are not real: then a row of a batch is pruned as it
would be alone.
"""


def key_norms(tokens: StoredTokens) -> Tensor:
    """L2 norm of each key, the score of Devoto et al. (arXiv 2406.11430).

    Returns:
        (B, H, n) in float32, or in float64 for float64 keys.
    """
    keys = tokens.keys
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    norms: Tensor = torch.linalg.vector_norm(keys, dim=-1, dtype=dtype)
    return norms


def expect_score(score: object) -> None:
    """Check that ``score`` can be called with one ``StoredTokens``.

    Raises:
        KnormError: it can't; scores once took keys, positions and the layer's index.
    """
    if not callable(score):
        raise KnormError(f"score is {score!r}; wanted a function of one StoredTokens, such as key_norms")
    try:
        inspect.signature(score).bind(object())
    except TypeError:
        raise KnormError(
            f"the score {name_of(score)} takes {inspect.signature(score)}; wanted a function of one StoredTokens: "
            "def score(tokens), with tokens.keys, tokens.values, tokens.positions, tokens.real and tokens.layer"
        ) from None
    except ValueError:  # a function without a signature
        pass


def scores_of(score: Score, tokens: StoredTokens, real: Tensor | None) -> tuple[Tensor, Tensor, str]:
    """The scores (B, H, n) of ``tokens``, with a check that nobody has waited for yet.

    Args:
        score: ranks them.
        tokens: what the layer holds.
        real: ``tokens.real``, or None if every slot is.

    Returns:
        the scores; a number that is 0 if they are finite for every real token, and else NaN; what to say of NaN.

    Raises:
        KnormError: the scores have another shape.
    """
    scores = score(tokens)
    shape = tuple(tokens.keys.shape[:-1])
    if not isinstance(scores, Tensor) or tuple(scores.shape) != shape:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise KnormError(f"the score {name_of(score)} returned {got}; wanted a tensor of shape (B, H, n) = {shape}")
    ranked = scores if real is None else scores.masked_fill(~real, 0)
    # Unlike with min and max, no NaN gets lost in a sum.
    return (
        scores,
        (ranked * 0).sum(),
        f"the score {name_of(score)} is NaN or infinite for a token of layer {tokens.layer}, so it can't be ranked; "
        "look for an overflow in the model, or use a wider dtype",
    )


def name_of(score: object) -> str:
    """The module of ``score``, and its name in it."""
    return f"{getattr(score, '__module__', '')}.{getattr(score, '__qualname__', repr(score))}"

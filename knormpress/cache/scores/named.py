"""The names of scores: what a plan and the command line write for them."""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

from knormpress.cache.score import Score, expect_score, key_norms
from knormpress.cache.scores.controls import highest_norm, random_order
from knormpress.cache.scores.keydiff import key_difference, key_difference_in_windows
from knormpress.cache.scores.leverage import leverage
from knormpress.cache.scores.recent import recent_window
from knormpress.errors import KnormError

__all__ = ["SCORES", "score_named"]

SCORES: dict[str, Score] = {
    "knorm": key_norms,
    "keydiff": key_difference,
    "keydiff-128": key_difference_in_windows,
    "leverage": leverage,
    "recent-window": recent_window,
    "random": random_order,
    "highest-norm": highest_norm,
}
"""The built-in scores by name."""


def score_named(name: str) -> Score:
    """The score called ``name``: a built-in one, or ``module:object`` for your own.

    Raises:
        KnormError: there is no such score, or the object is not a function of one ``StoredTokens``.
    """
    if name in SCORES:
        return SCORES[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise KnormError(f"there is no score {name!r}; wanted one of {', '.join(SCORES)}, or module:object")
    score: Any = None
    try:
        score = getattr(import_module(module), attribute)
    # The module is the user's, and may raise anything when it is imported.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise KnormError(f"score {name!r} can't be loaded: {reason}; put its folder on PYTHONPATH") from error
    expect_score(score)
    return cast(Score, score)

"""Perplexity through the pruned cache, and how far its predictions are from the full cache's.

A document's first ``context`` tokens are prefilled and pruned; the next tokens are then fed in one forward pass through
what is left, at their true positions, and the probability of each following token is read off. Nothing before the first
pruning is scored: it would be the full cache's score and hide the loss.

The scored tokens come in one pass, so the cache is not pruned again among them. Decoding prunes every
``prune_interval`` tokens, new ones too: what that costs more is not in these figures.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from knormpress.errors import KnormError
from knormpress.metrics.forward import Method, filled_cache, prefill
from knormpress.press import KnormPress

__all__ = ["DocumentQuality", "MethodScore", "score_document"]

# Rows of logits that are compared at a time: (8, V) in float64 is 3 MB for a vocabulary of 49,000. The probabilities
# of the full cache are held whole: (256, V) is 100 MB.
_ROWS = 8


@dataclass(frozen=True)
class MethodScore:
    """One method on one document.

    ``nll`` holds the negative log-likelihood in nats of each scored token, in text order; ``kl`` is the mean over them
    of KL(full || method) in nats; ``top1_agreement`` the share of them for which both have the same first choice.
    """

    nll: tuple[float, ...]
    kl: float
    top1_agreement: float


@dataclass(frozen=True)
class DocumentQuality:
    """A document scored through the full cache and through each candidate, in the order they were given."""

    baseline_nll: tuple[float, ...]
    candidates: tuple[MethodScore, ...]


def score_document(
    model: PreTrainedModel,
    ids: Tensor,
    baseline: Method,
    candidates: Sequence[Method],
    *,
    context: int,
    prefill_chunk: int | None = None,
) -> DocumentQuality:
    """Score the end of one document through the full cache and through each candidate's.

    The prompt is prefilled once; candidates whose cache can ``prefill_from`` the full one start there, which is the
    same as a prefill of their own. All others, and all of them when the prompt comes in chunks, prefill for themselves.
    One candidate's logits are held at a time, beside the full cache's.

    Args:
        model: a causal language model.
        ids: (1, context + S + 1) token ids on the model's device: S are fed after the context, S predictions scored.
        baseline: makes the full cache.
        candidates: the methods to score.
        context: tokens before the first scored prediction's input, at least 1.
        prefill_chunk: tokens of the context a forward pass takes at most; None sends it whole.

    Raises:
        KnormError: nothing is left to score, a candidate that should have pruned holds every token, or logits are NaN.
    """
    scored = ids.shape[-1] - context - 1
    if context < 1 or scored < 1:
        raise KnormError(
            f"a document of {ids.shape[-1]} tokens with a context of {context} leaves {scored} to score; "
            "wanted at least 1 of context and 1 to score, and 1 more to predict"
        )
    prompt, fed, targets = ids[:, :context], ids[:, context:-1], ids[0, context + 1 :].cpu()

    with torch.inference_mode():
        with baseline(model) as new_cache:
            full = new_cache()
            prefill(model, prompt, full, chunk=prefill_chunk)
            # A copy is scored, so that `full` still ends with the prompt when the candidates take it.
            reference = _Reference(_teacher_forced(model, fed, copy.deepcopy(full)), targets)
        tokens_held = _tokens_held(full)
        scores = []
        for candidate in candidates:
            with filled_cache(model, candidate, prompt, full, chunk=prefill_chunk) as cache:
                _refuse_unpruned(candidate, cache, tokens_held, context)
                scores.append(reference.compare(_teacher_forced(model, fed, cache)))
    return DocumentQuality(baseline_nll=tuple(reference.nll), candidates=tuple(scores))


def _teacher_forced(model: PreTrainedModel, fed: Tensor, cache: Cache) -> Tensor:
    """(S, V) logits of the tokens ``fed`` in one pass behind what ``cache`` holds."""
    logits: Tensor = model(input_ids=fed, past_key_values=cache, use_cache=True).logits[0]
    return logits


def _tokens_held(cache: Cache) -> list[int]:
    keys = (getattr(layer, "keys", None) for layer in cache.layers)
    return [0 if held is None else held.shape[-2] for held in keys]


def _refuse_unpruned(method: Method, cache: Cache, full: list[int], context: int) -> None:
    """A method that says it prunes, by a ``press``, is not scored while it holds all that the full cache holds."""
    press = getattr(method, "press", method)
    if not isinstance(press, KnormPress) or not press.drops or _tokens_held(cache) != full:
        return
    raise KnormError(
        f"text too short to be pruned: none of {context} tokens was dropped at keep_ratio {press.keep_ratio}, "
        f"prune_after {press.prune_after}, skip_layers {press.skip_layers}; use a longer text or a smaller prune_after"
    )


class _Reference:
    """The full cache's predictions on one document, read once for all candidates."""

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        self.targets = targets
        self.probabilities = torch.empty(logits.shape, dtype=torch.float64)
        self.first_choice = logits.argmax(dim=-1).cpu()
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, start + _ROWS)
            torch.softmax(_on_host(logits[rows]), dim=-1, out=self.probabilities[rows])
        self.nll, self.entropy = self._read(logits)

    def compare(self, logits: Tensor) -> MethodScore:
        """Score the logits (S, V) of a candidate on the same tokens."""
        nll, cross_entropy = self._read(logits)
        agreed = (logits.argmax(dim=-1).cpu() == self.first_choice).double().mean()
        # Equal logits give equal sums, so a candidate that lost nothing has a divergence of exactly 0.
        return MethodScore(tuple(nll), max(0.0, cross_entropy - self.entropy) / len(self.targets), float(agreed))

    def _read(self, logits: Tensor) -> tuple[list[float], float]:
        """Each target's negative log-likelihood, and the sum of the cross entropies from the full cache's predictions.

        Without a table of log-probabilities: those of a row are its logits less one number.
        """
        nll: list[float] = []
        cross_entropy = 0.0
        for start in range(0, len(self.targets), _ROWS):
            rows = slice(start, start + _ROWS)
            host, p = _on_host(logits[rows]), self.probabilities[rows]
            total = host.logsumexp(dim=-1)
            expected = torch.linalg.vecdot(p, host)
            if not bool(expected.isfinite().all()):
                # A token that the full cache rules out adds nothing, whatever the candidate says of it.
                expected = torch.where(p == 0, 0.0, p * host).sum(dim=-1)
            cross_entropy += float((total - expected).sum())
            losses = total - host.gather(-1, self.targets[rows, None])[:, 0]
            if not bool(losses.isfinite().all()):
                raise KnormError("the model's logits are NaN or infinite, so there is no perplexity; try dtype float32")
            nll += losses.tolist()
        return nll, cross_entropy


def _on_host(logits: Tensor) -> Tensor:
    # float64 on the host gives the same figures on every device; MPS has no float64 of its own.
    return logits.cpu().double()

"""Measure perplexity through the pruned cache, and how much its predictions differ from the full cache's.

A document's first ``context`` tokens are prefilled and pruned. The next tokens are then fed in one forward pass to the
pruned cache, at their true positions, and the probability of each next token is read. Tokens before the first pruning
are not scored: they have the full cache's score, which would hide the loss.

The scored tokens come in one pass, so the cache is not pruned again among them. Decoding prunes every
``prune_interval`` tokens, new ones too; these figures do not include that loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from knormpress.errors import KnormError
from knormpress.measure.prefill import expect_pruned, filled_cache, prefill, slots_of
from knormpress.methods.full import FullCache
from knormpress.methods.method import Method, caches_of, describe_method, policy_of
from knormpress.policy.policy import Policy
from knormpress.records.figures import ROUNDING_KL, DocumentScore, Quality

__all__ = ["measure_quality", "score_document"]

# Rows of logits that are compared at a time: (8, V) in float64 is 3 MB for a vocabulary of 49,000. The probabilities
# of the full cache are all in memory: (256, V) is 100 MB.
_ROWS = 8


def measure_quality(
    model: PreTrainedModel,
    methods: Sequence[Method],
    texts: Sequence[Tensor],
    *,
    context: int,
    prefill_chunk: int | None = None,
    policies: Sequence[Policy | None] | None = None,
    after_document: Callable[[], None] = lambda: None,
) -> list[Quality]:
    """Score documents through the full cache and each method's cache; returns one result for each method.

    Args:
        model, context, prefill_chunk: as for ``score_document``.
        methods: the methods to score; they share each document's prefill.
        texts: (1, context + S + 1) token ids each, on the model's device.
        policies: the policy that each method should follow; its own ``press`` unless given.
        after_document: called after each document.

    Raises:
        KnormError: a method that should drop tokens predicts the same as the full cache; or as for ``score_document``.
    """
    scores_of_methods: list[list[DocumentScore]] = [[] for _ in methods]
    for index, ids in enumerate(texts):
        scores = score_document(model, ids, methods, document=index, context=context, prefill_chunk=prefill_chunk)
        for scores_of_method, score in zip(scores_of_methods, scores, strict=True):
            scores_of_method.append(score)
        after_document()
    qualities = [Quality(documents=tuple(scores_of_method)) for scores_of_method in scores_of_methods]
    for method, policy, quality in zip(methods, policies or map(policy_of, methods), qualities, strict=True):
        if policy is not None and policy.drops and all(score.kl < ROUNDING_KL for score in quality.documents):
            raise KnormError(
                f"{describe_method(method)} predicts exactly what the full cache does, so nothing was pruned, or the "
                "full cache was scored; check that the method prunes within the prompt"
            )
    return qualities


def score_document(
    model: PreTrainedModel,
    ids: Tensor,
    methods: Sequence[Method],
    *,
    context: int,
    document: int = 0,
    prefill_chunk: int | None = None,
    baseline: Method | None = None,
) -> list[DocumentScore]:
    """Score the end of one document through the full cache and through each method's cache.

    The prompt is prefilled once; methods whose cache has ``prefill_from`` take it from the full cache, which gives the
    same result. All other methods, and all methods if the prompt comes in chunks, do their own prefill. Only one
    method's logits are in memory at a time, beside the full cache's.

    Args:
        model: a causal language model.
        ids: (1, context + S + 1) token ids on the model's device: S are fed after the context, S predictions scored.
        methods: the methods to score.
        context: tokens before the first token that is fed, at least 1.
        document: the document's number, for the record.
        prefill_chunk: the most tokens of the context in one forward pass; None sends it in one pass.
        baseline: what the methods are compared with; the full cache unless given.

    Raises:
        KnormError: there is nothing to score, a method that should have pruned holds every token, or logits are NaN.
    """
    scored = ids.shape[-1] - context - 1
    if context < 1 or scored < 1:
        raise KnormError(
            f"a document of {ids.shape[-1]} tokens with a context of {context} leaves {scored} to score; "
            "wanted at least 1 token of context, 1 to score, and 1 more to predict"
        )
    prompt, fed, targets = ids[:, :context], ids[:, context:-1], ids[0, context + 1 :].cpu()

    with torch.inference_mode():
        with caches_of(baseline or FullCache(), model) as new_cache:
            full = new_cache()
            prefill(model, prompt, full, chunk=prefill_chunk)
            # A copy is scored, so that `full` still ends with the prompt when the methods use it.
            predictions = _FullCachePredictions(_teacher_forced(model, fed, copy.deepcopy(full)), targets)
        tokens_held = slots_of(full)
        scores = []
        for method in methods:
            with filled_cache(model, method, prompt, full, chunk=prefill_chunk) as cache:
                expect_pruned(method, policy_of(method), cache, tokens_held)
                scores.append(
                    predictions.compare(document, _teacher_forced(model, fed, cache), describe_method(method))
                )
    return scores


def _teacher_forced(model: PreTrainedModel, fed: Tensor, cache: Cache) -> Tensor:
    """The logits (S, V) of the tokens ``fed``, sent in one pass after those that ``cache`` holds."""
    logits: Tensor = model(input_ids=fed, past_key_values=cache, use_cache=True).logits[0]
    return logits


class _FullCachePredictions:
    """The full cache's predictions on one document, computed once for all candidates."""

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        self.targets = targets
        self.probabilities = torch.empty(logits.shape, dtype=torch.float64)
        self.first_choice = logits.argmax(dim=-1).cpu()
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, start + _ROWS)
            torch.softmax(_on_host(logits[rows]), dim=-1, out=self.probabilities[rows])
        self.nll, self.entropy = self._read(logits, "through the full cache")

    def compare(self, document: int, logits: Tensor, method: str) -> DocumentScore:
        """Score the logits (S, V) of a candidate, the cache of ``method``, on the same tokens."""
        nll, cross_entropy = self._read(logits, f"through the cache of {method}")
        agreed = (logits.argmax(dim=-1).cpu() == self.first_choice).double().mean()
        # Equal logits give equal sums, so a candidate without loss has a divergence of exactly 0.
        return DocumentScore(
            document=document,
            baseline_nll=tuple(self.nll),
            candidate_nll=tuple(nll),
            kl=max(0.0, cross_entropy - self.entropy) / len(self.targets),
            top1_agreement=float(agreed),
        )

    def _read(self, logits: Tensor, where: str) -> tuple[list[float], float]:
        """Each target's negative log-likelihood, and the summed cross entropy with the full cache's predictions.

        No table of log-probabilities is needed: those of a row are its logits minus one number.
        """
        nll: list[float] = []
        cross_entropy = 0.0
        for start in range(0, len(self.targets), _ROWS):
            rows = slice(start, start + _ROWS)
            host, p = _on_host(logits[rows]), self.probabilities[rows]
            total = host.logsumexp(dim=-1)
            expected = torch.linalg.vecdot(p, host)
            if not bool(expected.isfinite().all()):
                # A token with probability 0 in the full cache adds nothing, whatever the candidate predicts.
                expected = torch.where(p == 0, 0.0, p * host).sum(dim=-1)
            cross_entropy += float((total - expected).sum())
            losses = total - host.gather(-1, self.targets[rows, None])[:, 0]
            if not bool(losses.isfinite().all()):
                raise KnormError(
                    f"the model's logits are NaN or infinite {where}, so there is no perplexity; try dtype float32"
                )
            nll += losses.tolist()
        return nll, cross_entropy


def _on_host(logits: Tensor) -> Tensor:
    # float64 on the host gives the same figures on every device; MPS has no float64.
    return logits.cpu().double()

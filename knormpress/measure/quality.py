"""Measure perplexity through the pruned cache, and how much its predictions differ from the full cache's.

A document's first ``context`` tokens are prefilled and pruned. The next tokens are then fed in one forward pass to the
pruned cache, at their true positions, and the probability of each next token is read. Tokens before the first pruning
are not scored: they have the full cache's score, which would hide the loss.

The scored tokens come in one pass, so the cache is not pruned again among them. Decoding prunes every
``prune_interval`` tokens, new ones too. Where asked for, the same tokens are scored a second time with that loss in it.

The loss of each scored token behind a short context only is measured too: it tells which tokens need what is far away.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from knormpress.cache.cache import KnormCache
from knormpress.errors import KnormError
from knormpress.measure.prefill import Way, expect_pruned, filled_cache, prefill, slots_of
from knormpress.methods.full import FullCache
from knormpress.methods.method import Method, caches_of, describe_method, policy_of
from knormpress.policy.policy import Policy
from knormpress.records.figures import ROUNDING_KL, DocumentScore, Quality

__all__ = ["decodes_in_few_passes", "measure_quality", "score_document"]

# Rows of logits that are compared at a time: (8, V) in float64 is 3 MB for a vocabulary of 49,000. The probabilities
# of the full cache are all in memory: (256, V) is 100 MB.
_ROWS = 8

# A short context: tokens before the first predicting token of a block, and tokens scored in a block.
_LOCAL_CONTEXT = 128
_LOCAL_BLOCK = 64


def measure_quality(
    model: PreTrainedModel,
    methods: Sequence[Method],
    texts: Sequence[Tensor],
    *,
    context: int,
    prefill_chunk: int | None = None,
    ways: Sequence[Way] | None = None,
    decoded: bool = False,
    policies: Sequence[Policy | None] | None = None,
    after_document: Callable[[], None] = lambda: None,
) -> list[Quality]:
    """Score documents through the full cache and each method's cache; returns one result for each method.

    Args:
        model, context, prefill_chunk, ways, decoded: as for ``score_document``.
        methods: the methods to score; they share each document's prefill.
        texts: (1, context + S + 1) token ids each, on the model's device.
        policies: the policy that each method should follow; its own ``press`` unless given.
        after_document: called after each document.

    Raises:
        KnormError: a method that should drop tokens predicts the same as the full cache; or as for ``score_document``.
    """
    scores_of_methods: list[list[DocumentScore]] = [[] for _ in methods]
    for index, ids in enumerate(texts):
        scores = score_document(
            model,
            ids,
            methods,
            document=index,
            context=context,
            prefill_chunk=prefill_chunk,
            ways=ways,
            decoded=decoded,
        )
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
    ways: Sequence[Way] | None = None,
    decoded: bool = False,
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
        ways: how each method's cache takes the context; as the full cache does unless given.
        decoded: score the tokens a second time, as if fed one by one, behind a fresh prefill or a copy of it. A
            ``KnormCache`` takes one pass for each time that it prunes; any other cache one pass for each token. Behind
            a context that is reused this is left out: it is decoded like any other.
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
    ways = ways or [Way(prefill_chunk)] * len(methods)
    prompt, fed, targets = ids[:, :context], ids[:, context:-1], ids[0, context + 1 :].cpu()

    with torch.inference_mode():
        local_nll = _local_nll(model, ids, context)
        with caches_of(baseline or FullCache(), model) as new_cache:
            full = new_cache()
            prefill(model, prompt, full, chunk=prefill_chunk)
            # A copy is scored, so that `full` still ends with the prompt when the methods use it.
            predictions = _FullCachePredictions(_teacher_forced(model, fed, copy.deepcopy(full)), targets, local_nll)
        tokens_held = slots_of(full)
        scores = []
        for method, way in zip(methods, ways, strict=True):
            name, decodes = describe_method(method), decoded and way.question is None
            with filled_cache(model, method, prompt, full, way=way) as cache:
                expect_pruned(method, policy_of(method), cache, tokens_held)
                whole = isinstance(cache, KnormCache) and _decodes_whole(cache, scored)
                copied = copy.deepcopy(cache) if decodes and isinstance(cache, KnormCache) and not whole else None
                score = predictions.compare(document, _teacher_forced(model, fed, cache), name)
                if copied is not None:
                    score = predictions.add_decoded(score, _decoded(model, fed, copied), name)
            if decodes and whole:
                score = score.model_copy(update={"decoded_nll": score.candidate_nll})
            elif decodes and copied is None:
                # Nobody knows whether a copy of another library's cache still prunes, so it is filled anew.
                with filled_cache(model, method, prompt, full, way=way) as cache:
                    score = predictions.add_decoded(score, _decoded(model, fed, cache), name)
            scores.append(score)
    return scores


def decodes_in_few_passes(model: PreTrainedModel, method: Method) -> bool:
    """Whether ``decoded`` scores take a few passes with the caches of ``method``, and not one for each token."""
    with caches_of(method, model) as new_cache:
        return isinstance(new_cache(), KnormCache)


def _teacher_forced(model: PreTrainedModel, fed: Tensor, cache: Cache) -> Tensor:
    """The logits (S, V) of the tokens ``fed``, sent in one pass after those that ``cache`` holds."""
    logits: Tensor = model(input_ids=fed, past_key_values=cache, use_cache=True).logits[0]
    return logits


def _decodes_whole(cache: KnormCache, tokens: int) -> bool:
    """Whether so many decoded tokens bring no pruning before the last of them, so that one pass is the same."""
    with cache.as_single_tokens(tokens) as count:
        return count == tokens


def _decoded(model: PreTrainedModel, fed: Tensor, cache: Cache) -> Tensor:
    """The logits (S, V) of the tokens ``fed``, with ``cache`` pruned among them as when they come one by one."""
    logits = []
    while left := fed.shape[-1]:
        with cache.as_single_tokens(left) if isinstance(cache, KnormCache) else nullcontext(1) as count:
            logits.append(_teacher_forced(model, fed[:, :count], cache))
        fed = fed[:, count:]
    return torch.cat(logits)


def _local_nll(model: PreTrainedModel, ids: Tensor, context: int) -> list[float]:
    """The negative log-likelihood in nats of each scored token of ``ids`` (1, context + S + 1), without what is far.

    Plain passes without a cache score blocks of 64 tokens. A block's pass begins 128 tokens before the block's first
    predicting token, so that each predicting token sees 128 to 191 tokens before it. Where the document has fewer, the
    pass begins with the document, and with its start token. Blocks of equal length are rows of one pass.
    """
    end = ids.shape[-1] - 1
    # By (tokens before, tokens scored); groups and the blocks in them are in text order.
    groups: dict[tuple[int, int], list[int]] = {}
    for start in range(context, end, _LOCAL_BLOCK):
        groups.setdefault((min(start, _LOCAL_CONTEXT), min(_LOCAL_BLOCK, end - start)), []).append(start)
    nll: list[float] = []
    for (before, count), starts in groups.items():
        rows = torch.cat([ids[:, start - before : start + count] for start in starts])
        logits = model(input_ids=rows, use_cache=False, logits_to_keep=count).logits.flatten(0, 1)
        targets = ids[0, starts[0] + 1 : starts[-1] + count + 1].cpu()
        nll += _nll(logits, targets, f"behind {before} tokens only")
    return nll


class _FullCachePredictions:
    """The full cache's predictions on one document, computed once for all candidates."""

    def __init__(self, logits: Tensor, targets: Tensor, local_nll: list[float]) -> None:
        self.targets, self.local_nll = targets, local_nll
        self.probabilities = torch.empty(logits.shape, dtype=torch.float64)
        self.first_choice = logits.argmax(dim=-1).cpu()
        for rows, host in _on_host(logits):
            torch.softmax(host, dim=-1, out=self.probabilities[rows])
        self.nll, self.entropy = self._read(logits, "through the full cache")

    def compare(self, document: int, logits: Tensor, method: str) -> DocumentScore:
        """Score the logits (S, V) of a candidate, the cache of ``method``, on the same tokens."""
        nll, cross_entropy = self._read(logits, f"through the cache of {method}")
        agreed = (logits.argmax(dim=-1).cpu() == self.first_choice).double().mean()
        # Equal logits give equal sums, so a token predicted without loss has a divergence of exactly 0.
        token_kl = [max(0.0, after - before) for before, after in zip(self.entropy, cross_entropy, strict=True)]
        return DocumentScore(
            document=document,
            baseline_nll=tuple(self.nll),
            candidate_nll=tuple(nll),
            kl=math.fsum(token_kl) / len(token_kl),
            top1_agreement=float(agreed),
            token_kl=tuple(token_kl),
            local_nll=tuple(self.local_nll),
        )

    def add_decoded(self, score: DocumentScore, logits: Tensor, method: str) -> DocumentScore:
        """``score`` with what the logits (S, V) say, of the same tokens decoded through the cache of ``method``."""
        nll = _nll(logits, self.targets, f"through the cache of {method}, decoding")
        return score.model_copy(update={"decoded_nll": tuple(nll)})

    def _read(self, logits: Tensor, where: str) -> tuple[list[float], list[float]]:
        """Each token's negative log-likelihood, and its cross entropy with the full cache's predictions.

        No table of log-probabilities is needed: those of a row are its logits minus one number.
        """
        nll: list[float] = []
        cross_entropy: list[float] = []
        for rows, host in _on_host(logits):
            p, total = self.probabilities[rows], host.logsumexp(dim=-1)
            expected = torch.linalg.vecdot(p, host)
            if not bool(expected.isfinite().all()):
                # A token with probability 0 in the full cache adds nothing, whatever the candidate predicts.
                expected = torch.where(p == 0, 0.0, p * host).sum(dim=-1)
            cross_entropy += (total - expected).tolist()
            nll += _losses(host, total, self.targets[rows], where)
        return nll, cross_entropy


def _nll(logits: Tensor, targets: Tensor, where: str) -> list[float]:
    """The negative log-likelihood in nats of each of the ``targets`` (S,) under the logits (S, V)."""
    parts = (_losses(host, host.logsumexp(dim=-1), targets[rows], where) for rows, host in _on_host(logits))
    return [loss for part in parts for loss in part]


def _losses(host: Tensor, total: Tensor, targets: Tensor, where: str) -> list[float]:
    """As ``_nll``, of the logits ``host`` (rows, V) with the log-sum-exp ``total`` (rows,).

    Raises:
        KnormError: a loss is not finite.
    """
    losses = total - host.gather(-1, targets[:, None])[:, 0]
    if not bool(losses.isfinite().all()):
        raise KnormError(
            f"the model's logits are NaN or infinite {where}, so there is no perplexity; try dtype float32"
        )
    values: list[float] = losses.tolist()
    return values


def _on_host(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A few rows of the logits (S, V) at a time on the host, and which these are.

    float64 on the host gives the same figures on every device; MPS has no float64.
    """
    for start in range(0, len(logits), _ROWS):
        rows = slice(start, start + _ROWS)
        yield rows, logits[rows].cpu().double()

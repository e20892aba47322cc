"""Perplexity through the pruned cache: against plain arithmetic on the model's own logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache, Gemma3TextConfig, PreTrainedModel

from knormpress.errors import KnormError
from knormpress.measure.quality import measure_quality, score_document
from knormpress.methods.full import FullCache
from knormpress.methods.knorm import KnormPress
from knormpress.methods.method import Method
from knormpress.methods.registry import make_method
from knormpress.records.figures import DocumentScore
from tests.strategies import VOCABULARY, tiny_model

CONTEXT = 48
SCORED = 40
PRESS = KnormPress(keep_ratio=0.5, prune_after=16, skip_layers=(0,))


def document(tokens: int = CONTEXT + SCORED + 1, seed: int = 3) -> Tensor:
    return torch.randint(2, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


class Unshared:
    """The same method behind a cache that can't start from a full one."""

    def __init__(self, press: KnormPress) -> None:
        self.press = press

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[Callable[[], Cache]]:
        with self.press(model) as new_cache:

            def without_prefill_from() -> Cache:
                cache = new_cache()
                cache.prefill_from = None  # type: ignore[assignment]
                return cache

            yield without_prefill_from


def by_hand(model: PreTrainedModel, method: Method, ids: Tensor, context: int, chunk: int | None = None) -> Tensor:
    """(S, V) log-probabilities in float64 behind a context that is prefilled part by part."""
    with torch.no_grad(), method(model) as new_cache:
        cache = new_cache()
        for part in ids[:, :context].split(chunk or context, dim=1):
            model(part, past_key_values=cache)
        return model(ids[:, context:-1], past_key_values=cache).logits[0].double().log_softmax(-1)


def nll_by_hand(model: PreTrainedModel, method: Method, ids: Tensor, chunk: int | None = None) -> Any:
    """What the scored tokens' negative log-likelihoods must be close to."""
    log_probabilities = by_hand(model, method, ids, CONTEXT, chunk)
    return pytest.approx((-log_probabilities[range(SCORED), ids[0, CONTEXT + 1 :]]).tolist(), abs=1e-10)


def score(methods: list[Method], ids: Tensor | None = None, **options: Any) -> list[DocumentScore]:
    """The scores of the tiny Llama on one document."""
    return score_document(tiny_model(), document() if ids is None else ids, methods, context=CONTEXT, **options)


def test_the_full_cache_scores_what_one_pass_without_a_cache_scores() -> None:
    ids = document()
    (found,) = score([PRESS], ids, document=7)
    with torch.no_grad():
        expected = tiny_model()(ids, use_cache=False).logits[0].log_softmax(-1)
    rows = range(CONTEXT, CONTEXT + SCORED)
    assert found.baseline_nll == pytest.approx([-expected[row, ids[0, row + 1]].item() for row in rows], abs=1e-10)
    assert found.document == 7


def test_a_methods_scores_follow_their_definitions() -> None:
    model, ids = tiny_model(), document()
    (found,) = score([PRESS], ids)
    p, q = by_hand(model, FullCache(), ids, CONTEXT), by_hand(model, PRESS, ids, CONTEXT)
    assert found.candidate_nll == nll_by_hand(model, PRESS, ids)
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), abs=1e-10)
    assert found.top1_agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert found.kl > 0.01


def test_one_prefill_serves_all_methods_and_none_touches_another() -> None:
    """Shared or its own, in whatever order, each method's scores are the same to the last digit."""
    low, middle, whole = (KnormPress(keep_ratio=ratio, prune_after=16) for ratio in (0.2, 0.5, 1.0))
    passes: list[int] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        passes.append(kwargs["input_ids"].shape[1])

    with tiny_model().register_forward_pre_hook(look, with_kwargs=True):
        shared = score([whole, low, middle, whole, low])
    assert passes == [CONTEXT, *[SCORED] * 6]
    own = score([Unshared(low), Unshared(middle), Unshared(whole)])
    assert shared == [own[2], own[0], own[1], own[2], own[0]]


def test_keep_ratio_one_diverges_by_nothing_however_short_the_text() -> None:
    (found,) = score([KnormPress(keep_ratio=1.0, prune_after=CONTEXT + 1)])
    assert found.kl == pytest.approx(0.0, abs=1e-12)
    assert found.top1_agreement == 1.0
    assert found.candidate_nll == pytest.approx(found.baseline_nll, abs=1e-10)


def test_a_prefill_in_chunks_prunes_in_between() -> None:
    ids = document()
    (chunked,), (whole,) = score([PRESS], ids, prefill_chunk=20), score([PRESS], ids)
    assert chunked.candidate_nll == nll_by_hand(tiny_model(), PRESS, ids, chunk=20)
    assert chunked.baseline_nll == pytest.approx(whole.baseline_nll, abs=1e-10)
    assert chunked.candidate_nll != pytest.approx(whole.candidate_nll, abs=1e-6)


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("name", ["knorm", "random"])
@pytest.mark.parametrize(
    ("keep", "prune_after"), [(0.9, CONTEXT + 1), (0.999, 16)], ids=["too short", "a budget of every token"]
)
def test_a_text_that_is_not_pruned_is_refused(name: str, chunk: int | None, keep: float, prune_after: int) -> None:
    method = make_method(name, KnormPress(keep_ratio=keep, prune_after=prune_after))
    with pytest.raises(KnormError, match=f"{CONTEXT} tokens .*keep_ratio {keep}, prune_after {prune_after}"):
        score([method], prefill_chunk=chunk)


def test_a_text_of_prune_after_tokens_is_long_enough() -> None:
    (found,) = score([KnormPress(keep_ratio=0.9, prune_after=CONTEXT)])
    assert found.kl > 0


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(poison: float) -> None:
    model = AutoModelForCausalLM.from_config(tiny_model().config).double().eval()
    with torch.no_grad():
        model.lm_head.weight[5, 0] = poison
    with pytest.raises(KnormError, match=r"NaN or infinite.*float32"):
        score_document(model, document(), [], context=CONTEXT)


def test_what_the_full_cache_rules_out_adds_nothing_to_the_divergence() -> None:
    """A model may give a token no probability at all, by a logit of -inf; both caches do, and nobody scores it."""

    class RuledOut(torch.nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            return logits.index_fill(-1, torch.tensor([0]), -math.inf)

    ids, model = document(), tiny_model()
    head = model.lm_head
    model.lm_head = torch.nn.Sequential(head, RuledOut())
    try:
        (found,) = score([PRESS], ids)
        p, q = (by_hand(model, method, ids, CONTEXT)[:, 1:] for method in (FullCache(), PRESS))
    finally:
        model.lm_head = head
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), abs=1e-10)


@pytest.mark.parametrize(("tokens", "context"), [(10, 9), (10, 20), (10, 0)])
def test_a_document_without_a_token_to_score_is_refused(tokens: int, context: int) -> None:
    with pytest.raises(KnormError, match=f"{tokens} tokens with a context of {context}"):
        score_document(tiny_model(), document(tokens), [], context=context)


def test_a_model_with_sliding_layers_prefills_for_itself() -> None:
    """Its full cache is no whole one to start from: the window has dropped tokens already."""
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ids = document()
    press = KnormPress(keep_ratio=0.5, prune_after=16, skip_layers=())
    (found,) = score_document(model, ids, [press], context=CONTEXT)
    assert found.candidate_nll == nll_by_hand(model, press, ids)
    assert found.kl > 0


def test_another_cache_is_scored_as_it_is() -> None:
    """A method of another library: no press, no prefill_from, no stats; here one that forgets its oldest tokens."""

    class Forgetful(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
            keys, values = super().update(key_states, value_states, layer_idx)
            layer = self.layers[layer_idx]
            layer.keys = torch.cat([torch.zeros_like(keys[:, :, :8]), keys[:, :, 8:]], dim=2)
            return keys, values

    @contextmanager
    def forgetful(model: PreTrainedModel) -> Iterator[Callable[[], Cache]]:
        yield lambda: Forgetful(config=model.config)

    ids = document()
    (found,) = score([forgetful], ids)
    assert found.candidate_nll == nll_by_hand(tiny_model(), forgetful, ids)
    (beside_it,) = score([PRESS], ids, baseline=forgetful)
    assert beside_it.baseline_nll == found.candidate_nll


def test_documents_are_scored_one_by_one_and_collected_by_method() -> None:
    texts, methods, ticks = [document(seed=seed) for seed in (3, 4)], [PRESS, KnormPress(0.3, 16)], []
    found = measure_quality(tiny_model(), methods, texts, context=CONTEXT, after_document=lambda: ticks.append(1))
    expected = [score(methods, ids, document=number) for number, ids in enumerate(texts)]
    assert [list(quality.documents) for quality in found] == [list(scores) for scores in zip(*expected, strict=True)]
    assert len(ticks) == 2


def test_a_method_that_was_to_prune_and_predicts_what_the_full_cache_does_is_refused() -> None:
    """It is told by its predictions where its cache can't be looked into, and by what it was asked to do."""
    idle, texts = FullCache(), [document()]
    assert measure_quality(tiny_model(), [idle], texts, context=CONTEXT)[0].kl == 0.0
    assert measure_quality(tiny_model(), [idle], texts, context=CONTEXT, policies=[KnormPress(1.0)])[0].kl == 0.0
    with pytest.raises(KnormError, match=r"predicts exactly what the full cache does"):
        measure_quality(tiny_model(), [idle], texts, context=CONTEXT, policies=[KnormPress(0.5)])

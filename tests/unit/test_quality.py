"""Perplexity through the pruned cache: against plain arithmetic on the model's own logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache, Gemma3TextConfig, PreTrainedModel

from knormpress.errors import KnormError
from knormpress.methods import FullCache, make_method
from knormpress.metrics import Method, score_document
from knormpress.press import KnormPress
from tests.strategies import VOCABULARY, tiny_model

CONTEXT = 48
SCORED = 40
PRESS = KnormPress(keep_ratio=0.5, prune_after=16, skip_layers=(0,))


def document(tokens: int = CONTEXT + SCORED + 1) -> Tensor:
    return torch.randint(2, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(3))


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


def test_full_cache_scores_what_one_pass_without_a_cache_scores() -> None:
    model, ids = tiny_model(), document()
    quality = score_document(model, ids, FullCache(), [], context=CONTEXT)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[0].log_softmax(-1)
    rows = range(CONTEXT, CONTEXT + SCORED)
    assert quality.baseline_nll == pytest.approx([-expected[row, ids[0, row + 1]].item() for row in rows], abs=1e-10)
    assert quality.candidates == ()


def test_candidate_scores_follow_their_definitions() -> None:
    model, ids = tiny_model(), document()
    (score,) = score_document(model, ids, FullCache(), [PRESS], context=CONTEXT).candidates
    p = by_hand(model, FullCache(), ids, CONTEXT)
    q = by_hand(model, PRESS, ids, CONTEXT)
    targets = ids[0, CONTEXT + 1 :]
    assert score.nll == pytest.approx((-q[range(SCORED), targets]).tolist(), abs=1e-10)
    assert score.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), abs=1e-10)
    assert score.top1_agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert score.kl > 0.01


def test_shared_prefill_scores_exactly_as_a_prefill_of_its_own() -> None:
    model, ids = tiny_model(), document()
    presses = [KnormPress(keep_ratio=r, prune_after=16) for r in (0.3, 0.5, 0.9)]
    shared = score_document(model, ids, FullCache(), presses, context=CONTEXT)
    own = score_document(model, ids, FullCache(), [Unshared(press) for press in presses], context=CONTEXT)
    assert shared == own


def test_candidates_do_not_touch_each_other_nor_the_full_cache() -> None:
    model, ids = tiny_model(), document()
    low, high = KnormPress(keep_ratio=0.2, prune_after=16), KnormPress(keep_ratio=1.0, prune_after=16)
    alone = [score_document(model, ids, FullCache(), [press], context=CONTEXT).candidates[0] for press in (low, high)]
    together = score_document(model, ids, FullCache(), [high, low, high, low], context=CONTEXT)
    assert list(together.candidates) == [alone[1], alone[0], alone[1], alone[0]]


def test_one_full_prefill_serves_all_candidates() -> None:
    model, ids = tiny_model(), document()
    passes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        presses = [KnormPress(keep_ratio=r, prune_after=16) for r in (0.3, 0.9)]
        score_document(model, ids, FullCache(), presses, context=CONTEXT)
    finally:
        hook.remove()
    assert passes == [CONTEXT, SCORED, SCORED, SCORED]


def test_keep_ratio_one_diverges_by_nothing() -> None:
    model, ids = tiny_model(), document()
    press = KnormPress(keep_ratio=1.0, prune_after=16)
    quality = score_document(model, ids, FullCache(), [press], context=CONTEXT)
    assert quality.candidates[0].kl == pytest.approx(0.0, abs=1e-12)
    assert quality.candidates[0].top1_agreement == 1.0
    assert quality.candidates[0].nll == pytest.approx(quality.baseline_nll, abs=1e-10)


def test_prefill_in_chunks_prunes_in_between() -> None:
    model, ids = tiny_model(), document()
    chunked = score_document(model, ids, FullCache(), [PRESS], context=CONTEXT, prefill_chunk=20)
    whole = score_document(model, ids, FullCache(), [PRESS], context=CONTEXT)
    q = by_hand(model, PRESS, ids, CONTEXT, chunk=20)
    expected = (-q[range(SCORED), ids[0, CONTEXT + 1 :]]).tolist()
    assert chunked.candidates[0].nll == pytest.approx(expected, abs=1e-10)
    assert chunked.baseline_nll == pytest.approx(whole.baseline_nll, abs=1e-10)
    assert chunked.candidates[0].nll != pytest.approx(whole.candidates[0].nll, abs=1e-6)


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("method", ["knorm", "random"])
def test_text_too_short_to_be_pruned_is_refused(method: str, chunk: int | None) -> None:
    candidate = make_method(method, KnormPress(keep_ratio=0.9, prune_after=CONTEXT + 1))
    with pytest.raises(KnormError, match=f"too short to be pruned: none of {CONTEXT} tokens .* {CONTEXT + 1}"):
        score_document(tiny_model(), document(), FullCache(), [candidate], context=CONTEXT, prefill_chunk=chunk)


def test_text_of_prune_after_tokens_is_long_enough() -> None:
    press = KnormPress(keep_ratio=0.9, prune_after=CONTEXT)
    quality = score_document(tiny_model(), document(), FullCache(), [press], context=CONTEXT)
    assert quality.candidates[0].kl > 0


def test_budget_that_rounds_up_to_every_token_is_refused() -> None:
    press = KnormPress(keep_ratio=0.999, prune_after=16)
    with pytest.raises(KnormError, match="too short to be pruned"):
        score_document(tiny_model(), document(), FullCache(), [press], context=CONTEXT)


def test_keep_ratio_one_needs_no_pruning() -> None:
    press = KnormPress(keep_ratio=1.0, prune_after=CONTEXT + 1)
    assert score_document(tiny_model(), document(), FullCache(), [press], context=CONTEXT).candidates[0].kl < 1e-12


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(poison: float) -> None:
    model = AutoModelForCausalLM.from_config(tiny_model().config).double().eval()
    with torch.no_grad():
        model.lm_head.weight[5, 0] = poison
    with pytest.raises(KnormError, match="NaN or infinite"):
        score_document(model, document(), FullCache(), [], context=CONTEXT)


@pytest.mark.parametrize(("tokens", "context"), [(10, 9), (10, 20), (10, 0)])
def test_document_without_a_token_to_score_is_refused(tokens: int, context: int) -> None:
    with pytest.raises(KnormError, match=f"{tokens} tokens with a context of {context}"):
        score_document(tiny_model(), document(tokens), FullCache(), [], context=context)


def test_model_with_sliding_layers_prefills_for_itself() -> None:
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
    quality = score_document(model, ids, FullCache(), [press], context=CONTEXT)
    expected = by_hand(model, press, ids, CONTEXT)
    assert quality.candidates[0].nll == pytest.approx(
        (-expected[range(SCORED), ids[0, CONTEXT + 1 :]]).tolist(), abs=1e-10
    )
    assert quality.candidates[0].kl > 0


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

    model, ids = tiny_model(), document()
    quality = score_document(model, ids, FullCache(), [forgetful], context=CONTEXT)
    expected = by_hand(model, forgetful, ids, CONTEXT)
    assert quality.candidates[0].nll == pytest.approx(
        (-expected[range(SCORED), ids[0, CONTEXT + 1 :]]).tolist(), abs=1e-10
    )

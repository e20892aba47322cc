"""Perplexity through the pruned cache: against plain arithmetic on the model's own logits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache, Gemma3TextConfig, PreTrainedModel

from knormpress.errors import KnormError
from knormpress.measure.prefill import slots_of
from knormpress.measure.quality import decodes_in_few_passes, measure_quality, score_document
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


@contextmanager
def passes_of(model: PreTrainedModel) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the tokens that go through ``model``."""
    shapes: list[tuple[int, ...]] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    with model.register_forward_pre_hook(look, with_kwargs=True):
        yield shapes


def one_by_one(
    model: PreTrainedModel, method: Method, ids: Tensor, chunk: int | None = None
) -> tuple[list[float], list[tuple[int, int]]]:
    """The losses of tokens fed one at a time, and the shapes of the passes if one ended wherever a layer pruned."""
    losses, cuts = [], [0]
    with torch.no_grad(), method(model) as new_cache:
        cache = new_cache()
        for part in ids[:, :CONTEXT].split(chunk or CONTEXT, dim=1):
            model(part, past_key_values=cache)
        for fed in range(1, SCORED + 1):
            before, place = slots_of(cache), CONTEXT + fed
            logits = model(ids[:, place - 1 : place], past_key_values=cache).logits[0, -1]
            losses.append(-logits.double().log_softmax(-1)[ids[0, place]].item())
            if slots_of(cache) != [slots + 1 for slots in before]:
                cuts.append(fed)
    ends = sorted({*cuts, SCORED})
    return losses, [(1, end - start) for start, end in itertools.pairwise(ends)]


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
    assert found.token_kl == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), abs=1e-10)
    assert found.kl == pytest.approx(sum(found.token_kl) / SCORED, rel=1e-12)
    assert found.top1_agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert found.kl > 0.01


def test_one_prefill_serves_all_methods_and_none_touches_another() -> None:
    """Shared or its own, in whatever order, each method's scores are the same to the last digit."""
    low, middle, whole = (KnormPress(keep_ratio=ratio, prune_after=16) for ratio in (0.2, 0.5, 1.0))
    with passes_of(tiny_model()) as passes:
        shared = score([whole, low, middle, whole, low])
    # The short context here is the whole document, then come the prompt and the full cache's own tokens.
    assert passes == [(1, CONTEXT + SCORED), (1, CONTEXT), *[(1, SCORED)] * 6]
    own = score([Unshared(low), Unshared(middle), Unshared(whole)])
    assert shared == [own[2], own[0], own[1], own[2], own[0]]


def test_keep_ratio_one_diverges_by_nothing_however_short_the_text() -> None:
    (found,) = score([KnormPress(keep_ratio=1.0, prune_after=CONTEXT + 1)])
    assert found.kl == pytest.approx(0.0, abs=1e-12)
    assert found.top1_agreement == 1.0
    assert found.candidate_nll == pytest.approx(found.baseline_nll, abs=1e-10)


def test_an_equal_candidate_diverges_at_no_token() -> None:
    (found,) = score([FullCache()])
    assert found.kl == 0.0
    assert found.token_kl == (0.0,) * SCORED


@pytest.mark.parametrize(
    ("context", "scored", "passes"),
    [
        (48, 40, [(1, 88)]),
        (100, 150, [(1, 164), (1, 192), (1, 150)]),
        (128, 64, [(1, 192)]),
        (200, 150, [(2, 192), (1, 150)]),
        (70, 70, [(1, 134), (1, 134)]),  # of equal length, but with 64 and 6 tokens to score
    ],
)
def test_a_tokens_local_loss_is_that_behind_the_last_128_tokens(
    context: int, scored: int, passes: list[tuple[int, int]]
) -> None:
    """In blocks of 64, which begin 128 tokens earlier; or with the document, where it has fewer."""
    model, ids = tiny_model(), document(context + scored + 1)
    with passes_of(model) as shapes:
        first, second = score_document(model, ids, [PRESS, FullCache()], context=context)
    assert shapes[: len(passes)] == passes
    assert shapes[len(passes)] == (1, context)
    expected = []
    for number in range(scored):
        begin, place = max(0, context + number // 64 * 64 - 128), context + number
        with torch.no_grad():
            logits = model(ids[:, begin : place + 1], use_cache=False).logits[0, -1]
        expected.append(-logits.log_softmax(-1)[ids[0, place + 1]].item())
    assert first.local_nll == pytest.approx(expected, abs=1e-10)
    assert second.local_nll == first.local_nll
    if context + scored > 192:
        assert first.local_nll != pytest.approx(first.baseline_nll, abs=1e-3)


DECODING = {
    "uniform": KnormPress(0.5, 16, prune_interval=6),
    "at every token": KnormPress(0.5, 16, prune_interval=1),
    "a ratio for each layer": KnormPress(0.9, 16, layer_keep_ratios=(0.9, 0.5, 0.3), prune_interval=5),
    "iterative": KnormPress(0.6, 24, schedule="iterative"),
    "the newest are kept": KnormPress(0.3, 16, keep_recent=7, prune_interval=5),
    "more are kept than the budget": KnormPress(0.3, 16, keep_recent=30, prune_interval=5),
}


@pytest.mark.parametrize("chunk", [None, 20])
@pytest.mark.parametrize("name", DECODING)
def test_decoded_in_few_passes_is_decoded_one_by_one(name: str, chunk: int | None) -> None:
    """A pass ends where a layer prunes, and nowhere else: later it would give other losses, earlier more passes."""
    model, ids, press = tiny_model(), document(), DECODING[name]
    losses, shapes = one_by_one(model, press, ids, chunk)
    assert len(shapes) > 2
    (once,) = score([press], ids, prefill_chunk=chunk)
    with passes_of(model) as passes:
        (found,) = score([press], ids, prefill_chunk=chunk, decoded=True)
    assert found.decoded_nll == pytest.approx(losses, abs=1e-10)
    assert passes[-len(shapes) :] == shapes
    assert once.decoded_nll == ()
    assert found == once.model_copy(update={"decoded_nll": found.decoded_nll})
    # The control: scored in one pass, the tokens behind the first pruning have other losses.
    first = shapes[0][1]
    assert found.decoded_nll[:first] == pytest.approx(found.candidate_nll[:first], abs=1e-10)
    assert found.decoded_nll[first:] != pytest.approx(found.candidate_nll[first:], abs=1e-3)


def test_decoded_without_pruning_is_what_one_pass_scores() -> None:
    for press in (KnormPress(0.5, 16, prune_interval=64), KnormPress(1.0)):
        with passes_of(tiny_model()) as passes:
            (found,) = score([press], decoded=True)
        assert found.decoded_nll == pytest.approx(found.candidate_nll, abs=1e-10)
        assert passes[-2:] == [(1, SCORED)] * 2


def test_in_float32_decoded_is_the_same_to_5_decimals() -> None:
    model, ids, press = tiny_model(dtype=torch.float32), document(), DECODING["a ratio for each layer"]
    (found,) = score_document(model, ids, [press], context=CONTEXT, decoded=True)
    assert found.decoded_nll == pytest.approx(one_by_one(model, press, ids)[0], abs=1e-5)


def test_a_prefill_in_chunks_serves_both_ways_of_scoring() -> None:
    with passes_of(tiny_model()) as passes:
        score([DECODING["uniform"]], prefill_chunk=16, decoded=True)
    assert passes.count((1, 16)) == 2 * CONTEXT // 16  # for the full cache and the method


def test_which_caches_are_decoded_in_few_passes() -> None:
    own = (PRESS, Unshared(PRESS), make_method("random", PRESS))
    assert all(decodes_in_few_passes(tiny_model(), method) for method in own)
    assert not decodes_in_few_passes(tiny_model(), FullCache())


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
    told = f"{CONTEXT} tokens .*keep_ratio {keep}, prune_after {prune_after}, .* a smaller prune_after$"
    with pytest.raises(KnormError, match=told):
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
    assert found.decoded_nll == ()
    with passes_of(tiny_model()) as passes:
        (decoded,) = score([forgetful], ids, decoded=True)
    assert passes[-SCORED - 1 :] == [(1, CONTEXT), *[(1, 1)] * SCORED]
    assert decoded.decoded_nll == pytest.approx(one_by_one(tiny_model(), forgetful, ids)[0], abs=1e-10)
    assert decoded == found.model_copy(update={"decoded_nll": decoded.decoded_nll})
    (beside_it,) = score([PRESS], ids, baseline=forgetful)
    assert beside_it.baseline_nll == found.candidate_nll


def test_documents_are_scored_one_by_one_and_collected_by_method() -> None:
    texts, methods, ticks = [document(seed=seed) for seed in (3, 4)], [PRESS, KnormPress(0.3, 16)], []
    found = measure_quality(tiny_model(), methods, texts, context=CONTEXT, after_document=lambda: ticks.append(1))
    expected = [score(methods, ids, document=number) for number, ids in enumerate(texts)]
    assert [list(quality.documents) for quality in found] == [list(scores) for scores in zip(*expected, strict=True)]
    assert len(ticks) == 2
    (decoded,) = measure_quality(tiny_model(), [PRESS], texts, context=CONTEXT, decoded=True)
    assert [len(one.decoded_nll) for one in decoded.documents] == [SCORED] * 2


def test_a_method_that_was_to_prune_and_predicts_what_the_full_cache_does_is_refused() -> None:
    """It is told by its predictions where its cache can't be looked into, and by what it was asked to do."""
    idle, texts = FullCache(), [document()]
    assert measure_quality(tiny_model(), [idle], texts, context=CONTEXT)[0].kl == 0.0
    assert measure_quality(tiny_model(), [idle], texts, context=CONTEXT, policies=[KnormPress(1.0)])[0].kl == 0.0
    with pytest.raises(KnormError, match=r"predicts exactly what the full cache does"):
        measure_quality(tiny_model(), [idle], texts, context=CONTEXT, policies=[KnormPress(0.5)])

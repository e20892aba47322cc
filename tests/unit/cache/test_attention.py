"""Attention in parts equals attention, is really in use under a KnormCache, and only there."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from knormpress import KnormCache, KnormPress
from knormpress.cache import attention
from tests.oracle import assert_equal_to_masking
from tests.strategies import left_padding, passes, presses, tiny_model, tokens

PRESS = KnormPress(0.5, prune_after=8, skip_layers=(0,), prune_interval=2)
PASSES = [15, 1, 1, 9, 1, 1, 9]
TOTAL = sum(PASSES)

shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "heads": st.integers(1, 3),
        "groups": st.integers(1, 3),
        "past": st.integers(1, 70),
        "size": st.sampled_from([1, 5, 8, 64]),
        "dtype": st.sampled_from([torch.float32, torch.float64]),
        "scale": st.sampled_from([None, 0.3]),
    }
)


def states(shape, new):
    batch, heads, size = shape["batch"], shape["heads"], shape["size"]
    torch.manual_seed(shape["past"])
    # Queries as a projection leaves them, keys with spare room behind them.
    query = 4 * torch.randn(batch, new, heads * shape["groups"], size, dtype=shape["dtype"]).transpose(1, 2)
    room = torch.randn(2, batch, heads, shape["past"] + new + 3, size, dtype=shape["dtype"])
    key, value = room[:, :, :, : shape["past"] + new]
    return query, key, value


def plain(query, key, value, scale):
    """Attention in float64, the new tokens causal among themselves, by the formula."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    new, tokens = scores.shape[2:]
    hidden = torch.ones(new, tokens, dtype=torch.bool).triu(tokens - new + 1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value


def assert_close(found, expected):
    tolerance = 1e-12 if found.dtype == torch.float64 else 2e-5
    assert (found - expected).abs().max() <= tolerance


@given(shape=shapes, pieces=st.integers(1, 9))
@settings(max_examples=60)
def test_split_attention_is_attention(shape, pieces):
    query, key, value = states(shape, 1)
    pieces = min(pieces, key.shape[2])
    found = attention.split_attention(query, key, value, pieces, shape["scale"])
    assert_close(found, plain(query, key, value, shape["scale"]))


@given(shape=shapes, new=st.integers(2, 40))
@settings(max_examples=60)
def test_chunk_attention_is_attention(shape, new):
    query, key, value = states(shape, new)
    found = attention.chunk_attention(query, key, value, shape["scale"])
    assert_close(found, plain(query, key, value, shape["scale"]))


def test_scores_far_apart_stay_finite():
    query, key, value = torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 6, 4), torch.arange(24.0).view(1, 1, 6, 4)
    key[:, :, 0], key[:, :, 4:] = 1e4, -1e4
    assert torch.equal(attention.chunk_attention(query, key, value), value[:, :, :1].expand(1, 1, 2, 4))
    assert torch.equal(attention.split_attention(query[:, :, :1], key, value, 3), value[:, :, :1])


@pytest.mark.parametrize(("threads", "batch", "heads", "tokens", "pieces"), [
    (2, 1, 3, 8_000, 2),
    (2, 1, 4, 8_000, 1),
    (2, 2, 3, 8_000, 1),
    (2, 1, 3, 4_096, 2),
    (2, 1, 3, 4_095, 1),
    (8, 1, 6, 60_000, 4),
    (8, 1, 3, 8_000, 3),
])  # fmt: skip
def test_pieces_keep_every_thread_busy(monkeypatch, threads, batch, heads, tokens, pieces):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert attention._pieces(batch, heads, tokens) == pieces


@pytest.fixture
def calls(monkeypatch):
    """Every past cut in three, however short; counts how often each function computes."""
    counts = {"split_attention": 0, "chunk_attention": 0}

    def counted(name: str, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def count(*args):
            counts[name] += 1
            return function(*args)

        return count

    for name in counts:
        monkeypatch.setattr(attention, name, counted(name, getattr(attention, name)))
    monkeypatch.setattr(attention, "_pieces", lambda batch, heads, tokens: min(3, tokens))
    return counts


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "gpt-neox", "granite", "ministral-mixed"])
def test_parts_equal_masking(family, rows, calls):
    model = tiny_model(family)
    assert_equal_to_masking(model, KnormCache(model, PRESS), tokens(TOTAL, rows), PASSES)
    layers = 2 if family in ("gemma3", "ministral-mixed") else 3
    assert calls == {"split_attention": 4 * layers, "chunk_attention": 2 * layers}


def test_any_policy_in_parts_equals_masking(monkeypatch):
    monkeypatch.setattr(attention, "_pieces", lambda batch, heads, tokens: min(3, tokens))

    @given(press=presses(), sizes=passes(), seed=st.integers(0, 10_000))
    @settings(max_examples=40)
    def check(press, sizes, seed):
        model = tiny_model()
        assert_equal_to_masking(model, KnormCache(model, press), tokens(sum(sizes), seed=seed), sizes)

    check()


def test_the_oracle_sees_wrong_parts(monkeypatch):
    """Control: weighing the past and the chunk's own tokens alike shows."""
    model = tiny_model()
    monkeypatch.setattr(torch.Tensor, "sigmoid", lambda self: torch.full_like(self, 0.5))
    with pytest.raises(AssertionError, match="logits differ"):
        assert_equal_to_masking(model, KnormCache(model, PRESS), tokens(TOTAL), PASSES)


def test_padding_and_custom_masks_get_transformers_own(calls):
    model = tiny_model()
    assert_equal_to_masking(model, KnormCache(model, PRESS), tokens(TOTAL, 2), PASSES, left_padding(TOTAL, 0, 5))
    cache = KnormCache(model, PRESS)
    ids = tokens(TOTAL)
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
        model(ids[:, 9:12], past_key_values=cache, attention_mask=torch.ones(1, 1, 3, 12, dtype=torch.bool))
        model(ids[:, 12:13], past_key_values=cache, attention_mask=torch.zeros(1, 1, 1, 13, dtype=torch.float64))
    assert not any(calls.values())


@pytest.mark.parametrize("attention_name", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_caches_types_and_attentions_get_what_they_asked_for(attention_name, dtype, calls):
    model = tiny_model("llama", attention_name, dtype)
    own = KnormCache(model, PRESS)
    caches = [DynamicCache(config=model.config)]
    if dtype == torch.bfloat16 or attention_name == "eager":
        caches.append(own)
    for cache in caches:
        with torch.no_grad():
            for part in tokens(TOTAL).split(PASSES, dim=1):
                model(part, past_key_values=cache)
    assert not any(calls.values())


def test_gradients_go_through_transformers_own(calls):
    model = tiny_model()
    cache = KnormCache(model, PRESS)
    for part in tokens(TOTAL).split(PASSES, dim=1):
        logits = model(part, past_key_values=cache).logits
    torch.autograd.grad(logits.sum(), model.lm_head.weight)
    assert not any(calls.values())


@pytest.fixture
def no_cache_yet(monkeypatch):
    """transformers' attention as in a fresh process, whatever caches other tests may have left alive."""
    found = ALL_ATTENTION_FUNCTIONS["sdpa"]
    gc.collect()
    monkeypatch.setattr(attention, "_users", set())
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    yield
    AttentionInterface.register("sdpa", found)


@pytest.mark.usefixtures("no_cache_yet")
def test_sdpa_is_as_found_when_the_last_cache_is_gone():
    one, other = copy.deepcopy(tiny_model()), copy.deepcopy(tiny_model())
    first, second = KnormCache(one, PRESS), KnormCache(other, PRESS)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward
    del first
    gc.collect()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward
    del second
    gc.collect()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


@pytest.mark.usefixtures("no_cache_yet")
def test_an_attention_of_the_users_own_stays(calls):
    def own(*args, **kwargs):
        return sdpa_attention_forward(*args, **kwargs)

    model = copy.deepcopy(tiny_model())
    AttentionInterface.register("sdpa", own)
    assert_equal_to_masking(model, KnormCache(model, PRESS), tokens(TOTAL), PASSES)
    gc.collect()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    assert not any(calls.values())

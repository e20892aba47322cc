"""The oracle over model families, attention implementations and types; and the models that are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    MistralConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from knormpress import KnormCache, KnormError, KnormPress
from tests.oracle import assert_equal_to_masking
from tests.strategies import EAGER_ONLY, FAMILIES, VOCABULARY, tiny_model

PRESS = KnormPress(0.5, prune_after=8, skip_layers=(1,), prune_interval=2)
PASSES = [15, 1, 1, 1, 9, 1, 1, 1, 9]


def tokens(rows: int) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, sum(PASSES)), generator=torch.Generator().manual_seed(0))


def left_padding(*lengths: int) -> torch.Tensor:
    return torch.stack([(torch.arange(sum(PASSES)) >= pad).long() for pad in lengths])


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_equals_masking(family, padded):
    # Gated linear attention computes in float32, and so does the softmax of eager attention.
    wide = family not in EAGER_ONLY | {"qwen3-next"}
    model = tiny_model(family, "eager" if family in EAGER_ONLY else "sdpa", torch.float64 if wide else torch.float32)
    padding = left_padding(0, 7, 14) if padded else None
    cache = KnormCache(model, PRESS)
    trace = assert_equal_to_masking(model, cache, tokens(3 if padded else 1), PASSES, padding, 1e-9 if wide else 2e-3)
    evicted = [stats.evicted for index, stats in enumerate(cache.stats()) if index in trace.visible]
    assert max(evicted) > 10


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_equals_masking_eagerly(family):
    model = tiny_model(family, "eager", torch.float32)
    assert_equal_to_masking(model, KnormCache(model, PRESS), tokens(2), PASSES, left_padding(0, 7), 2e-3)


def test_a_model_without_full_attention_is_refused():
    model = AutoModelForCausalLM.from_config(
        MistralConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=8,
            vocab_size=9,
        )
    )
    with pytest.raises(KnormError, match="MistralForCausalLM has no full-attention layer"):
        KnormCache(model, PRESS)


def test_an_encoder_decoder_is_refused():
    model = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=9, decoder_start_token_id=0)
    )
    with pytest.raises(KnormError, match="T5ForConditionalGeneration is an encoder-decoder"):
        KnormCache(model, PRESS)


def test_keys_shared_between_layers_are_refused():
    config = AutoConfig.for_model(
        "gemma4_text",
        vocab_size=9,
        vocab_size_per_layer_input=9,
        hidden_size=16,
        hidden_size_per_layer_input=4,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        global_head_dim=8,
        layer_types=["full_attention"] * 4,
        num_kv_shared_layers=2,
    )
    with pytest.raises(KnormError, match="Gemma4ForCausalLM shares keys between layers"):
        KnormCache(AutoModelForCausalLM.from_config(config), PRESS)


def test_attention_biased_by_key_position_is_refused():
    model = AutoModelForCausalLM.from_config(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=9))
    with pytest.raises(KnormError, match="BloomForCausalLM adds a bias by key position"):
        KnormCache(model, PRESS)


def test_more_tokens_than_positions_are_refused_before_anything_changes():
    model = tiny_model()
    cache = KnormCache(model, PRESS)
    with torch.no_grad():
        model(tokens(1), past_key_values=cache)
        before = cache.stats()
        with pytest.raises(KnormError, match="39 tokens seen and 500 new ones are more than the model's 512 positions"):
            model(torch.ones(1, 500, dtype=torch.long), past_key_values=cache)
    assert cache.stats() == before


def test_the_longest_row_is_the_one_that_runs_out_of_positions():
    model = tiny_model()
    padding = torch.stack([(torch.arange(513) >= pad).long() for pad in (0, 400)])
    cache = KnormCache(model, PRESS)
    ids = torch.ones(2, 513, dtype=torch.long)
    with pytest.raises(KnormError, match="0 tokens seen and 513 new ones are more than the model's 512 positions"):
        model(ids, attention_mask=padding, past_key_values=cache)

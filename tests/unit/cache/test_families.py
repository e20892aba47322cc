"""The oracle over model families, attention implementations and types; and the models that are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BloomConfig,
    MistralConfig,
    T5Config,
)

from knormpress import KnormCache, KnormError, KnormPress
from tests.oracle import assert_equal_to_masking
from tests.strategies import EAGER_ONLY, FAMILIES, left_padding, tiny_model, tokens

PRESS = KnormPress(0.5, prune_after=8, skip_layers=(1,), prune_interval=2)
PASSES = [15, 1, 1, 1, 9, 1, 1, 1, 9]
TOTAL = sum(PASSES)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_equals_masking(family, padded):
    # Gated linear attention computes in float32, and so does the softmax of eager attention.
    wide = family not in EAGER_ONLY | {"qwen3-next"}
    model = tiny_model(family, "eager" if family in EAGER_ONLY else "sdpa", torch.float64 if wide else torch.float32)
    padding = left_padding(TOTAL, 0, 7, 14) if padded else None
    cache = KnormCache(model, PRESS)
    trace = assert_equal_to_masking(
        model, cache, tokens(TOTAL, 3 if padded else 1), PASSES, padding, 1e-9 if wide else 2e-3
    )
    evicted = [stats.evicted for index, stats in enumerate(cache.stats()) if index in trace.visible]
    assert max(evicted) > 10


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_equals_masking_eagerly(family):
    model = tiny_model(family, "eager", torch.float32)
    assert_equal_to_masking(model, KnormCache(model, PRESS), tokens(TOTAL, 2), PASSES, left_padding(TOTAL, 0, 7), 2e-3)


REFUSED = {
    "no full-attention layer": MistralConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
        vocab_size=9,
    ),
    "shares keys between layers": AutoConfig.for_model(
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
    ),
    "ALiBi": BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=9),
    "is an encoder-decoder": T5Config(
        d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=9, decoder_start_token_id=0
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cant_be_pruned_exactly_is_refused(reason):
    config = REFUSED[reason]
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(config)
    with pytest.raises(KnormError, match=f"{type(model).__name__} .*{reason}"):
        KnormCache(model, PRESS)

"""Time, counted cost and bytes of a generation, for every device and keep ratio, against the full cache.

Nothing here gates an absolute time: the figures go to pytest-benchmark's table, and are compared with earlier runs.
"""

from __future__ import annotations

import math

import pytest

from knormpress.policy.policy import share

PROMPT_TOKENS = 1024
NEW_TOKENS = 16
# As many as give an interval; --knorm-seconds adds more.
LEAST_PAIRS = 6
# At keep 0.9 a cache is pruned again after 640 tokens, at keep 0.5 after 128.
MOST_DECODED_TOKENS = 704


@pytest.mark.benchmark(group=f"generation of {NEW_TOKENS} tokens after {PROMPT_TOKENS}")
def test_generation(knorm_latency, knorm_method, quick):
    new_tokens = 8 if quick else NEW_TOKENS
    prompt_tokens = 512 if quick else PROMPT_TOKENS
    latency = knorm_latency(knorm_method, prompt_tokens=prompt_tokens, new_tokens=new_tokens, rounds=LEAST_PAIRS)
    assert latency.pairs >= (2 if quick else LEAST_PAIRS)
    assert all(len(run.gaps_s) == new_tokens - 1 for run in (*latency.baseline, *latency.candidate))


def test_counted_cost(knorm_cost, knorm_method, quick):
    found = knorm_cost(knorm_method, prompt_tokens=512 if quick else PROMPT_TOKENS)
    assert found.candidate_prefill.attention == found.baseline_prefill.attention
    assert found.candidate_decode.attention == found.baseline_decode.attention
    # Pruning is paid for by what it saves.
    for name in ("moved", "flops", "allocated"):
        assert found.candidate("decode", name) <= found.full("decode", name)


def until_pruned_again(press, layers):
    """Tokens to decode until every layer has been pruned once more, and some beyond."""
    highest = max((ratio for ratio in press.ratios(layers) if ratio < 1.0), default=0.0)
    return min(MOST_DECODED_TOKENS, math.ceil(press.prune_interval / (1 - highest)) + press.prune_interval)


def test_cache_bytes_are_those_of_the_policy(knorm_bench, knorm_press, knorm_method, knorm_memory, quick):
    config = knorm_bench.model.config
    tokens = 512 if quick else PROMPT_TOKENS
    new_tokens = 40 if quick else until_pruned_again(knorm_press, config.num_hidden_layers)
    # That the cache stays within its policy's bound while decoding is checked there.
    found = knorm_memory(knorm_method, prompt_tokens=tokens, new_tokens=new_tokens)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    slot = 2 * head_size * knorm_bench.model.dtype.itemsize
    kept = [share(ratio, tokens) for ratio in knorm_press.ratios(config.num_hidden_layers)]
    per_head = sum(slots * (slot + (4 if slots < tokens else 0)) for slots in kept)
    held = per_head * config.num_key_value_heads
    # Beside the tokens there may be room for the next ones.
    assert held <= found.candidate_cache_bytes <= held + 0.02 * found.baseline_cache_bytes
    assert found.baseline_cache_bytes == tokens * slot * config.num_key_value_heads * config.num_hidden_layers

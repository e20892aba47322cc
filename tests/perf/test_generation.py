"""Time and bytes of a generation, for every device and keep ratio, against the full cache in the same run.

Nothing here gates an absolute time: the figures go to pytest-benchmark's table and storage, for comparison.
"""

from __future__ import annotations

import pytest

from knormpress.bench import memory
from knormpress.press import share

PROMPT_TOKENS = 1024


@pytest.mark.benchmark(group="generation of 32 tokens after 1024")
def test_generation(knorm_latency, knorm_method):
    latency = knorm_latency(knorm_method, prompt_tokens=PROMPT_TOKENS, new_tokens=32, rounds=5)
    assert len(latency.baseline) == len(latency.candidate) == 5
    assert all(len(run.gaps_s) == 31 for run in (*latency.baseline, *latency.candidate))


def test_cache_bytes_are_those_of_the_policy(knorm_bench, knorm_press, knorm_method):
    """To the byte: keys, values and, where tokens were dropped, the positions of those kept."""
    (prompt,) = knorm_bench.documents(length=PROMPT_TOKENS, count=1)
    found = memory(knorm_bench, prompt, knorm_method, prefill_chunk=None)
    config = knorm_bench.model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    slot = 2 * head_size * knorm_bench.model.dtype.itemsize
    kept = [share(ratio, PROMPT_TOKENS) for ratio in knorm_press.ratios(config.num_hidden_layers)]
    per_head = sum(slots * (slot + (4 if slots < PROMPT_TOKENS else 0)) for slots in kept)
    assert found.candidate_cache_bytes == per_head * config.num_key_value_heads
    assert found.baseline_cache_bytes == PROMPT_TOKENS * slot * config.num_key_value_heads * config.num_hidden_layers

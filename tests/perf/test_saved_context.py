"""A second question on a saved context: time to its first token, against computing the context again."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from knormpress import KnormCache, KnormPress
from knormpress.metrics import prefill


@pytest.mark.benchmark(group="first token of a question after 2048 tokens of context")
def test_a_question_on_a_saved_context(benchmark, knorm_bench, tmp_path, quick):
    model = knorm_bench.model
    tokens = 1_024 if quick else 2_048
    (ids,) = knorm_bench.documents(length=tokens + 32, count=1)
    context, question = ids[:, :tokens], ids[:, tokens:]
    path, press, again = tmp_path / "context.safetensors", KnormPress(0.5), []
    with torch.inference_mode():
        filled = KnormCache(model, press)
        prefill(model, context, filled)
        filled.save(path)

        def first_token_again():
            start = time.perf_counter()
            prefill(model, ids, KnormCache(model, press)).argmax().item()
            again.append(time.perf_counter() - start)

        def first_token_of_saved():
            return prefill(model, question, KnormCache.load(path, model)).argmax().item()

        token = benchmark.pedantic(first_token_of_saved, setup=first_token_again, rounds=1 if quick else 3)
        # The question's tokens see the pruned context, as they do in the cache that was never saved.
        assert token == prefill(model, question, filled).argmax().item()
    benchmark.extra_info["ttft_change_percent"] = round(
        100 * (benchmark.stats.stats.median / statistics.median(again) - 1), 1
    )

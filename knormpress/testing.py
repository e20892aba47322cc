"""What the pytest fixtures do: measurements that land in pytest-benchmark's table and JSON."""

from __future__ import annotations

import gc
from typing import Any

from knormpress.bench import Bench, as_run
from knormpress.compare import latency_changes
from knormpress.methods import FullCache
from knormpress.metrics import Method, time_generation
from knormpress.records import Latency, Run

__all__ = ["benchmarked_latency"]


def benchmarked_latency(
    bench: Bench,
    benchmark: Any,
    candidate: Method,
    *,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    prefill_chunk: int | None,
) -> Latency:
    """Time ``candidate`` by pytest-benchmark's ``benchmark`` fixture, with a run of the full cache before each round.

    The table and the JSON show whole generations of the candidate; ``extra_info`` holds, for each figure, the change
    against the full cache of the same run, which is what survives a change of machine speed.

    Args:
        bench: the model and the text.
        benchmark: the fixture.
        candidate: the method to time.
        prompt_tokens, new_tokens: the length of prompt and generation.
        rounds: pairs to measure, after one uncounted run of each.
        prefill_chunk: tokens of the prompt a forward pass takes at most; None sends it whole.
    """
    (prompt,) = bench.documents(length=prompt_tokens, count=1)
    runs: dict[str, list[Run]] = {"baseline": [], "candidate": []}

    def generate(name: str, method: Method) -> None:
        with method(bench.model) as new_cache:
            timing = time_generation(bench.model, prompt, new_cache, new_tokens=new_tokens, prefill_chunk=prefill_chunk)
        runs[name].append(as_run(timing))

    for name, method in (("baseline", FullCache()), ("candidate", candidate)):
        generate(name, method)
        runs[name].clear()
    # A run collects garbage first, inside what the fixture times: without all that lives already it takes no time.
    gc.collect()
    gc.freeze()
    try:
        benchmark.pedantic(
            lambda: generate("candidate", candidate), setup=lambda: generate("baseline", FullCache()), rounds=rounds
        )
    finally:
        gc.unfreeze()
    latency = Latency(baseline=tuple(runs["baseline"]), candidate=tuple(runs["candidate"]), ttft_cold_s=None)
    for name, change in latency_changes(latency).items():
        benchmark.extra_info[f"{name}_change_percent"] = round(change.percent, 2)
        benchmark.extra_info[f"{name}_change_interval"] = change.interval
    return latency

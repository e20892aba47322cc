"""The work of the pytest fixtures: one test's measurements, and the entry that stores them for comparison."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from knormpress.errors import KnormError
from knormpress.measure.cost import Prefilled, can_count, count_full_prefill, measure_cost
from knormpress.measure.latency import measure_latency
from knormpress.measure.memory import measure_memory
from knormpress.measure.quality import measure_quality
from knormpress.measure.retrieval import measure_retrieval
from knormpress.methods.knorm import KnormPress
from knormpress.methods.method import Method, describe_method, policy_of
from knormpress.methods.registry import make_method
from knormpress.policy.policy import Policy
from knormpress.records.figures import Cost, Latency, Memory, Quality
from knormpress.records.schema import Entry, Result, TextInfo
from knormpress.stats.gates import Decision, documents_to_decide, gate
from knormpress.stats.perplexity import LEAST_DOCUMENTS, too_few
from knormpress.workload.bench import Bench
from knormpress.workload.tasks.haystack import haystacks, named_tasks

__all__ = ["CONTROLS", "Measured", "gated", "retrieval_controls", "retrieve", "run_tasks", "score"]

CONTROLS = ("random", "recent-window")
"""The controls of a retrieval gate."""


def score(
    bench: Bench,
    methods: Sequence[Method],
    policies: Sequence[Policy | None] | None = None,
    *,
    context: int,
    scored: int,
    samples: int,
    decoded: bool = False,
) -> list[Result]:
    """Score ``samples`` documents through the full cache and each method's cache; they share each document's prefill.

    With ``decoded`` the tokens are also scored as when they are decoded, see ``measure.quality.score_document``.

    Raises:
        KnormError: a method whose policy drops tokens predicts exactly what the full cache does.
    """
    texts = bench.documents(length=context + scored + 1, count=samples)
    qualities = measure_quality(bench.model, methods, texts, context=context, decoded=decoded, policies=policies)
    conditions: dict[str, int | None] = {"context": context, "scored": scored, "documents": samples}
    return [
        Result(method=describe_method(method), conditions=conditions, quality=quality)
        for method, quality in zip(methods, qualities, strict=True)
    ]


def retrieve(
    bench: Bench,
    methods: Sequence[Method],
    policies: Sequence[Policy | None] | None = None,
    *,
    tasks: Sequence[str],
    texts: int,
) -> list[Result]:
    """Ask the full cache and each method's cache what stands in held-out texts; they share each text's prefill.

    Args:
        bench: the model and the text.
        methods, policies: as for ``measure.retrieval.measure_retrieval``.
        tasks: names of tasks, see ``workload.tasks.haystack``.
        texts: texts for each task.

    Raises:
        KnormError: as for ``measure_retrieval`` and ``haystacks``.
    """
    asked = haystacks(bench, tasks, count=texts)
    measured = measure_retrieval(bench.model, methods, asked, policies=policies)
    conditions: dict[str, int | None] = {task.name: texts for task in named_tasks(tasks)}
    return [
        Result(method=describe_method(method), conditions=conditions, retrieval=retrieval)
        for method, retrieval in zip(methods, measured, strict=True)
    ]


def retrieval_controls(policy: Policy) -> dict[str, Method]:
    """The methods that must find less than any good one, and keep as many tokens; none where ``policy`` drops nothing.

    In place of a ratio for each layer they have the mean in every layer. How a plan spreads the tokens over the layers
    is a part of what is gated: a random choice that is spread alike still finds half of what the full cache does.
    """
    if not policy.drops:
        return {}
    press = KnormPress.of(policy)
    if policy.layer_keep_ratios is not None:
        press = replace(press, keep_ratio=policy.mean_keep, skip_layers=(), layer_keep_ratios=None, layer_scores=None)
    return {name: make_method(name, press) for name in CONTROLS}


def run_tasks(
    bench: Bench,
    method: Method,
    tasks: Sequence[str],
    *,
    folder: Path | None,
    split: str | None,
    few_shot: int | None,
    limit: int | None,
) -> tuple[Result, TextInfo]:
    """Run ``tasks`` of lm-evaluation-harness through the full cache and the method's; returns their documents too.

    Args:
        bench: the model.
        method: the method.
        tasks, folder: see ``lm_eval.run.find_tasks``.
        split: see ``lm_eval.model.KnormLM``.
        few_shot, limit: see ``lm_eval.run.compare_tasks``.

    Raises:
        KnormError: the harness is not installed, or as for these functions.
    """
    from knormpress.lm_eval import expect_harness

    expect_harness()
    from knormpress.lm_eval.model import KnormLM
    from knormpress.lm_eval.run import compare_tasks, find_tasks

    manager = find_tasks(tasks, folder)
    model = KnormLM(bench.model, tokenizer=bench.tokenizer, method=method, split=split)
    found, text = compare_tasks(model, manager, tasks, few_shot=few_shot, limit=limit)
    conditions: dict[str, int | None] = {"few_shot": few_shot, "limit": limit}
    return Result(method=describe_method(method), conditions=conditions, lm_eval=found), text


def gated(quality: Quality, tolerance: float) -> tuple[Decision, str]:
    """The decision of the quality gate, ``pass``, ``fail`` or ``inconclusive``, and the figures as text."""
    change, documents = quality.ppl, len(quality.documents)
    decision = gate(change, tolerance)
    text = f"perplexity {change} ({change.interval}) on {documents} documents, allowed +-{tolerance:g} %"
    if few := too_few(documents):
        text += f": {few}; use --knorm-samples {LEAST_DOCUMENTS} or more"
    elif decision == "inconclusive":
        more = documents_to_decide(change, tolerance, documents)
        text += "; no number of documents would decide" if more is None else f"; about {more} more would decide"
    return decision, text


class Measured:
    """The measurements of one test, at most one of each kind."""

    def __init__(
        self, bench: Bench, test: str, run: str, counted: dict[tuple[int, int | None], Prefilled] | None = None
    ) -> None:
        self.bench, self.test, self.run = bench, test, run
        self._results: dict[str, Result] = {}
        # The full cache's counted prefills by tokens and chunk, which tests share.
        self._counted = {} if counted is None else counted
        self._text = bench.text_info
        self._time_again: Callable[[], list[Latency]] | None = None

    def latency(
        self,
        method: Method,
        benchmark: Any,
        *,
        prompt_tokens: int,
        new_tokens: int,
        rounds: int,
        precision: float,
        seconds: float,
        prefill_chunk: int | None,
    ) -> Latency:
        """Time ``method`` in turn with the full cache; pytest-benchmark's ``benchmark`` times the method's runs.

        Its table and JSON show whole generations; ``extra_info`` says why the rounds ended.
        """
        self._check_first("latency")
        (prompt,) = self.bench.documents(length=prompt_tokens, count=1)
        self._time_again = functools.partial(
            measure_latency,
            self.bench.model,
            [method],
            prompt,
            new_tokens=new_tokens,
            rounds=rounds,
            precision=precision,
            seconds=seconds,
            prefill_chunk=prefill_chunk,
        )
        (latency,) = self._time_again(
            repeat=lambda before, run: benchmark.pedantic(run, setup=before, rounds=sys.maxsize)
        )
        benchmark.extra_info["stopped"] = latency.stopped
        if latency.speed_moved is not None:
            benchmark.extra_info["machine_speed_moved_percent"] = round(latency.speed_moved, 1)
        conditions = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "prefill_chunk": prefill_chunk}
        self._results["latency"] = Result(method=describe_method(method), conditions=conditions, latency=latency)
        return latency

    def memory(
        self,
        method: Method,
        *,
        prompt_tokens: int,
        new_tokens: int = 0,
        prefill_chunk: int | None,
        policy: Policy | None = None,
    ) -> Memory:
        """Measure the bytes of the full cache and of the method's cache, in separate passes."""
        self._check_first("memory")
        (prompt,) = self.bench.documents(length=prompt_tokens, count=1)
        (memory,) = measure_memory(
            self.bench.model,
            [method],
            prompt,
            prefill_chunk=prefill_chunk,
            decoded_tokens=new_tokens,
            policies=[policy or policy_of(method)],
        )
        conditions = {"cached_tokens": prompt_tokens, "prefill_chunk": prefill_chunk}
        if new_tokens:
            conditions["decoded_tokens"] = new_tokens
        self._results["memory"] = Result(method=describe_method(method), conditions=conditions, memory=memory)
        return memory

    def cost(self, method: Method, *, prompt_tokens: int, new_tokens: int | None, prefill_chunk: int | None) -> Cost:
        """Count what the full cache and the method's cache cost."""
        self._check_first("cost")
        model, key = self.bench.model, (prompt_tokens, prefill_chunk)
        (prompt,) = self.bench.documents(length=prompt_tokens, count=1)
        if can_count(model) and key not in self._counted:
            self._counted[key] = count_full_prefill(model, prompt, prefill_chunk=prefill_chunk)
        full = self._counted.get(key)
        cost = measure_cost(model, method, prompt, full=full, new_tokens=new_tokens, prefill_chunk=prefill_chunk)
        conditions = {
            "counted_prompt": prompt_tokens,
            "tokens_before": cost.tokens_before,
            "counted_tokens": cost.tokens,
            "prefill_chunk": prefill_chunk,
        }
        self._results["cost"] = Result(method=describe_method(method), conditions=conditions, cost=cost)
        return cost

    def quality(self, result: Result) -> None:
        """Store a result of ``score``."""
        self._check_first("quality")
        self._results["quality"] = result

    def retrieval(self, result: Result) -> None:
        """Store a result of ``retrieve``."""
        self._check_first("retrieval")
        self._results["retrieval"] = result

    def tasks(self, result: Result, text: TextInfo) -> None:
        """Store a result of ``run_tasks``, whose documents are the text of the test."""
        self._check_first("lm_eval")
        self._results["lm_eval"], self._text = result, text

    def timed_again(self) -> Entry:
        """The entry of a passed test with its timing measured once more, by the harness's own clock."""
        assert self._time_again is not None
        result = self._results["latency"]
        self._results["latency"] = result.model_copy(update={"latency": self._time_again()[0]})
        entry = self.entry(passed=True)
        assert entry is not None
        return entry

    def entry(self, *, passed: bool) -> Entry | None:
        """All measurements as an entry, or None if there are none."""
        if not self._results:
            return None
        results = self._results.values()
        figures = {name: getattr(result, name) for name, result in self._results.items()}
        return Entry(
            run=self.run,
            test=self.test,
            created=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            environment=self.bench.environment,
            model=self.bench.model_info,
            text=self._text,
            method=" and ".join(dict.fromkeys(result.method for result in results)),
            conditions={name: value for result in results for name, value in result.conditions.items()},
            passed=passed,
            **figures,
        )

    def _check_first(self, kind: str) -> None:
        if kind in self._results:
            raise KnormError(f"{self.test} measures {kind} twice; wanted once: split or parametrize the test")

"""What the pytest fixtures do: one test's measurements, and the entry that they leave to be compared."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime, timezone
from typing import Any

from knormpress import bench as benches
from knormpress.bench import Bench
from knormpress.changes import documents_to_decide, gate, ppl_change
from knormpress.errors import KnormError
from knormpress.intervals import Change
from knormpress.metrics import Method
from knormpress.press import KnormPress
from knormpress.records import Entry, Latency, Memory, Quality
from knormpress.verdicts import speed_moved

__all__ = ["Measured", "Patience", "Scored", "describe_method", "gated", "score"]


@dataclass(frozen=True)
class Patience:
    """How long timings go on: until their intervals reach ``precision`` %, or ``seconds`` have passed."""

    precision: float
    seconds: float


@dataclass(frozen=True)
class Scored:
    """A method's quality on some documents, each of them ``context`` tokens and ``scored`` ones behind them."""

    method: Method
    quality: Quality
    context: int
    scored: int

    @property
    def change(self) -> Change:
        """The change of perplexity against the full cache."""
        return ppl_change(self.quality.documents)

    @property
    def kl(self) -> float:
        """Mean KL divergence (nats) from the full cache's predictions."""
        documents = self.quality.documents
        return sum(document.kl for document in documents) / len(documents)


def score(bench: Bench, methods: Sequence[Method], *, context: int, scored: int, samples: int) -> list[Scored]:
    """Score ``samples`` documents through the full cache and each method's; they share each document's prefill.

    Raises:
        KnormError: a method whose press drops tokens predicts exactly what the full cache does.
    """
    texts = bench.documents(length=context + scored + 1, count=samples)
    found = benches.quality(bench, texts, methods, context=context, prefill_chunk=None)
    for method, quality in zip(methods, found, strict=True):
        press = getattr(method, "press", method)
        if isinstance(press, KnormPress) and press.drops:
            benches.refuse_unpruned(describe_method(method), quality)
    return [Scored(method, quality, context, scored) for method, quality in zip(methods, found, strict=True)]


def gated(found: Scored, tolerance: float) -> tuple[str, str]:
    """The verdict of the quality gate, ``pass``, ``fail`` or ``inconclusive``, and what was measured, in words."""
    change, documents = found.change, len(found.quality.documents)
    verdict = gate(change, tolerance)
    text = f"perplexity {change} ({change.interval}) on {documents} documents, allowed +-{tolerance:g} %"
    if verdict == "inconclusive":
        more = documents_to_decide(change, tolerance, documents)
        text += "; no number of documents would decide" if more is None else f"; about {more} more would decide"
    return verdict, text


class Measured:
    """What one test measures, each kind of figure at most once."""

    def __init__(self, bench: Bench, test: str, run: str) -> None:
        self.bench, self.test, self.run = bench, test, run
        self._methods: list[str] = []
        self._conditions: dict[str, int | None] = {}
        self._found: dict[str, Latency | Memory | Quality] = {}

    def latency(
        self,
        method: Method,
        benchmark: Any,
        patience: Patience,
        *,
        prompt_tokens: int,
        new_tokens: int,
        rounds: int,
        prefill_chunk: int | None,
    ) -> Latency:
        """Time ``method`` in turn with the full cache; pytest-benchmark's fixture ``benchmark`` times each of its runs.

        The table and the JSON show whole generations of the method; ``extra_info`` says why the rounds ended.
        """
        (prompt,) = self.bench.documents(length=prompt_tokens, count=1)
        self._note("latency", method, prompt_tokens=prompt_tokens, new_tokens=new_tokens, prefill_chunk=prefill_chunk)
        found = benches.latency(
            self.bench,
            prompt,
            method,
            new_tokens=new_tokens,
            rounds=rounds,
            precision=patience.precision,
            seconds=patience.seconds,
            prefill_chunk=prefill_chunk,
            repeat=lambda before, run: benchmark.pedantic(run, setup=before, rounds=sys.maxsize),
        )
        benchmark.extra_info["stopped"] = found.stopped
        moved = speed_moved(found)
        if moved is not None:
            benchmark.extra_info["machine_speed_moved_percent"] = round(moved, 1)
        self._found["latency"] = found
        return found

    def memory(self, method: Method, *, prompt_tokens: int, prefill_chunk: int | None) -> Memory:
        """Prefill the full cache and the method's, in passes of their own."""
        (prompt,) = self.bench.documents(length=prompt_tokens, count=1)
        self._note("memory", method, cached_tokens=prompt_tokens, prefill_chunk=prefill_chunk)
        found = benches.memory(self.bench, prompt, method, prefill_chunk=prefill_chunk)
        self._found["memory"] = found
        return found

    def quality(self, found: Scored) -> None:
        """Note what ``score`` found."""
        documents = len(found.quality.documents)
        self._note("quality", found.method, context=found.context, scored=found.scored, documents=documents)
        self._found["quality"] = found.quality

    def entry(self, *, passed: bool) -> Entry | None:
        """What was measured, or None where nothing was."""
        if not self._found:
            return None
        return Entry(
            run=self.run,
            test=self.test,
            created=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            environment=self.bench.environment,
            model=self.bench.model_info,
            text=self.bench.text_info,
            method=" and ".join(dict.fromkeys(self._methods)),
            conditions=self._conditions,
            passed=passed,
            **self._found,  # type: ignore[arg-type]
        )

    def _note(self, kind: str, method: Method, **conditions: int | None) -> None:
        if kind in self._found:
            raise KnormError(f"{self.test} measures its {kind} twice; parametrize the test, so that each has its own")
        self._methods.append(describe_method(method))
        self._conditions.update(conditions)


def describe_method(method: Any) -> str:
    """``method`` as text that is equal for equal methods, in every process."""
    if is_dataclass(method) and not isinstance(method, type):
        values = ((field.name, getattr(method, field.name)) for field in fields(method))
        return f"{type(method).__qualname__}({', '.join(f'{name}={describe_method(value)}' for name, value in values)})"
    if isinstance(method, functools.partial):
        parts = [*method.args, *(f"{name}={describe_method(value)}" for name, value in method.keywords.items())]
        return f"{describe_method(method.func)}({', '.join(map(str, parts))})"
    if isinstance(method, str | int | float | tuple | list | None):
        return repr(method)
    named = method if hasattr(method, "__qualname__") else type(method)
    return f"{named.__module__}.{named.__qualname__}"

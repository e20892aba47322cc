"""The full cache alone, as text: how fast, how large, how good, and how far two equal measurements lie apart."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from knormpress.compare import summarize
from knormpress.records import Record

__all__ = ["describe_baseline"]

_WIDTH = 80
_INDENT = " " * 13


def describe_baseline(record: Record) -> Iterator[str]:
    """Lines that sum up a record in which both sides are the full cache (method ``full``).

    As both sides did the same, the changes between them are the noise of this machine: another method's change of that
    size says nothing. Lines have at most 80 columns, but for names without a space.
    """
    for line in _lines(record):
        yield from textwrap.wrap(
            line, _WIDTH, subsequent_indent=_INDENT, break_long_words=False, break_on_hyphens=False
        )


def _lines(record: Record) -> Iterator[str]:
    row = summarize(record)
    speed, conditions, memory, environment = row.baseline, record.conditions, record.memory, record.environment
    cold = record.latency.ttft_cold_s
    scored = conditions.samples * conditions.scored_tokens
    yield f"model        {record.model.name}, {record.model.dtype}, from {record.model.source}"
    yield f"text         {record.text.name}"
    yield f"device       {environment.device} ({environment.device_name}), threads: {environment.threads}"
    yield f"prompt       {conditions.prompt_tokens:,} tokens, and {conditions.new_tokens:,} new ones, {row.pairs} times"
    yield (
        f"TTFT         {speed.ttft_s:.3f} s warm"
        + ("" if cold is None else f", {cold:.3f} s cold (the first call of the process)")
    )
    yield (
        f"TPOT         {speed.tpot_s * 1e3:.1f} ms; gaps p50 {speed.gap_p50_s * 1e3:.1f} ms, "
        f"p90 {speed.gap_p90_s * 1e3:.1f} ms"
    )
    yield f"throughput   {speed.throughput:.2f} new tokens/s, the prompt's time included"
    yield f"cache        {memory.baseline_cache_bytes / 1e6:.1f} MB after the prompt"
    for reading in memory.baseline_device:
        shown = f"not given: {reading.reason}" if reading.bytes is None else f"{reading.bytes / 1e6:,.1f} MB"
        yield f"memory       {reading.name}: {shown}"
    yield f"PPL          {row.baseline_ppl:.3f} on {scored:,} tokens, each after {conditions.context_tokens:,} or more"
    yield (
        f"noise        TTFT {row.ttft} ({row.ttft.interval}), TPOT {row.tpot} ({row.tpot.interval}), "
        f"throughput {row.throughput} ({row.throughput.interval}): the full cache against itself"
    )

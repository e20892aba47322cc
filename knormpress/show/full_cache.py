"""The full cache alone, as text: speed, size, quality, and the difference between two equal measurements."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from knormpress.records.checks import sound
from knormpress.records.schema import Record

__all__ = ["describe_full_cache"]

_WIDTH = 80
_INDENT = " " * 13


def describe_full_cache(record: Record) -> Iterator[str]:
    """Lines that summarise a record in which both sides are the full cache (method ``full``).

    Both sides did the same, so the changes between them are this machine's noise: a change of that size for another
    method means nothing. Lines have at most 80 columns, except for long names.
    """
    for line in _lines(record):
        yield from textwrap.wrap(
            line, _WIDTH, subsequent_indent=_INDENT, break_long_words=False, break_on_hyphens=False
        )


def _lines(record: Record) -> Iterator[str]:
    record = sound(record)
    latency, memory, quality = record.latency, record.memory, record.quality
    conditions, environment = record.conditions, record.environment
    speed, cold = latency.baseline_speed, latency.ttft_cold_s
    scored = conditions.samples * conditions.scored_tokens
    yield f"model        {record.model.name}, {record.model.dtype}, from {record.model.source}"
    yield f"text         {record.text.name}"
    yield f"device       {environment.device} ({environment.device_name}), threads: {environment.threads}"
    if environment.device_map is not None:
        yield f"map          {environment.device_map}"
    yield (
        f"prompt       {conditions.prompt_tokens:,} tokens, and {conditions.new_tokens:,} new ones, "
        f"{latency.pairs} times"
    )
    yield (
        f"TTFT         {speed.ttft_s:.3f} s warm"
        + ("" if cold is None else f", {cold:.3f} s cold (the first call of the process)")
    )
    yield (
        f"TPOT         {speed.tpot_s * 1e3:.1f} ms; gaps p50 {speed.gap_p50_s * 1e3:.1f} ms, "
        f"p90 {speed.gap_p90_s * 1e3:.1f} ms"
    )
    yield f"throughput   {speed.throughput:.2f} new tokens/s, including the prompt's time"
    decoded = memory.baseline_decoded_bytes
    yield (
        f"cache        {memory.baseline_cache_bytes / 1e6:.1f} MB after the prompt"
        + ("" if decoded is None else f", {decoded / 1e6:.1f} MB after {memory.decoded_tokens:,} decoded tokens")
    )
    for reading in memory.baseline_device:
        shown = f"not available: {reading.reason}" if reading.bytes is None else f"{reading.bytes / 1e6:,.1f} MB"
        yield f"memory       {reading.name}: {shown}"
    yield (
        f"PPL          {quality.baseline_ppl:.3f} on {scored:,} tokens, "
        f"each after {conditions.context_tokens:,} or more"
    )
    changes = {"TTFT": latency.ttft, "TPOT": latency.tpot, "throughput": latency.throughput}
    noise = ", ".join(f"{name} {change} ({change.interval})" for name, change in changes.items())
    yield f"noise        {noise}: the full cache against itself"

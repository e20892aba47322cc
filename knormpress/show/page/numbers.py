"""The raw numbers, as files that are embedded in the page."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple

from knormpress.records.figures import Speed
from knormpress.records.history import History
from knormpress.records.schema import Record
from knormpress.show.page.followed import FIGURES
from knormpress.show.page.parts import Block, Download
from knormpress.stats.intervals import Change

__all__ = ["downloads"]

_CHANGES = ("ttft", "tpot", "throughput", "ppl", "cache")
_OF_A_SIDE = (*Speed._fields, "ppl", "cache_bytes", "decoded_cache_bytes")


def downloads(records: Sequence[Record], cells: Sequence[Record], history: History) -> Iterator[Block]:
    """The complete records, the tables in full precision, and the history's figures (its entries are too large)."""
    if records:
        lines = "".join(f"{record.model_dump_json()}\n" for record in records)
        what = f"{len(records)} complete records: JSON Lines"
        yield Download("records.jsonl", "application/x-ndjson", lines, what)
        yield Download("results.csv", "text/csv", _csv(_results(cells)), "the tables above in full precision: CSV")
    if history.entries:
        what = f"the figures of {len(history.entries)} stored entries in full precision: CSV"
        yield Download("history.csv", "text/csv", _csv(_history(history)), what)


def _results(records: Sequence[Record]) -> Iterator[list[object]]:
    yield [
        *("model", "dtype", "text", "device", "device_map", "commit", "method"),
        *("keep_ratio", "prompt_tokens", "new_tokens", "candidate_chunk", "reused_tokens", "pairs"),
        *(f"{name}_change_{part}" for name in _CHANGES for part in ("percent", "low", "high")),
        *(f"{side}_{name}" for side in ("full", "pruned") for name in _OF_A_SIDE),
        *("kl_nats", "top1"),
    ]
    for record in records:
        model, conditions, environment, memory = record.model, record.conditions, record.environment, record.memory
        yield [
            *(model.name, model.dtype, record.text.name, environment.device, environment.device_map),
            *(environment.git_commit, record.policy.method, record.keep_ratio),
            *(conditions.prompt_tokens, conditions.new_tokens),
            *(conditions.candidate_chunk, conditions.reused_tokens, record.latency.pairs),
            *(figure for change in _changes(record) for figure in astuple(change)),
            *(
                *record.latency.baseline_speed,
                record.quality.baseline_ppl,
                memory.baseline_cache_bytes,
                memory.baseline_decoded_bytes,
            ),
            *(
                *record.latency.candidate_speed,
                record.quality.candidate_ppl,
                memory.candidate_cache_bytes,
                memory.candidate_decoded_bytes,
            ),
            *(record.quality.kl, record.quality.top1),
        ]


def _changes(record: Record) -> tuple[Change, ...]:
    """In the order of ``_CHANGES``."""
    latency = record.latency
    return latency.ttft, latency.tpot, latency.throughput, record.quality.ppl, record.memory.change


def _history(history: History) -> Iterator[list[object]]:
    yield ["run", "created", "commit", "test", "method", "passed", *(figure.label for figure in FIGURES)]
    for entry in history.entries:
        names = (entry.run, entry.created, entry.environment.git_commit, entry.test, entry.method, entry.passed)
        yield [*names, *(figure.of(entry) for figure in FIGURES)]


def _csv(lines: Iterable[list[object]]) -> str:
    written = io.StringIO()
    csv.writer(written).writerows([_harmless(cell) for cell in line] for line in lines)
    return written.getvalue()


def _harmless(cell: object) -> object:
    """A cell that is safe in a spreadsheet, which would run a name that begins like a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(tuple("=+-@\t\r")) else cell

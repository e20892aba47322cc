"""The raw numbers, as files that the page carries in itself."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple

from knormpress.compare import Row
from knormpress.history import History
from knormpress.records import Record
from knormpress.report.parts import Block, Download
from knormpress.report.past import FIGURES

__all__ = ["downloads"]

_CHANGES = ("ttft", "tpot", "throughput", "ppl", "cache")
_SPEED = ("ttft_s", "tpot_s", "throughput", "gap_p50_s", "gap_p90_s")


def downloads(records: Sequence[Record], rows: Sequence[Row], history: History) -> Iterator[Block]:
    """The records whole, the tables in full precision, and the history's figures: its entries would be too large."""
    if records:
        lines = "".join(f"{record.model_dump_json()}\n" for record in records)
        what = f"{len(records)} records, as they were measured: JSON Lines"
        yield Download("records.jsonl", "application/x-ndjson", lines, what)
        yield Download("results.csv", "text/csv", _csv(_results(rows)), "the tables above in full precision: CSV")
    if history.entries:
        what = f"the figures of {len(history.entries)} stored entries in full precision: CSV"
        yield Download("history.csv", "text/csv", _csv(_history(history)), what)


def _results(rows: Sequence[Row]) -> Iterator[list[object]]:
    yield [
        *("model", "dtype", "text", "device", "commit", "method"),
        *("keep_ratio", "prompt_tokens", "new_tokens", "pairs"),
        *(f"{name}_change_{part}" for name in _CHANGES for part in ("percent", "low", "high")),
        *(f"{side}_{name}" for side in ("full", "pruned") for name in (*_SPEED, "ppl", "cache_bytes")),
        *("kl_nats", "top1"),
    ]
    for row in rows:
        record = row.record
        model, conditions, environment = record.model, record.conditions, record.environment
        yield [
            *(model.name, model.dtype, record.text.name, environment.device, environment.git_commit),
            *(record.policy.method, row.keep_ratio),
            *(conditions.prompt_tokens, conditions.new_tokens, row.pairs),
            *(figure for name in _CHANGES for figure in astuple(getattr(row, name))),
            *(*astuple(row.baseline), row.baseline_ppl, row.baseline_cache_bytes),
            *(*astuple(row.candidate), row.candidate_ppl, row.cache_bytes),
            *(row.kl, row.top1),
        ]


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
    """A cell as a spreadsheet shows it: a name that begins like a formula would be run."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(tuple("=+-@\t\r")) else cell

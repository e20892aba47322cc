"""The results as tables in the terminal, with the guide's targets and claims judged beneath them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import astuple

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from knormpress.compare import Change, Judgement, Row, Speed, group_rows, judge_claims, judge_targets
from knormpress.console import make_console
from knormpress.verdicts import speed_moved

__all__ = ["WIDTH", "cautions", "print_tables", "render"]

WIDTH = 80
"""Columns that everything here fits into."""

_ENOUGH_PAIRS = 6
_ENOUGH_DOCUMENTS = 10


def print_tables(rows: Iterable[Row], console: Console | None = None) -> None:
    """Print one set of tables for each setting that was measured (prompt length, device, method, ...).

    At most 80 columns are used, in a pipe too; there the text carries no colour codes.
    """
    console = console or make_console()
    width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    rows = list(rows)
    for group in group_rows(rows):
        console.print(render(group, beside=rows), width=width)


def render(rows: Sequence[Row], beside: Sequence[Row] = ()) -> RenderableType:
    """The tables of rows that differ in nothing but the keep ratio (one group of ``group_rows``).

    ``beside`` holds the other rows of the file, of which one may tell how long the first, cold call took.
    """
    parts: list[RenderableType] = [_heading(rows), _changes(rows), _figures(rows)]
    verdicts = [*judge_targets(rows), *judge_claims(rows, beside)]
    if verdicts:
        parts += [_verdicts(verdicts), *_reasons(verdicts)]
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


def _heading(rows: Sequence[Row]) -> Text:
    record = rows[0].record
    policy, conditions, environment = record.policy, record.conditions, record.environment
    context = conditions.context_tokens
    skipped = ", ".join(map(str, policy.skip_layers)) or "none"
    chunk = "" if conditions.prefill_chunk is None else f" in chunks of {conditions.prefill_chunk:,}"
    pairs = [row.pairs for row in rows]
    prompt = f"prompt of {conditions.prompt_tokens:,} tokens{chunk}, {conditions.new_tokens:,} new tokens"
    lines = [
        f"KnormPress: {policy.method}, prune_after {policy.prune_after:,}, skip_layers {skipped}, {policy.schedule}",
        f"model    {record.model.name}, {record.model.dtype}",
        f"text     {record.text.name}",
        f"device   {environment.device} ({environment.device_name}), threads: {environment.threads}",
        f"timing   {prompt}, pairs of runs: {' to '.join(dict.fromkeys((str(min(pairs)), str(max(pairs)))))}",
        f"quality  {conditions.samples:,} samples: {conditions.scored_tokens:,} tokens scored after {context:,}",
        f"cache    {_megabytes(rows[0].baseline_cache_bytes)} MB when nothing is pruned",
    ]
    return Text(lines[0], style="bold").append("\n" + "\n".join(lines[1:]), style="not bold")


def _table(title: str, columns: Iterable[str], caption: str | None = None) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=title,
        title_style="bold",
        title_justify="left",
        caption=caption,
        caption_justify="left",
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def cautions(rows: Sequence[Row]) -> list[str]:
    """What to bear in mind of the intervals of ``rows``, in sentences: too few runs, a machine whose speed moved."""
    few = []
    if any(row.pairs < _ENOUGH_PAIRS for row in rows):
        few.append(
            f"With fewer than {_ENOUGH_PAIRS} pairs a timing's interval holds the truth less often than in 95 %."
        )
    if any(row.record.conditions.samples < _ENOUGH_DOCUMENTS for row in rows):
        does = "does so too" if few else "holds the truth less often than in 95 %"
        few.append(f"With fewer than {_ENOUGH_DOCUMENTS} samples PPL's interval {does}.")
    moved = [moved for row in rows if (moved := speed_moved(row.record.latency)) is not None]
    if moved:
        few.append(f"The machine's speed moved by up to {max(map(abs, moved)):.0f} % while a ratio was timed.")
    return few


def _changes(rows: Sequence[Row]) -> Table:
    names = ("TTFT", "throughput", "TPOT", "PPL")
    table = _table(
        "Change against the full cache, 95 % interval beneath",
        ("keep\nratio", "compr.\n%", *(f"{name}\nchange" for name in names), "cache\nMB"),
        " ".join(cautions(rows)) or None,
    )
    for row in rows:
        changes = [_two_lines(change) for change in (row.ttft, row.throughput, row.tpot, row.ppl)]
        table.add_row(row.label, f"{row.compression * 100:.3g}", *changes, _megabytes(row.cache_bytes))
    return table


def _two_lines(change: Change) -> Text:
    return Text(str(change)).append(f"\n{change.interval}", style="dim")


def _figures(rows: Sequence[Row]) -> Table:
    """The full cache is measured beside every ratio; its row holds the medians of those measurements."""
    table = _table(
        "The figures behind them",
        (
            "keep\nratio",
            "TTFT\ns",
            "TPOT\nms",
            "gap p50\nms",
            "gap p90\nms",
            "throughput\ntokens/s",
            "PPL\n",
            "KL\nnats",
            "top-1\n%",
        ),
    )
    speeds = [_middle([row.baseline for row in rows]), *(row.candidate for row in rows)]
    columns = [
        _aligned([speed.ttft_s for speed in speeds]),
        *(
            _aligned([seconds * 1e3 for seconds in times])
            for times in zip(*((speed.tpot_s, speed.gap_p50_s, speed.gap_p90_s) for speed in speeds), strict=True)
        ),
        _aligned([speed.throughput for speed in speeds]),
        [_perplexity(ppl) for ppl in (rows[0].baseline_ppl, *(row.candidate_ppl for row in rows))],
        ["", *(f"{row.kl:.3f}" for row in rows)],
        ["", *(f"{row.top1 * 100:.1f}" for row in rows)],
    ]
    for label, *figures in zip(["full", *(row.label for row in rows)], *columns, strict=True):
        table.add_row(label, *figures)
    return table


def _middle(speeds: Sequence[Speed]) -> Speed:
    return Speed(*(statistics.median(values) for values in zip(*map(astuple, speeds), strict=True)))


def _aligned(values: Sequence[float]) -> list[str]:
    """Three significant digits of the smallest value, and as many decimals for all of them."""
    decimals = max(0, 2 - math.floor(math.log10(min(values))))
    return [f"{value:.{decimals}f}" for value in values]


def _verdicts(verdicts: Sequence[Judgement]) -> Table:
    close = any(verdict.crosses for verdict in verdicts)
    table = _table(
        "The guide's targets and claims",
        ("", "", "keep ratio", "wanted", "measured", "95 % interval", "verdict"),
        "~ the interval crosses the limit: measured again, it may end the other way." if close else None,
    )
    for column in (0, 1, -1):
        table.columns[column].justify = "left"
    ordered = sorted(verdicts, key=lambda verdict: (verdict.kind == "claim", _WHAT.index(verdict.what)))
    previous = ("", "")
    for verdict in ordered:
        group = (verdict.kind, verdict.what)
        if previous[0] not in ("", verdict.kind):
            table.add_section()
        table.add_row(
            *(("", "") if group == previous else group),
            verdict.label,
            verdict.promised,
            str(verdict.measured),
            verdict.measured.interval,
            Text(verdict.word, style="green" if verdict.met else "red"),
        )
        previous = group
    return table


_WHAT = ("TTFT", "throughput", "PPL")


def _reasons(verdicts: Sequence[Judgement]) -> list[RenderableType]:
    reasons = dict.fromkeys(verdict.why for verdict in verdicts if verdict.why is not None)
    heading = Text("Why a claim is not met", style="bold")
    return [Group(heading, *(Padding(Text(reason), (0, 0, 0, 2)) for reason in reasons))] if reasons else []


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def _perplexity(ppl: float) -> str:
    return f"{ppl:.2f}" if ppl < 1000 else f"{ppl:.3g}"

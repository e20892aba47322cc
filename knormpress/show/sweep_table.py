"""The results of a sweep as tables in the terminal, with verdicts on the guide's targets and claims."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import get_args

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from knormpress.compare.promises import UNSURE, Judgement, judge_claims, judge_targets, losses
from knormpress.compare.settings import group_records
from knormpress.records.figures import Counted, Phase, Speed
from knormpress.records.schema import Record
from knormpress.show.console import StackingTable, make_console
from knormpress.stats.intervals import Change
from knormpress.stats.perplexity import too_few

__all__ = ["WIDTH", "about_the_ways", "below_the_cache", "beyond_the_mean", "cautions", "print_tables", "render"]

WIDTH = 80
"""The most columns that the tables use."""

_ENOUGH_PAIRS = 6


def print_tables(records: Iterable[Record], console: Console | None = None) -> None:
    """Print one set of tables for each setting (prompt length, device, method, ...).

    Uses at most 80 columns, also in a pipe; text in a pipe has no colour codes.
    """
    console = console or make_console()
    width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    records = list(records)
    for group in group_records(records):
        console.print(render(group, beside=records), width=width)


def render(records: Sequence[Record], beside: Sequence[Record] = ()) -> RenderableType:
    """The tables of records that differ only in keep ratio (one group of ``group_records``).

    ``beside`` are the other records of the file; one of them may have the time of the first, cold call.
    """
    parts: list[RenderableType] = [_heading(records), _changes(records), _figures(records)]
    more = beyond_the_mean(records)
    if more:
        parts.append(_beyond_the_mean(more))
    counted = [record for record in records if record.cost is not None]
    if counted:
        parts.append(_counted(counted))
    verdicts = [*judge_targets(records), *judge_claims(records, beside)]
    if verdicts:
        parts += [_verdicts(verdicts), *_reasons(verdicts)]
    lost = losses(records)
    if lost:
        heading = Text("What pruning loses, and perplexity does not show", style="bold")
        parts.append(Group(heading, *(Padding(Text(sentence), (0, 0, 0, 2)) for sentence in lost)))
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


def _heading(records: Sequence[Record]) -> Text:
    record = next((record for record in records if record.policy.layer_keep_ratios is None), records[0])
    policy, conditions, environment = record.policy, record.conditions, record.environment
    context = conditions.context_tokens
    skipped = ", ".join(map(str, policy.skip_layers)) or "none"
    chunk = "" if conditions.prefill_chunk is None else f" in chunks of {conditions.prefill_chunk:,}"
    pairs = [record.latency.pairs for record in records]
    prompt = f"prompt of {conditions.prompt_tokens:,} tokens{chunk}, {conditions.new_tokens:,} new tokens"
    lines = [
        f"KnormPress: {policy.method}, prune_after {policy.prune_after:,}, skip_layers {skipped}, {policy.schedule}",
        f"model    {record.model.name}, {record.model.dtype}",
        f"text     {record.text.name}",
        f"device   {environment.device} ({environment.device_name}), threads: {environment.threads}{_nodes(records)}",
        *([] if environment.device_map is None else [f"map      {environment.device_map}"]),
        f"timing   {prompt}, pairs of runs: {' to '.join(dict.fromkeys((str(min(pairs)), str(max(pairs)))))}",
        f"quality  {conditions.samples:,} samples: {conditions.scored_tokens:,} tokens scored after {context:,}",
        *_retrieval(records),
        f"cache    {_megabytes(records[0].memory.baseline_cache_bytes)} MB when nothing is pruned{_then(records[0])}",
    ]
    return Text(lines[0], style="bold").append("\n" + "\n".join(lines[1:]), style="not bold")


def _nodes(records: Sequence[Record]) -> str:
    """Where they were measured in a cluster."""
    names = dict.fromkeys(record.environment.node for record in records if record.environment.node)
    return f", node: {', '.join(names)}" if names else ""


def _retrieval(records: Sequence[Record]) -> list[str]:
    """What was asked, and how much of it the full cache finds; nothing if nothing was asked."""
    retrieval = next((record.retrieval for record in records if record.retrieval), None)
    if retrieval is None:
        return []
    solved = retrieval.share.known
    tasks = ", ".join(f"{task} {retrieval.of(task).share.known}/{asked}" for task, asked in retrieval.asked.items())
    return [f"found    of {solved} items that the full cache solves ({tasks})"]


def _table(title: str, columns: Iterable[str], caption: str | None = None) -> Table:
    table = StackingTable(
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


def cautions(records: Sequence[Record]) -> list[str]:
    """Why intervals of ``records`` are missing or doubtful, in sentences."""
    notes = []
    if any(record.latency.pairs < _ENOUGH_PAIRS for record in records):
        pairs = min(record.latency.pairs for record in records)
        notes.append(f"Timings: too few pairs ({pairs} of {_ENOUGH_PAIRS}) for an interval.")
    if few := too_few(min(len(record.quality.documents) for record in records)):
        notes.append(f"PPL: {few}; see --samples.")
    moves = [moved for record in records if (moved := record.latency.speed_moved) is not None]
    if moves:
        notes.append(f"The machine's speed changed by up to {max(map(abs, moves)):.0f} % while a ratio was timed.")
    return notes


def _changes(records: Sequence[Record]) -> Table:
    names = ("TTFT", "throughput", "TPOT", "PPL")
    asked = any(record.retrieval for record in records)
    table = _table(
        "Change against the full cache, 95 % interval below",
        ("keep\nratio", *(f"{name}\nchange" for name in names), *(["found\n"] if asked else []), "cache\nMB"),
        " ".join([*about_the_ways(records), *below_the_cache(records), *cautions(records)]) or None,
    )
    for record in records:
        changes = (record.latency.ttft, record.latency.throughput, record.latency.tpot, record.quality.ppl)
        table.add_row(
            record.row,
            *map(_two_lines, changes),
            *([_found(record)] if asked else []),
            _cache(record),
        )
    return table


def _found(record: Record) -> Text:
    if record.retrieval is None:
        return Text("-")
    share = record.retrieval.share
    return Text(f"{share.found} of {share.known}").append(f"\n{share.ends}", style="dim")


def _cache(record: Record) -> Text:
    decoded = record.memory.candidate_decoded_bytes
    text = Text(_megabytes(record.memory.candidate_cache_bytes))
    return text if decoded is None else text.append(f"\n{_megabytes(decoded)}", style="dim")


def about_the_ways(records: Sequence[Record]) -> list[str]:
    """How the prompts came that did not come as the full cache's, in sentences."""
    chunks = {record.conditions.candidate_chunk for record in records} - {None}
    left = {
        record.conditions.prompt_tokens - record.conditions.reused_tokens
        for record in records
        if record.conditions.reused_tokens is not None
    }
    return [
        *(
            f"In chunks: the prompt comes in chunks of {chunk:,} tokens, each pruned."
            for chunk in sorted(filter(None, chunks))
        ),
        *(f"Reused: all but the prompt's last {tokens:,} tokens are loaded, pruned before." for tokens in sorted(left)),
    ]


def below_the_cache(records: Sequence[Record]) -> list[str]:
    """What stands below the cache's bytes, in a sentence; nothing where no token was decoded for it."""
    tokens = max(record.memory.decoded_tokens for record in records)
    return [f"Below the cache after the prompt: after {tokens:,} decoded tokens."] if tokens else []


def _then(record: Record) -> str:
    memory = record.memory
    if memory.baseline_decoded_bytes is None:
        return ""
    return f", {_megabytes(memory.baseline_decoded_bytes)} after {memory.decoded_tokens:,} more tokens"


def _two_lines(change: Change) -> Text:
    return Text(str(change)).append(f"\n{change.interval}", style="dim")


def _figures(records: Sequence[Record]) -> Table:
    """The full cache is measured with every ratio; its row has the medians of these measurements."""
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
    full = _median_speed([record.latency.baseline_speed for record in records])
    speeds = [full, *(record.latency.candidate_speed for record in records)]
    ppls = [records[0].quality.baseline_ppl, *(record.quality.candidate_ppl for record in records)]
    columns = [
        _aligned([speed.ttft_s for speed in speeds]),
        *(
            _aligned([seconds * 1e3 for seconds in times])
            for times in zip(*((speed.tpot_s, speed.gap_p50_s, speed.gap_p90_s) for speed in speeds), strict=True)
        ),
        _aligned([speed.throughput for speed in speeds]),
        list(map(_perplexity, ppls)),
        ["", *(f"{record.quality.kl:.3f}" for record in records)],
        ["", *(f"{record.quality.top1 * 100:.1f}" for record in records)],
    ]
    for label, *figures in zip(["full", *(record.row for record in records)], *columns, strict=True):
        table.add_row(label, *figures)
    return table


def beyond_the_mean(records: Sequence[Record]) -> list[Record]:
    """Those of ``records`` that have more than mean figures of quality; records of earlier versions have none."""
    return [
        record for record in records if record.quality.divergence or record.quality.long_range or record.quality.decoded
    ]


def _beyond_the_mean(records: Sequence[Record]) -> Table:
    table = _table(
        "Beyond the mean",
        (
            "keep\nratio",
            "KL p50\nnats",
            "p90\n",
            "p99\n",
            "largest\n",
            "long-range\nPPL change",
            "over\ntokens",
            "decoded\nPPL change",
        ),
        "Long-range: over the tokens that need what is far away. Decoded: pruned at new tokens too, as when they are "
        "generated; behind a reused context the same as in the plan's own row.",
    )
    for record in records:
        quality = record.quality
        table.add_row(
            record.row,
            *(["-"] * 4 if quality.divergence is None else [f"{nats:.3f}" for nats in quality.divergence]),
            "-" if quality.long_range is None else _two_lines(quality.long_range),
            "-" if quality.long_range is None else f"{quality.long_range_tokens:,}",
            "-" if quality.decoded is None else _two_lines(quality.decoded),
        )
    return table


def _counted(records: Sequence[Record]) -> Table:
    names: tuple[Counted, ...] = get_args(Counted)
    phases: tuple[Phase, ...] = get_args(Phase)
    table = _table(
        "Counted cost against the full cache",
        ("keep\nratio", "", "operators\n", "bytes\nmoved", "FLOPs\n", "bytes\nallocated", "host\nreads"),
        "The same on every machine. Of decoded tokens the mean, a pruning among them; host reads as a figure of each.",
    )
    for record in records:
        cost = record.cost
        assert cost is not None
        for phase in phases:
            changes = [str(cost.change(phase, name)) for name in names[:-1]]
            reads = f"{cost.candidate(phase, 'host_reads'):.3g}"
            table.add_row(record.row if phase == phases[0] else "", phase, *changes, reads)
    return table


def _median_speed(speeds: Sequence[Speed]) -> Speed:
    return Speed(*(statistics.median(values) for values in zip(*speeds, strict=True)))


def _aligned(values: Sequence[float]) -> list[str]:
    """All values with the same number of decimals, so that the smallest has three significant digits."""
    decimals = max(0, 2 - math.floor(math.log10(min(values))))
    return [f"{value:.{decimals}f}" for value in values]


def _verdicts(verdicts: Sequence[Judgement]) -> Table:
    table = _table(
        "The guide's targets and claims",
        ("", "", "keep ratio", "wanted", "measured", "95 % interval", "verdict"),
        None if all(verdict.is_sure for verdict in verdicts) else UNSURE,
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

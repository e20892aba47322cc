"""Verdicts, tables and controls of measured records, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from knormpress.compare.promises import Judgement, judge_claims, judge_targets, losses
from knormpress.compare.settings import differences
from knormpress.records.figures import ROUNDING_KL, Speed, ppl_change_between
from knormpress.records.schema import Record
from knormpress.show.page.cost import cost_tables
from knormpress.show.page.parts import Block, Cell, Facts, Heading, Line, Statement, Statements, Table, Tone, Words
from knormpress.show.page.settings import NOISE, Family, is_control, listed
from knormpress.show.pictures.style import pretty, three_digits
from knormpress.show.sweep_table import about_the_ways, below_the_cache, beyond_the_mean, cautions
from knormpress.stats.intervals import Change

__all__ = ["DEFINITIONS", "control_blocks", "interval", "table_blocks", "verdict_blocks"]

DEFINITIONS = Facts(
    (
        (
            "Change and interval",
            "Every change is against the full cache, measured in turn with it in the same process. A timing's change "
            "is the median over pairs of runs, with its 95 % interval in brackets. The machine's speed "
            "affects absolute times, but hardly these ratios.",
        ),
        ("Keep ratio", "The share of the tokens seen that a pruned layer keeps: at 0.9, 10 % are dropped."),
        (
            "TTFT",
            "Time to first token: from the call with the prompt on the device until the first new token's id is on the "
            "host, warm. The first call of a process is listed apart, as cold TTFT. Lower is better.",
        ),
        (
            "TPOT",
            "Time per output token: the time from the first new token to the last, divided by the tokens after the "
            "first. Gap p50 and p90 are percentiles of the times between tokens. Lower is better.",
        ),
        ("Throughput", "New tokens divided by the whole time, which includes the prompt's. Higher is better."),
        (
            "PPL",
            "Perplexity on tokens after the first pruning, which attend to the pruned cache; the full cache scores "
            "the same tokens. Lower is better.",
        ),
        (
            "KL and top-1",
            "How much the predictions differ from the full cache's: mean KL divergence in nats (0: not at all), and "
            "the share of scored tokens for which both caches have the same first choice.",
        ),
        (
            "KL percentiles",
            "The KL divergence is taken for each scored token. p50 is the median over these tokens; p90, p99 and the "
            "largest show what the mean hides: a few tokens that are predicted quite differently.",
        ),
        (
            "Long-range PPL",
            "The change of perplexity over those scored tokens only that need what is far away: the model's loss is "
            "lower by more than 2 nats behind the whole context than behind its last 128 to 191 tokens. Beside the "
            "interval, how many tokens these are.",
        ),
        (
            "Decoded PPL",
            "The change of perplexity with the scored tokens fed as when they are generated, one by one: the cache is "
            "pruned among them too, and the loss of that is in the figure.",
        ),
        (
            "Found",
            "Items that stand in a text and are asked for after the cache was pruned: how many are found, of those "
            "that the full cache finds, with Wilson's 95 % interval. Higher is better.",
        ),
        ("Cache bytes", "Bytes of storage that the cache holds after the prompt, counted exactly."),
        (
            "Counted cost",
            "Operators, bytes moved and allocated, floating-point operations, and how often the host waits for a "
            "number, in the prefill and in a decoded token. It is the same on every machine with the same software and "
            "kind of device, but it does not see what happens inside an operator. Lower is better.",
        ),
        (
            "Control",
            "A method that must be worse (random, highest-norm, recent-window), or the full cache against itself, "
            "whose change is the machine's noise. If a control is not worse, the measurement can't be trusted.",
        ),
    )
)

_NAMES = {"TTFT": "time to first token", "throughput": "throughput", "PPL": "perplexity"}
_TARGETS = {
    "PPL": ("Perplexity stays within ±5 %", "within ±5 %", "outside ±5 %"),
    "throughput": (
        "Throughput falls by no more than 10 %",
        "a loss of 10 % is allowed",
        "more than 10 % is lost",
    ),
    "TTFT": ("Time to first token falls by 80 %", "as wanted, at least 80 %", "a fall of 80 % is wanted"),
}
# What a retrieval gate requires unless told otherwise.
_MOST_FOUND = 0.9
_AGAIN = ", but the interval crosses the limit: another measurement may have the other result"


def verdict_blocks(families: Sequence[Family], records: Sequence[Record]) -> Iterator[Block]:
    """The guide's targets and claims, for each family and method; ``records`` may have a cold first call."""
    judged = 0
    for family in families:
        for group in family.methods:
            kinds = (
                ("The guide's targets", judge_targets(group), _target),
                ("The guide's claims", judge_claims(group, records), _claim),
            )
            for title, verdicts, sentence in kinds:
                if verdicts:
                    judged += 1
                    method = group[0].policy.method
                    yield Heading(", ".join(filter(None, (f"{title}: {method}", family.title))))
                    yield Statements(tuple(_statement(title, what, verdicts, sentence) for what in _TARGETS))
            yield from _losses(group, family.title)
    if records and not judged:
        yield Words("There is no record of a method that drops tokens, so there is nothing to judge.")


def _losses(group: Sequence[Record], title: str) -> Iterator[Block]:
    """What the method loses of what the full cache finds; the guide promises nothing about it."""
    dropping = [record for record in group if record.keep_ratio < 1.0 and record.retrieval and record.retrieval.items]
    if dropping:
        yield Heading(", ".join(filter(None, (f"What is lost: {group[0].policy.method}", title))))
        yield Statements(
            tuple(
                Statement(
                    "good" if record.retrieval and record.retrieval.share.low >= _MOST_FOUND else "bad",
                    "found" if record.retrieval and record.retrieval.share.low >= _MOST_FOUND else "lost",
                    _unbroken(sentence),
                )
                for record, sentence in zip(dropping, losses(dropping), strict=True)
            )
        )


def _statement(title: str, what: str, verdicts: Sequence[Judgement], sentence: Callable[[Judgement], str]) -> Statement:
    verdicts = [verdict for verdict in verdicts if verdict.what == what]
    met = [verdict.label for verdict in verdicts if verdict.met]
    missed = [verdict.label for verdict in verdicts if not verdict.met]
    sure = all(verdict.is_sure for verdict in verdicts)
    tone: Tone = "bad" if not met else "good" if sure and not missed else "unsure"
    word = "not met" if not met else "partly met" if missed else "met" if sure else "met ~"
    name = _TARGETS[what][0] if "target" in title else f"The claim about {_NAMES[what]}"
    parts = [f"{text} at {listed(labels)}" for text, labels in (("met", met), ("not met", missed)) if labels]
    lines = tuple(Line(_tone(verdict), verdict.word, sentence(verdict)) for verdict in verdicts)
    why = next((verdict.why for verdict in verdicts if verdict.why is not None), None)
    return Statement(tone, word, f"{name}: {'; '.join(parts)}.", lines, why)


def _tone(verdict: Judgement) -> Tone:
    if not verdict.is_sure:
        return "unsure"
    return "good" if verdict.met else "bad"


def _target(verdict: Judgement) -> str:
    _, met, missed = _TARGETS[verdict.what]
    few = f", from too few {'documents' if verdict.what == 'PPL' else 'runs'} for an interval"
    close = _AGAIN if verdict.crosses else few if verdict.crosses is None else ""
    moves = f"{_NAMES[verdict.what]} {_moves(verdict.measured)}"
    return _unbroken(f"At keep ratio {verdict.label} {moves}: {met if verdict.met else missed}{close}.")


def _claim(verdict: Judgement) -> str:
    measured = f"{pretty(str(verdict.measured))} ({interval(verdict.measured)})"
    return _unbroken(f"At keep ratio {verdict.label} the guide claims {pretty(verdict.promised)}; measured {measured}.")


def _moves(change: Change) -> str:
    text = str(change)
    if text[0] not in "+-":
        return f"does not change ({interval(change)})"
    return f"{'rises' if text[0] == '+' else 'falls'} by {text[1:]} ({interval(change)})"


def interval(change: Change) -> str:
    """An interval as text, with the word to."""
    return pretty(change.interval).replace("..", " to ")


def _unbroken(text: str) -> str:
    """``text`` without line breaks between a figure and its %."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def table_blocks(families: Sequence[Family]) -> Iterator[Block]:
    """For each family, the changes against the full cache and the figures behind them, with controls."""
    for family in families:
        if family.title:
            yield Heading(f"With {family.title}")
        records = sorted((record for group in family.groups for record in group), key=lambda record: -record.keep_ratio)
        yield Table(
            "Change against the full cache, with its 95 % interval below",
            ("Keep ratio", "Method", "TTFT", "TPOT", "Throughput", "PPL", "Found", "KL (nats)", "Top-1", "Cache (MB)"),
            tuple(_change_row(record) for record in records),
            row_heads=2,
            note=" ".join([*about_the_ways(records), *below_the_cache(records), *cautions(records)]),
        )
        yield Table(
            "The figures behind them: the full cache, and below it the method",
            ("Keep ratio", "Method", "TTFT (s)", "TPOT (ms)", "Gap p50 (ms)", "Gap p90 (ms)", "Tokens/s", "PPL"),
            tuple(_figure_row(record) for record in records),
            row_heads=2,
            folded=True,
        )
        more = beyond_the_mean(records)
        if more:
            yield Table(
                "Beyond the mean: percentiles of KL in nats, and two further changes of PPL",
                ("Keep ratio", "Method", "KL p50", "KL p90", "KL p99", "Largest KL", "Long-range PPL", "Decoded PPL"),
                tuple(_more_row(record) for record in more),
                row_heads=2,
                folded=True,
            )
        yield from cost_tables(records)


def _method(record: Record) -> Cell:
    method = record.policy.method
    kind = "control" if is_control(record) else "a ratio per layer" if record.policy.layer_keep_ratios else ""
    kind = ", ".join(filter(None, (kind, record.way)))
    return (method, kind) if kind else method


def _change_row(record: Record) -> tuple[Cell, ...]:
    latency, memory, quality = record.latency, record.memory, record.quality
    return (
        record.label,
        _method(record),
        *(
            (pretty(str(change)), pretty(change.interval))
            for change in (latency.ttft, latency.tpot, latency.throughput, quality.ppl)
        ),
        _found(record),
        f"{quality.kl:.3f}",
        f"{quality.top1 * 100:.1f} %",
        (f"{memory.candidate_cache_bytes / 1e6:,.1f}", pretty(str(memory.change)) + _decoded(record)),
    )


def _found(record: Record) -> Cell:
    share = record.retrieval.share if record.retrieval else None
    return "not asked" if share is None else (str(share), share.ends)


def _decoded(record: Record) -> str:
    decoded = record.memory.candidate_decoded_bytes
    return "" if decoded is None else f"; then {decoded / 1e6:,.1f}"


def _figure_row(record: Record) -> tuple[Cell, ...]:
    full = _figures(record.latency.baseline_speed, record.quality.baseline_ppl)
    pruned = _figures(record.latency.candidate_speed, record.quality.candidate_ppl)
    return record.label, _method(record), *zip(full, pruned, strict=True)


def _more_row(record: Record) -> tuple[Cell, ...]:
    quality = record.quality
    return (
        record.label,
        _method(record),
        *(("-",) * 4 if quality.divergence is None else (f"{nats:.3f}" for nats in quality.divergence)),
        _optional(quality.long_range, f"; {quality.long_range_tokens:,} tokens"),
        _optional(quality.decoded),
    )


def _optional(change: Change | None, note: str = "") -> Cell:
    return "-" if change is None else (pretty(str(change)), pretty(change.interval) + note)


def _figures(speed: Speed, ppl: float) -> list[str]:
    milliseconds = (speed.tpot_s * 1e3, speed.gap_p50_s * 1e3, speed.gap_p90_s * 1e3)
    return [three_digits(figure) for figure in (speed.ttft_s, *milliseconds, speed.throughput, ppl)]


def control_blocks(families: Sequence[Family], records: Sequence[Record]) -> Iterator[Block]:
    """Check each family's controls: keep 1.0 must lose nothing, and worse methods must be measured as worse."""
    for family in families:
        members = [record for group in family.groups for record in group]
        statements = tuple(statement for record in members for statement in _control(record, records))
        if statements and family.title:
            yield Heading(f"With {family.title}")
        if statements:
            yield Statements(statements)
    if not any(is_control(record) for record in records):
        yield Words(
            "No control was measured. Measure one at the same keep ratios, for example with: "
            "knormpress sweep --method random --keep-ratios 0.7 --output results-random"
        )


def _control(record: Record, records: Sequence[Record]) -> Iterator[Statement]:
    method, latency, kl = record.policy.method, record.latency, record.quality.kl
    if method == NOISE:
        figures = {"TTFT": latency.ttft, "TPOT": latency.tpot, "throughput": latency.throughput}
        changes = ", ".join(f"{name} {pretty(str(change))} ({interval(change)})" for name, change in figures.items())
        yield Statement(
            "plain", "noise", _unbroken(f"The full cache against itself: {changes}. Changes of that size mean nothing.")
        )
    elif is_control(record):
        yield _worse(record, records)
    elif record.keep_ratio == 1.0:
        exact = kl < ROUNDING_KL
        text = f"{method} at keep ratio 1.0 must lose nothing: its KL divergence to the full cache is {kl:.2g} nats."
        yield Statement("good" if exact else "bad", "as it must be" if exact else "broken", text)
    elif kl < ROUNDING_KL:
        text = f"{method} at keep ratio {record.label} predicts exactly what the full cache does: nothing was pruned."
        yield Statement("bad", "not pruned", text)


def _worse(control: Record, records: Sequence[Record]) -> Statement:
    """Compare a control's loss with a method's, token by token, since both scored the same tokens."""
    name = f"{control.policy.method} at keep ratio {control.label}"
    partners = [record for record in records if not is_control(record) and _same_scoring(record, control)]
    if not partners:
        return Statement(
            "unsure", "alone", f"{name}: no method was scored on the same tokens at this ratio, to compare it with."
        )
    partner = min(partners, key=lambda record: len(differences([record, control])))
    change = ppl_change_between(partner.quality, control.quality)
    text = _unbroken(
        f"{name}: perplexity {_moves(change)} against {partner.policy.method}; against the full cache the two "
        f"changes are {pretty(str(control.quality.ppl))} and {pretty(str(partner.quality.ppl))}."
    )
    if change.low is not None and change.low > 0:
        return Statement("good", "seen to be worse", text)
    return Statement("bad", "not seen to be worse", f"{text} This measurement can't tell the method from a control.")


def _same_scoring(record: Record, control: Record) -> bool:
    """Whether both records differ only in method, and scored the same tokens."""

    def key(record: Record) -> object:
        policy = record.policy.model_copy(update={"method": ""})
        tokens = [(document.document, len(document.baseline_nll)) for document in record.quality.documents]
        return (
            record.model.fingerprint,
            record.model.dtype,
            record.text.sha256,
            policy,
            record.conditions.context_tokens,
            tokens,
        )

    return key(record) == key(control)

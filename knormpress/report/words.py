"""Verdicts, tables and controls of measured rows, in plain words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from knormpress.changes import ppl_change
from knormpress.compare import Judgement, Row, differences, judge_claims, judge_targets
from knormpress.intervals import Change
from knormpress.plots.style import pretty, three_digits
from knormpress.records import ROUNDING_KL, DocumentScore
from knormpress.report.parts import Block, Cell, Facts, Finding, Findings, Heading, Line, Table, Tone, Words
from knormpress.report.settings import NOISE, Family, is_control, listed
from knormpress.table import cautions

__all__ = ["DEFINITIONS", "control_blocks", "interval", "table_blocks", "verdict_blocks"]

DEFINITIONS = Facts(
    (
        (
            "Change and interval",
            "Every change is against the full cache, measured in turn with it in the same process. A timing's change "
            "is the median over pairs of runs; in brackets stands its bootstrap 95 % interval. Such ratios survive a "
            "change of machine speed; absolute times don't.",
        ),
        ("Keep ratio", "The share of the tokens seen that a pruned layer keeps: at 0.9 a tenth is dropped."),
        (
            "TTFT",
            "Time to first token: from the call with the prompt on the device until the first new token's id is on the "
            "host, warm. The first call of a process is kept apart, as cold TTFT. Lower is better.",
        ),
        (
            "TPOT",
            "Time per output token: the time from the first new token to the last, divided by the tokens after the "
            "first. Gap p50 and p90 are the middle and the slow end of the times between tokens. Lower is better.",
        ),
        ("Throughput", "New tokens divided by the whole time, that of the prompt included. Higher is better."),
        (
            "PPL",
            "Perplexity on tokens that come after the first pruning and attend through the pruned cache; the full "
            "cache scores the same tokens. Lower is better.",
        ),
        (
            "KL and top-1",
            "How far the predictions moved from the full cache's: mean KL divergence in nats (0 is none), and the "
            "share of scored tokens at which both caches rank the same token first.",
        ),
        ("Cache bytes", "Bytes of the storage that the cache really holds after the prompt: a view frees nothing."),
        (
            "Control",
            "A method measured to be seen to be worse (random, highest-norm, recent-window), or the full cache against "
            "itself, whose change is the noise of the machine. A measurement that its control passes can't be trusted.",
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
    "TTFT": ("Time to first token falls by 80 %", "that is the fall of 80 % wanted", "a fall of 80 % is wanted"),
}
_AGAIN = ", but the interval crosses the limit: measured again, it may end the other way"


def verdict_blocks(found: Sequence[Family], rows: Sequence[Row]) -> Iterator[Block]:
    """The guide's targets and claims, for each family and method; ``rows`` may tell of a cold first call."""
    judged = 0
    for family in found:
        for group in family.methods:
            kinds = (
                ("The guide's targets", judge_targets(group), _target),
                ("The guide's claims", judge_claims(group, rows), _claim),
            )
            for title, verdicts, sentence in kinds:
                if verdicts:
                    judged += 1
                    method = group[0].record.policy.method
                    yield Heading(", ".join(filter(None, (f"{title}: {method}", family.title))))
                    yield Findings(tuple(_finding(title, what, verdicts, sentence) for what in _TARGETS))
    if rows and not judged:
        yield Words("No record of a method that drops tokens: there is nothing to judge.")


def _finding(title: str, what: str, verdicts: Sequence[Judgement], sentence: Callable[[Judgement], str]) -> Finding:
    verdicts = [verdict for verdict in verdicts if verdict.what == what]
    met = [verdict.label for verdict in verdicts if verdict.met]
    missed = [verdict.label for verdict in verdicts if not verdict.met]
    tone: Tone = "bad" if not met else "unsure" if missed else "good"
    word = "not met" if not met else "met in part" if missed else "met"
    name = _TARGETS[what][0] if "target" in title else f"What is claimed of {_NAMES[what]}"
    parts = [f"{text} at {listed(labels)}" for text, labels in (("met", met), ("not met", missed)) if labels]
    lines = tuple(
        Line("unsure" if verdict.crosses else "good" if verdict.met else "bad", verdict.word, sentence(verdict))
        for verdict in verdicts
    )
    why = next((verdict.why for verdict in verdicts if verdict.why is not None), None)
    return Finding(tone, word, f"{name}: {'; '.join(parts)}.", lines, why)


def _target(verdict: Judgement) -> str:
    _, met, missed = _TARGETS[verdict.what]
    close = _AGAIN if verdict.crosses else ", from too few runs for an interval" if verdict.crosses is None else ""
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
    """An interval as it is read aloud."""
    return pretty(change.interval).replace("..", " to ")


def _unbroken(text: str) -> str:
    """A sentence in which no line ends between a figure and its %."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def table_blocks(found: Sequence[Family]) -> Iterator[Block]:
    """For each family the changes against the full cache, and the figures behind them; controls beside methods."""
    for family in found:
        if family.title:
            yield Heading(f"With {family.title}")
        rows = sorted((row for group in family.groups for row in group), key=lambda row: -row.keep_ratio)
        yield Table(
            "Change against the full cache, its 95 % interval beneath",
            ("Keep ratio", "Method", "TTFT", "TPOT", "Throughput", "PPL", "KL (nats)", "Top-1", "Cache (MB)"),
            tuple(_change_row(row) for row in rows),
            row_heads=2,
            note=" ".join(cautions(rows)),
        )
        yield Table(
            "The figures behind them: the full cache, and beneath it the method",
            ("Keep ratio", "Method", "TTFT (s)", "TPOT (ms)", "Gap p50 (ms)", "Gap p90 (ms)", "Tokens/s", "PPL"),
            tuple(_figure_row(row) for row in rows),
            row_heads=2,
            folded=True,
        )


def _method(row: Row) -> Cell:
    method = row.record.policy.method
    kind = "control" if is_control(row) else "a ratio per layer" if row.record.policy.layer_keep_ratios else ""
    return (method, kind) if kind else method


def _change_row(row: Row) -> tuple[Cell, ...]:
    changes = [
        (pretty(str(change)), pretty(change.interval)) for change in (row.ttft, row.tpot, row.throughput, row.ppl)
    ]
    cache = (f"{row.cache_bytes / 1e6:,.1f}", pretty(str(row.cache)))
    return (row.label, _method(row), *changes, f"{row.kl:.3f}", f"{row.top1 * 100:.1f} %", cache)


def _figure_row(row: Row) -> tuple[Cell, ...]:
    both = [
        (side.ttft_s, side.tpot_s * 1e3, side.gap_p50_s * 1e3, side.gap_p90_s * 1e3, side.throughput, ppl)
        for side, ppl in ((row.baseline, row.baseline_ppl), (row.candidate, row.candidate_ppl))
    ]
    return (
        row.label,
        _method(row),
        *((three_digits(full), three_digits(pruned)) for full, pruned in zip(*both, strict=True)),
    )


def control_blocks(found: Sequence[Family], rows: Sequence[Row]) -> Iterator[Block]:
    """Whether each family's controls did what they must: keep 1.0 loses nothing, worse methods are seen to be worse."""
    for family in found:
        findings = [finding for group in family.groups for row in group for finding in _control(row, rows)]
        if findings and family.title:
            yield Heading(f"With {family.title}")
        if findings:
            yield Findings(tuple(findings))
    if not any(is_control(row) for row in rows):
        yield Words(
            "No control was measured beside the method. Measure one at the same keep ratios, for example with: "
            "knormpress sweep --method random --keep-ratios 0.7 --output results-random"
        )


def _control(row: Row, rows: Sequence[Row]) -> Iterator[Finding]:
    method = row.record.policy.method
    if method == NOISE:
        figures = (("TTFT", row.ttft), ("TPOT", row.tpot), ("throughput", row.throughput))
        changes = ", ".join(f"{name} {pretty(str(change))} ({interval(change)})" for name, change in figures)
        yield Finding(
            "plain", "noise", _unbroken(f"The full cache against itself: {changes}. Changes of that size say nothing.")
        )
    elif is_control(row):
        yield _worse(row, rows)
    elif row.keep_ratio == 1.0:
        whole = row.kl < ROUNDING_KL
        text = f"{method} at keep ratio 1.0 may lose nothing: its KL divergence to the full cache is {row.kl:.2g} nats."
        yield Finding("good" if whole else "bad", "as it must be" if whole else "broken", text)
    elif row.kl < ROUNDING_KL:
        text = f"{method} at keep ratio {row.label} predicts exactly what the full cache does: nothing was pruned."
        yield Finding("bad", "not pruned", text)


def _worse(control: Row, rows: Sequence[Row]) -> Finding:
    """The same tokens were scored, so the control's loss and the method's are paired."""
    name = f"{control.record.policy.method} at keep ratio {control.label}"
    partners = [row for row in rows if not is_control(row) and _scored_alike(row, control)]
    if not partners:
        return Finding(
            "unsure", "alone", f"{name}: no method was scored on the same tokens at this ratio to set beside it."
        )
    partner = min(partners, key=lambda row: len(differences([row, control])))
    change = ppl_change(
        [
            DocumentScore(
                document=a.document,
                baseline_nll=a.candidate_nll,
                candidate_nll=b.candidate_nll,
                kl=0.0,
                top1_agreement=1.0,
            )
            for a, b in zip(partner.record.quality.documents, control.record.quality.documents, strict=True)
        ]
    )
    text = _unbroken(
        f"{name}: perplexity {_moves(change)} against {partner.record.policy.method}; against the full cache the two "
        f"changes are {pretty(str(control.ppl))} and {pretty(str(partner.ppl))}."
    )
    if change.low is not None and change.low > 0:
        return Finding("good", "seen to be worse", text)
    return Finding("bad", "not seen to be worse", f"{text} This measurement can't tell the method from a control.")


def _scored_alike(row: Row, control: Row) -> bool:
    def key(row: Row) -> object:
        record = row.record
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

    return key(row) == key(control)

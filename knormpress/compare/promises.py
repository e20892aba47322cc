"""Judge the quick guide's targets and claims by the measurements."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from knormpress.compare.settings import comparable, newest
from knormpress.records.schema import Record, ratio_label
from knormpress.stats.intervals import Change, percent

__all__ = ["UNSURE", "Judgement", "judge_claims", "judge_targets", "losses"]

_CLAIMS = {0.9: (-87, -8), 0.8: (-89, -9), 0.7: (-90, -9)}  # keep ratio: TTFT and throughput in %; PPL is +-0 % at each
_WHY_THROUGHPUT = "throughput: the guide reports a loss of 8 to 9 %; here the measured loss is larger."
_WHY_PPL = "PPL: a change of 0 comes from scoring with a cache that was never pruned; here the pruned cache is scored."


UNSURE = "~ the interval crosses the limit, or there is none: measured again, it may be otherwise."
"""What the sign in ``Judgement.word`` says."""


@dataclass(frozen=True)
class Judgement:
    """A promise of the guide, compared with the measurement.

    ``met`` is about the measured change itself. ``crosses`` says that the interval contains the limit, so that another
    measurement may have the other result (None: there is no interval). ``why`` explains a claim that is not met, and
    ``way`` is that of the record.
    """

    kind: Literal["target", "claim"]
    what: str
    keep_ratio: float
    promised: str
    measured: Change
    met: bool
    crosses: bool | None
    why: str | None = None
    way: str = ""

    @property
    def label(self) -> str:
        """The keep ratio as text, and the way of the prompt if it is not the full cache's."""
        return f"{ratio_label(self.keep_ratio)} {self.way}".rstrip()

    @property
    def word(self) -> str:
        """``met`` or ``not met``, with a ``~`` if the interval crosses the limit, or if there is none."""
        return ("met" if self.met else "not met") + ("" if self.is_sure else " ~")

    @property
    def is_sure(self) -> bool:
        """Whether there is an interval that lies on one side of the limit."""
        return self.crosses is False


def judge_targets(records: Iterable[Record]) -> list[Judgement]:
    """The guide's targets, for each record that drops tokens: TTFT -80 %, throughput within -10 %, PPL within +-5 %."""
    verdicts = []
    for record in records:
        if record.keep_ratio < 1.0:
            verdicts += [
                _judge(record, "target", "TTFT", "<= -80 %", record.latency.ttft, most=-80.0),
                _judge(record, "target", "throughput", ">= -10 %", record.latency.throughput, least=-10.0),
                _judge(record, "target", "PPL", "+-5 %", record.quality.ppl, least=-5.0, most=5.0),
            ]
    return verdicts


def judge_claims(records: Iterable[Record], beside: Iterable[Record] = ()) -> list[Judgement]:
    """The guide's figures for this method at keep ratios 0.9, 0.8 and 0.7, if ``records`` has them.

    They are whole percents, so half a percent of difference is allowed; a better change than claimed meets the claim.
    Only the first call of a process is cold. If its record is not in ``records``, pass the other records as ``beside``.
    """
    records = list(records)
    all_records = [*records, *beside]
    verdicts = []
    for record in records:
        policy = record.policy
        if policy.method != "knorm" or policy.layer_keep_ratios or policy.keep_ratio not in _CLAIMS:
            continue
        ttft, rate = _CLAIMS[policy.keep_ratio]
        why = _why_ttft(record, all_records)
        verdicts += [
            _judge(record, "claim", "TTFT", f"{ttft} %", record.latency.ttft, most=ttft + 0.5, why=why),
            _judge(
                record,
                "claim",
                "throughput",
                f"{rate} %",
                record.latency.throughput,
                least=rate - 0.5,
                why=_WHY_THROUGHPUT,
            ),
            _judge(record, "claim", "PPL", "+-0 %", record.quality.ppl, least=-0.5, most=0.5, why=_WHY_PPL),
        ]
    return verdicts


def losses(records: Iterable[Record]) -> list[str]:
    """What each record that drops tokens loses of what the full cache finds, in sentences."""
    sentences = []
    for record in records:
        if record.keep_ratio < 1.0 and record.retrieval is not None and record.retrieval.items:
            share = record.retrieval.share
            tasks = [(task, record.retrieval.of(task).share) for task in record.retrieval.asked]
            parts = [f"{task} {part.known - part.found} of {part.known}" for task, part in tasks if part.known]
            sentences.append(
                f"{_place(record)}, {share.known - share.found} of the {share.known} items that the full "
                f"cache finds are lost: {', '.join(parts)}."
            )
    return sentences


def _place(record: Record) -> str:
    way = {"": "", "in chunks": ", its prompt in chunks", "reused": ", its context reused"}[record.way]
    return f"{'Under the plan of' if record.policy.layer_keep_ratios else 'At'} keep ratio {record.label}{way}"


def _why_ttft(record: Record, all_records: Sequence[Record]) -> str:
    if record.conditions.prefill_chunk is None:
        why = "TTFT: pruning starts after the prompt is computed, so it can't save most of that time"
    else:
        why = "TTFT: every chunk of the prompt is still computed; pruning only shortens the past that it attends to"
    why += "; even without computing the dropped tokens, at most about 1 - keep ratio of the linear part is saved."
    others = [other for other in newest(all_records) if other.way and comparable(other, record)]
    if others:
        ways = "; ".join(f"{' '.join(other.row.split())}, {other.latency.ttft}" for other in others)
        why += f" What shortens it is the way of the prompt: {ways}."
    for other in all_records:
        cold = other.latency.ttft_cold_s
        if cold is not None:
            warm = other.latency.baseline_speed.ttft_s
            change = Change(percent(warm / cold), None, None)
            return (
                f"{why} Comparing a cold first call with a warm one can give such a change: "
                f"here {cold:.3g} s cold and {warm:.3g} s warm ({change})."
            )
    return why


def _judge(
    record: Record,
    kind: Literal["target", "claim"],
    what: str,
    promised: str,
    measured: Change,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    why: str | None = None,
) -> Judgement:
    met = least <= measured.percent <= most
    crosses = None
    if measured.low is not None and measured.high is not None:
        crosses = any(measured.low < limit < measured.high for limit in (least, most))
    return Judgement(kind, what, record.keep_ratio, promised, measured, met, crosses, None if met else why, record.way)

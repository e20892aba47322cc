"""What records say: each change with its interval, and the verdicts on the guide's targets and claims. Torch-free."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

import numpy as np

from knormpress.changes import LARGEST_NATS, ppl_change
from knormpress.errors import KnormError
from knormpress.intervals import Change, percent, ratio_change
from knormpress.records import Latency, Record, Run

__all__ = [
    "Change",
    "Judgement",
    "Row",
    "Speed",
    "differences",
    "group_rows",
    "judge_claims",
    "judge_targets",
    "latency_changes",
    "setting",
    "summarize",
]

_CLAIMS = {0.9: (-87, -8), 0.8: (-89, -9), 0.7: (-90, -9)}  # keep ratio: TTFT and throughput in %; PPL is +-0 % at each
_WHY_THROUGHPUT = "throughput: the guide reports a loss of 8 to 9 %; measured here, tokens come more slowly than that."
_WHY_PPL = "PPL: a change of 0 comes from scoring with a cache that was never pruned; here the pruned cache is scored."


@dataclass(frozen=True)
class Speed:
    """Medians over the runs of one side.

    ``ttft_s``, ``tpot_s``, ``gap_p50_s`` and ``gap_p90_s`` in seconds, ``throughput`` in new tokens per second; gaps
    are pooled over all runs.
    """

    ttft_s: float
    tpot_s: float
    throughput: float
    gap_p50_s: float
    gap_p90_s: float


@dataclass(frozen=True)
class Row:
    """One record, summarised. A fall is good in TTFT, TPOT, PPL and cache; a rise is good in throughput."""

    record: Record
    ttft: Change
    tpot: Change
    throughput: Change
    ppl: Change
    baseline: Speed
    candidate: Speed
    baseline_ppl: float
    candidate_ppl: float
    kl: float
    top1: float

    @property
    def keep_ratio(self) -> float:
        """The share kept; for a plan of one ratio per layer, the mean of the plan."""
        plan = self.record.policy.layer_keep_ratios
        return self.record.policy.keep_ratio if plan is None else statistics.fmean(plan)

    @property
    def label(self) -> str:
        """The keep ratio as text: 1.0, 0.9, 0.05."""
        return _ratio(self.keep_ratio)

    @property
    def compression(self) -> float:
        """1 - keep_ratio."""
        return 1.0 - self.keep_ratio

    @property
    def cache_bytes(self) -> int:
        """Bytes of storage the candidate's cache holds after the prompt."""
        return self.record.memory.candidate_cache_bytes

    @property
    def baseline_cache_bytes(self) -> int:
        """Bytes of storage the full cache holds after the prompt."""
        return self.record.memory.baseline_cache_bytes

    @property
    def cache(self) -> Change:
        """The change in cache bytes; they are counted, not sampled, so the interval is the figure itself."""
        change = percent(self.cache_bytes / self.baseline_cache_bytes)
        return Change(change, change, change)

    @property
    def pairs(self) -> int:
        """Timed pairs behind the intervals of the timings."""
        return len(self.record.latency.baseline)


@dataclass(frozen=True)
class Judgement:
    """A promise of the guide against what was measured.

    ``met`` speaks of the point estimate; ``crosses`` says that the interval holds the limit, so that another
    measurement may end the other way (None: there is no interval). ``why`` is given where a claim is not met.
    """

    kind: Literal["target", "claim"]
    what: str
    keep_ratio: float
    promised: str
    measured: Change
    met: bool
    crosses: bool | None
    why: str | None = None

    @property
    def label(self) -> str:
        """The keep ratio as text."""
        return _ratio(self.keep_ratio)

    @property
    def word(self) -> str:
        """``met`` or ``not met``, with a ``~`` where the interval crosses the limit."""
        return ("met" if self.met else "not met") + (" ~" if self.crosses else "")


def summarize(record: Record) -> Row:
    """Every figure of one record.

    Raises:
        KnormError: runs that don't pair, times that aren't positive, or a negative log-likelihood that isn't finite.
    """
    latency, memory = record.latency, record.memory
    if len(latency.baseline) != len(latency.candidate) or not latency.baseline:
        raise KnormError(
            f"{_cell(record)} has {len(latency.baseline)} baseline and {len(latency.candidate)} candidate runs; "
            "wanted at least one pair: measure it again"
        )
    if memory.baseline_cache_bytes <= 0:
        raise KnormError(f"{_cell(record)} has a full cache of {memory.baseline_cache_bytes} bytes; measure it again")
    for run in (*latency.baseline, *latency.candidate):
        if not (0 < run.ttft_s < math.inf and 0 < sum(run.gaps_s) < math.inf):
            raise KnormError(
                f"{_cell(record)} has a run with a TTFT of {run.ttft_s} s and {len(run.gaps_s)} gaps of "
                f"{sum(run.gaps_s)} s in all; wanted times above 0 and at least 2 new tokens: measure it again"
            )
    documents = record.quality.documents
    _check_scores(record)
    tokens = [len(document.baseline_nll) for document in documents]
    return Row(
        record=record,
        **latency_changes(latency),
        ppl=ppl_change(documents),
        baseline=_speed(latency.baseline),
        candidate=_speed(latency.candidate),
        baseline_ppl=math.exp(np.concatenate([document.baseline_nll for document in documents]).mean()),
        candidate_ppl=math.exp(np.concatenate([document.candidate_nll for document in documents]).mean()),
        kl=float(np.average([document.kl for document in documents], weights=tokens)),
        top1=float(np.average([document.top1_agreement for document in documents], weights=tokens)),
    )


def latency_changes(latency: Latency) -> dict[str, Change]:
    """The changes of ``ttft``, ``tpot`` and ``throughput``, pair by pair."""
    figures: dict[str, Callable[[Run], float]] = {
        "ttft": attrgetter("ttft_s"),
        "tpot": attrgetter("tpot_s"),
        "throughput": attrgetter("tokens_per_s"),
    }
    return {
        name: ratio_change(list(map(figure, latency.baseline)), list(map(figure, latency.candidate)))
        for name, figure in figures.items()
    }


def group_rows(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows that differ in nothing but the keep ratio, together: each group falls in keep ratio.

    Of two rows of one cell the later one stands, as a record is only ever added to the end of a file.
    """
    groups: dict[tuple[object, ...], dict[object, Row]] = {}
    for row in rows:
        policy = row.record.policy
        cells = groups.setdefault(tuple(setting(row).values()), {})
        cells[policy.layer_keep_ratios or policy.keep_ratio] = row
    return [sorted(cells.values(), key=lambda row: -row.keep_ratio) for cells in groups.values()]


def differences(rows: Sequence[Row]) -> dict[str, list[object]]:
    """The settings in which rows differ, beside the keep ratio, each with the values found in order."""
    settings = [setting(row) for row in rows]
    names = settings[0] if settings else {}
    found = {name: list(dict.fromkeys(one[name] for one in settings)) for name in names}
    return {name: values for name, values in found.items() if len(values) > 1}


def setting(row: Row) -> dict[str, object]:
    """What a row was measured with, name by name, beside the keep ratio: rows that agree in it can be compared."""
    record = row.record
    policy, conditions, environment = record.policy, record.conditions, record.environment
    return {
        "model": f"{record.model.name} ({record.model.fingerprint[:12]})",
        "dtype": record.model.dtype,
        "text": f"{record.text.name} ({record.text.sha256[:12]})",
        "device": f"{environment.device} ({environment.device_name})",
        "threads": environment.threads,
        "commit": (environment.git_commit or "none")[:12],
        "versions": f"torch {environment.torch}, transformers {environment.transformers}",
        "method": policy.method,
        "kind of ratio": "one per layer" if policy.layer_keep_ratios else "one for all layers",
        "prune_after": policy.prune_after,
        "skip_layers": policy.skip_layers,
        "keep_recent": policy.keep_recent,
        "prune_interval": policy.prune_interval,
        "schedule": policy.schedule,
        "prompt tokens": conditions.prompt_tokens,
        "new tokens": conditions.new_tokens,
        "prefill chunk": conditions.prefill_chunk,
        "samples": conditions.samples,
        "context tokens": conditions.context_tokens,
        "scored tokens": conditions.scored_tokens,
    }


def judge_targets(rows: Iterable[Row]) -> list[Judgement]:
    """The guide's targets, for every row that drops tokens: TTFT -80 %, throughput within -10 %, PPL within +-5 %."""
    verdicts = []
    for row in rows:
        if row.keep_ratio < 1.0:
            verdicts += [
                _judge(row, "target", "TTFT", "<= -80 %", row.ttft, most=-80.0),
                _judge(row, "target", "throughput", ">= -10 %", row.throughput, least=-10.0),
                _judge(row, "target", "PPL", "+-5 %", row.ppl, least=-5.0, most=5.0),
            ]
    return verdicts


def judge_claims(rows: Iterable[Row], beside: Iterable[Row] = ()) -> list[Judgement]:
    """The figures the guide reports for this method at keep ratios 0.9, 0.8 and 0.7, where they were measured.

    They are whole percents, so half a percent is allowed for; a change that is better than claimed meets the claim.
    Only the first call of a process is cold; where its record is not among ``rows``, give the others as ``beside``.
    """
    rows = list(rows)
    told = [*rows, *beside]
    verdicts = []
    for row in rows:
        policy = row.record.policy
        if policy.method != "knorm" or policy.layer_keep_ratios or policy.keep_ratio not in _CLAIMS:
            continue
        ttft, rate = _CLAIMS[policy.keep_ratio]
        why = _why_ttft(row, told)
        verdicts += [
            _judge(row, "claim", "TTFT", f"{ttft} %", row.ttft, most=ttft + 0.5, why=why),
            _judge(row, "claim", "throughput", f"{rate} %", row.throughput, least=rate - 0.5, why=_WHY_THROUGHPUT),
            _judge(row, "claim", "PPL", "+-0 %", row.ppl, least=-0.5, most=0.5, why=_WHY_PPL),
        ]
    return verdicts


def _why_ttft(row: Row, told: Sequence[Row]) -> str:
    if row.record.conditions.prefill_chunk is None:
        why = "TTFT: pruning begins once the prompt has been computed, so it can't take most of that time away"
    else:
        why = "TTFT: every chunk of the prompt is still computed; pruning only shortens the past that it attends to"
    why += "; even never computing the dropped tokens would save no more than about 1 - keep ratio of the linear part."
    for other in told:
        cold = other.record.latency.ttft_cold_s
        if cold is not None:
            warm = other.baseline.ttft_s
            change = Change(percent(warm / cold), None, None)
            return (
                f"{why} A cold first call set against a warm one can look like it: "
                f"here {cold:.3g} s cold and {warm:.3g} s warm ({change})."
            )
    return why


def _judge(
    row: Row,
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
    return Judgement(kind, what, row.keep_ratio, promised, measured, met, crosses, None if met else why)


def _check_scores(record: Record) -> None:
    if not record.quality.documents:
        raise KnormError(f"{_cell(record)} has no scored document; measure it again")
    for document in record.quality.documents:
        where = f"{_cell(record)}, document {document.document},"
        before, after = document.baseline_nll, document.candidate_nll
        if len(before) != len(after) or not before:
            raise KnormError(
                f"{where} has {len(before)} baseline and {len(after)} candidate tokens; "
                "wanted the same tokens scored through both caches: measure it again"
            )
        unusable = [nll for nll in (*before, *after) if not abs(nll) <= LARGEST_NATS]
        unusable += [figure for figure in (document.kl, document.top1_agreement) if not math.isfinite(figure)]
        if unusable:
            raise KnormError(
                f"{where} has a score of {unusable[0]}; wanted finite values, and negative log-likelihoods of at most "
                f"{LARGEST_NATS:g} nats: try a wider dtype such as float32"
            )


def _cell(record: Record) -> str:
    return f"the record of {record.policy.method} at keep ratio {record.policy.keep_ratio:g}"


def _speed(runs: Sequence[Run]) -> Speed:
    p50, p90 = np.percentile([gap for run in runs for gap in run.gaps_s], (50, 90))
    return Speed(
        ttft_s=statistics.median(map(attrgetter("ttft_s"), runs)),
        tpot_s=statistics.median(map(attrgetter("tpot_s"), runs)),
        throughput=statistics.median(map(attrgetter("tokens_per_s"), runs)),
        gap_p50_s=float(p50),
        gap_p90_s=float(p90),
    )


def _ratio(keep_ratio: float) -> str:
    text = f"{keep_ratio:.3g}"
    return text if "." in text else f"{text}.0"

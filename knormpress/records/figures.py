"""What is measured, and every figure derived from it: time, memory and quality, of the full cache and of a candidate.

Derived figures are properties here, and are computed nowhere else. A change is always from the full cache to the
candidate, in %. ``baseline`` in field names is the full cache, measured in turn with the candidate in the same run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from operator import attrgetter
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import Self

from knormpress.stats.intervals import Change, Floats, percent, ratio_change
from knormpress.stats.perplexity import ppl_change, ppl_percent

__all__ = [
    "LONG_RANGE_NATS",
    "ROUNDING_KL",
    "SPEED_MOVED",
    "Cost",
    "Counted",
    "Counts",
    "Divergence",
    "DocumentScore",
    "Latency",
    "Memory",
    "Phase",
    "Quality",
    "Reading",
    "Run",
    "Speed",
    "Strict",
    "Timed",
    "ppl_change_between",
]

ROUNDING_KL: Final = 1e-8
"""Nats: a smaller divergence is due to rounding, as when attention is computed in parts."""

LONG_RANGE_NATS: Final = 2.0
"""Nats: a token whose loss falls by more when the model sees the whole context needs what is far away."""

SPEED_MOVED: Final = 10.0
"""Percent: if a machine's speed changes by more, absolute times before and after can't be compared."""

Timed: TypeAlias = Literal["ttft", "tpot", "throughput"]
"""The figures of a timed generation that are compared in pairs."""

Counted: TypeAlias = Literal["ops", "moved", "flops", "allocated", "host_reads"]
"""The figures of a counted cost that are compared."""

Phase: TypeAlias = Literal["prefill", "decode"]
"""The parts of a generation that are counted apart."""


class Strict(BaseModel):
    """A frozen model that allows no other fields than its own."""

    # JSON has no NaN or infinity. As strings they can be read back, and the file is valid JSON for every reader.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), ser_json_inf_nan="strings")

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields changed; figures derived from the old ones are not kept."""
        copied = super().model_copy(update=update, deep=deep)
        for name in vars(copied).keys() - type(self).model_fields.keys():
            del vars(copied)[name]
        return copied


class Run(Strict):
    """One timed generation, in seconds: time to first token, then the gap before each further token."""

    ttft_s: float
    gaps_s: tuple[float, ...]

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first: the mean gap, in seconds. Needs at least one gap."""
        return sum(self.gaps_s) / len(self.gaps_s)

    @property
    def tokens_per_s(self) -> float:
        """New tokens / whole time, which includes the prompt's time."""
        return (len(self.gaps_s) + 1) / (self.ttft_s + sum(self.gaps_s))


class Speed(NamedTuple):
    """Medians over the runs with one cache.

    ``ttft_s``, ``tpot_s``, ``gap_p50_s`` and ``gap_p90_s`` in seconds, ``throughput`` in new tokens per second; gaps
    are pooled over all runs.
    """

    ttft_s: float
    tpot_s: float
    throughput: float
    gap_p50_s: float
    gap_p90_s: float

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Speed:
        """The medians over ``runs``, which must have a run with at least two new tokens."""
        p50, p90 = np.percentile([gap for run in runs for gap in run.gaps_s], (50, 90))
        middle = {name: statistics.median(map(figure, runs)) for name, figure in _FIGURES.items()}
        return cls(middle["ttft"], middle["tpot"], middle["throughput"], float(p50), float(p90))


_FIGURES: dict[Timed, Callable[[Run], float]] = {
    "ttft": attrgetter("ttft_s"),
    "tpot": attrgetter("tpot_s"),
    "throughput": attrgetter("tokens_per_s"),
}


class Latency(Strict):
    """Generations with the full cache and with the candidate, in turn: ``baseline[i]`` and ``candidate[i]`` are a pair.

    Args:
        baseline, candidate: the runs.
        stopped: why there are no more pairs: ``"precise"`` if the intervals were narrow enough, ``"time"`` if the time
            ended first, ``"rounds"`` if no precision was wanted.
        calibration_s: seconds of a fixed workload before and after, see ``measure.calibration``.
        ttft_cold_s: time to first token in the first call of the process; None in later measurements.
        weights_tpot_s: seconds per token with an almost empty cache, see ``measure.latency.weights_tpot``; None if it
            was not measured.
    """

    baseline: tuple[Run, ...]
    candidate: tuple[Run, ...]
    stopped: Literal["precise", "time", "rounds"]
    calibration_s: tuple[float, float]
    ttft_cold_s: float | None = Field(description="the first call of the process; None in every later cell")
    weights_tpot_s: float | None = None

    @property
    def pairs(self) -> int:
        """The number of timed pairs."""
        return len(self.baseline)

    @property
    def decodes(self) -> bool:
        """Whether the runs have gaps, and so a TPOT."""
        return bool(self.baseline and self.baseline[0].gaps_s)

    def ratios(self, name: Timed) -> list[float]:
        """The candidate's figure divided by the full cache's, for each pair."""
        figure = _FIGURES[name]
        return [figure(after) / figure(before) for before, after in zip(self.baseline, self.candidate, strict=True)]

    def change(self, name: Timed) -> Change:
        """The change of a figure: the median over pairs, with its interval."""
        figure = _FIGURES[name]
        return ratio_change(list(map(figure, self.baseline)), list(map(figure, self.candidate)))

    @cached_property
    def ttft(self) -> Change:
        """The change of the time to the first token; lower is better."""
        return self.change("ttft")

    @cached_property
    def tpot(self) -> Change:
        """The change of the time per output token; lower is better."""
        return self.change("tpot")

    @cached_property
    def throughput(self) -> Change:
        """The change of new tokens per second; higher is better."""
        return self.change("throughput")

    @cached_property
    def baseline_speed(self) -> Speed:
        """Medians of the full cache's runs."""
        return Speed.of(self.baseline)

    @cached_property
    def candidate_speed(self) -> Speed:
        """Medians of the candidate's runs."""
        return Speed.of(self.candidate)

    @property
    def speed_moved(self) -> float | None:
        """How much the machine's time for a fixed workload changed, in %; None if within ``SPEED_MOVED``."""
        before, after = self.calibration_s
        moved = percent(after / before)
        return moved if abs(moved) > SPEED_MOVED else None


class Reading(Strict):
    """A memory figure in bytes with its name; or None, and the reason why this device can't report it."""

    name: str
    bytes: int | None
    reason: str | None = None


class Memory(Strict):
    """Bytes of storage that the caches hold after the prompt, and the memory that the device reports.

    Where ``decoded_tokens`` were decoded after the prompt, also the bytes after them; records of earlier versions have
    none.
    """

    baseline_cache_bytes: int
    candidate_cache_bytes: int
    baseline_device: tuple[Reading, ...]
    candidate_device: tuple[Reading, ...]
    decoded_tokens: int = 0
    baseline_decoded_bytes: int | None = None
    candidate_decoded_bytes: int | None = None

    @property
    def ratio(self) -> float:
        """The candidate's bytes divided by the full cache's; NaN if the full cache holds none."""
        return self.candidate_cache_bytes / self.baseline_cache_bytes if self.baseline_cache_bytes else math.nan

    @property
    def decoded_ratio(self) -> float | None:
        """``ratio`` after decoding; None where nothing was decoded, or a cache holds no bytes."""
        full, own = self.baseline_decoded_bytes, self.candidate_decoded_bytes
        return own / full if full and own else None

    @property
    def change(self) -> Change:
        """The change of the bytes. They are counted exactly, so the interval is the figure itself."""
        change = percent(self.ratio)
        return Change(change, change, change)


class Counts(Strict):
    """What a piece of work took, as exact sums.

    Args:
        ops: operators dispatched.
        moved: bytes that they read and wrote; views are free.
        flops: floating-point operations of their matrix products.
        allocated: bytes of the storages that they made.
        host_reads: how often the host waited for a figure of the device.
        attention: how often an attention module was called.
    """

    ops: int
    moved: int
    flops: int
    allocated: int
    host_reads: int
    attention: int


class Cost(Strict):
    """The counted cost of the full cache and of the candidate, see ``measure.cost``.

    The decoded tokens are ``tokens`` ones that come after the prompt and ``tokens_before`` more.
    """

    baseline_prefill: Counts
    candidate_prefill: Counts
    baseline_decode: Counts
    candidate_decode: Counts
    tokens_before: int
    tokens: int

    def full(self, phase: Phase, name: Counted) -> float:
        """The full cache's figure, for the prefill or for one decoded token."""
        return self._figure(self.baseline_prefill, self.baseline_decode, phase, name)

    def candidate(self, phase: Phase, name: Counted) -> float:
        """The candidate's figure, for the prefill or for one decoded token."""
        return self._figure(self.candidate_prefill, self.candidate_decode, phase, name)

    def ratio(self, phase: Phase, name: Counted) -> float:
        """The candidate's figure divided by the full cache's; NaN if that is 0."""
        full = self.full(phase, name)
        return self.candidate(phase, name) / full if full else math.nan

    def change(self, phase: Phase, name: Counted) -> Change:
        """The change of a figure. It is counted exactly, so the interval is the figure itself. NaN if it was 0."""
        change = percent(self.ratio(phase, name))
        return Change(change, change, change)

    def _figure(self, prefill: Counts, decode: Counts, phase: Phase, name: Counted) -> float:
        counts, units = (prefill, 1) if phase == "prefill" else (decode, self.tokens)
        return float(getattr(counts, name)) / units


class DocumentScore(Strict):
    """One document scored through both caches.

    ``baseline_nll`` and ``candidate_nll`` hold the negative log-likelihood in nats of each scored token, in text order.
    ``kl`` is the mean of KL(full || candidate) over these tokens, in nats; ``top1_agreement`` is the share of tokens
    for which both caches have the same first choice.

    The rest, too, has one value in nats for each scored token, or is empty: records of earlier versions have none.
    ``token_kl`` is KL(full || candidate); ``local_nll`` the negative log-likelihood behind a short context, without
    a cache; ``decoded_nll`` that through the candidate's cache when the tokens are decoded one by one, where that was
    asked for.
    """

    document: int
    baseline_nll: tuple[float, ...]
    candidate_nll: tuple[float, ...]
    kl: float
    top1_agreement: float
    token_kl: tuple[float, ...] = ()
    local_nll: tuple[float, ...] = ()
    decoded_nll: tuple[float, ...] = ()


class Divergence(NamedTuple):
    """Percentiles over the scored tokens of KL(full || candidate), in nats; ``p50`` is the median."""

    p50: float
    p90: float
    p99: float
    largest: float


class Quality(Strict):
    """The scored documents. Means are over tokens: a longer document weighs more.

    A figure is None where a document lacks what it is made of.
    """

    documents: tuple[DocumentScore, ...]

    @property
    def tokens(self) -> list[int]:
        """Scored tokens of each document."""
        return [len(document.baseline_nll) for document in self.documents]

    @property
    def gaps(self) -> list[Floats]:
        """For each document (tokens,): how much the negative log-likelihood of each token rose, in nats."""
        return [np.subtract(document.candidate_nll, document.baseline_nll) for document in self.documents]

    @cached_property
    def ppl(self) -> Change:
        """The change of perplexity; lower is better."""
        return ppl_change(self.gaps)

    @property
    def ppl_percent(self) -> float:
        """The change of perplexity in %, without the interval, which takes longer to compute."""
        return ppl_percent(self.gaps)

    @property
    def baseline_ppl(self) -> float:
        """Perplexity through the full cache."""
        return math.exp(np.concatenate([document.baseline_nll for document in self.documents]).mean())

    @property
    def candidate_ppl(self) -> float:
        """Perplexity through the candidate's cache."""
        return math.exp(np.concatenate([document.candidate_nll for document in self.documents]).mean())

    @property
    def kl(self) -> float:
        """Mean KL divergence from the full cache's predictions, in nats per token."""
        return float(np.average([document.kl for document in self.documents], weights=self.tokens))

    @cached_property
    def divergence(self) -> Divergence | None:
        """Percentiles of the KL divergence from the full cache's predictions, which its mean hides.

        llama.cpp's perplexity tool shows it in this way too.
        """
        if not all(document.token_kl for document in self.documents):
            return None
        values = np.percentile(np.concatenate([document.token_kl for document in self.documents]), (50, 90, 99, 100))
        return Divergence(*values.tolist())

    @property
    def long_range_tokens(self) -> int:
        """How many scored tokens ``long_range`` is over; 0 where it can't be told."""
        return sum(map(len, self._long_range_gaps))

    @cached_property
    def long_range(self) -> Change | None:
        """The change of perplexity over the tokens that need what is far away; lower is better.

        These are the tokens whose loss through the full cache is lower by more than ``LONG_RANGE_NATS`` than behind a
        short context. The idea and the limit are LongPPL's (arXiv 2410.23771), scaled down: its short context has 4,096
        tokens, and it asks also that the loss behind the long one is below 2 nats. None if there is no such token.
        """
        gaps = [gap for gap in self._long_range_gaps if len(gap)]
        return ppl_change(gaps) if gaps else None

    @property
    def _long_range_gaps(self) -> list[Floats]:
        """For each document (its long-range tokens,): the rises in nats; no document if one lacks ``local_nll``."""
        if not all(document.local_nll for document in self.documents):
            return []
        pairs = zip(self.documents, self.gaps, strict=True)
        return [gap[np.subtract(one.local_nll, one.baseline_nll) > LONG_RANGE_NATS] for one, gap in pairs]

    @cached_property
    def decoded(self) -> Change | None:
        """The change of perplexity with what pruning while decoding loses too; lower is better."""
        if not all(document.decoded_nll for document in self.documents):
            return None
        return ppl_change([np.subtract(one.decoded_nll, one.baseline_nll) for one in self.documents])

    @property
    def top1(self) -> float:
        """Share of the tokens for which both caches have the same first choice."""
        return float(np.average([document.top1_agreement for document in self.documents], weights=self.tokens))


def ppl_change_between(before: Quality, after: Quality) -> Change:
    """The change of perplexity between two candidates that scored the same tokens."""
    pairs = zip(before.documents, after.documents, strict=True)
    return ppl_change([np.subtract(new.candidate_nll, old.candidate_nll) for old, new in pairs])

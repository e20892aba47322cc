"""The schema of a result: measurements return it, files hold it, verdicts compare it and pictures show it.

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

from knormpress.policy.policy import Policy
from knormpress.stats.intervals import Change, Floats, percent, ratio_change
from knormpress.stats.perplexity import ppl_change, ppl_percent

__all__ = [
    "ROUNDING_KL",
    "SCHEMA_VERSION",
    "SPEED_MOVED",
    "Conditions",
    "DocumentScore",
    "Entry",
    "Environment",
    "Latency",
    "Memory",
    "MethodInfo",
    "ModelInfo",
    "Quality",
    "Reading",
    "Record",
    "Result",
    "Run",
    "Speed",
    "Strict",
    "TextInfo",
    "Timed",
    "ppl_change_between",
    "ratio_label",
]

SCHEMA_VERSION: Final = 2

ROUNDING_KL: Final = 1e-8
"""Nats: a smaller divergence is due to rounding, as when attention is computed in parts."""

SPEED_MOVED: Final = 10.0
"""Percent: if a machine's speed changes by more, absolute times before and after can't be compared."""

Timed: TypeAlias = Literal["ttft", "tpot", "throughput"]
"""The figures of a timed generation that are compared in pairs."""


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


class Environment(Strict):
    """The machine and the software of a measurement."""

    knormpress: str
    python: str
    torch: str
    transformers: str
    platform: str
    processor: str
    device: str
    device_name: str
    threads: int
    git_commit: str | None
    git_dirty: bool | None


class ModelInfo(Strict):
    """A model; ``fingerprint`` is a hash of its configuration and weights."""

    name: str
    source: str
    fingerprint: str
    dtype: str
    parameters: int


class TextInfo(Strict):
    """A text; ``sha256`` is the hash of the whole text, before it is cut into documents."""

    name: str
    source: str
    sha256: str


class MethodInfo(Strict):
    """The method's name, and the fields of its policy (see ``policy.policy.Policy``)."""

    method: str
    keep_ratio: float
    prune_after: int
    skip_layers: tuple[int, ...]
    layer_keep_ratios: tuple[float, ...] | None
    keep_recent: int
    prune_interval: int
    schedule: Literal["proportional", "iterative"]

    @property
    def policy(self) -> Policy:
        """The policy without the method's name."""
        return Policy(**self.model_dump(exclude={"method"}))


class Conditions(Strict):
    """The conditions under which a cell of a sweep was measured."""

    prompt_tokens: int
    new_tokens: int
    prefill_chunk: int | None
    rounds: int
    samples: int
    context_tokens: int
    scored_tokens: int


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
    def change(self) -> Change:
        """The change of the bytes. They are counted exactly, so the interval is the figure itself."""
        change = percent(self.ratio)
        return Change(change, change, change)


class DocumentScore(Strict):
    """One document scored through both caches.

    ``baseline_nll`` and ``candidate_nll`` hold the negative log-likelihood in nats of each scored token, in text order.
    ``kl`` is the mean of KL(full || candidate) over these tokens, in nats; ``top1_agreement`` is the share of tokens
    for which both caches have the same first choice.
    """

    document: int
    baseline_nll: tuple[float, ...]
    candidate_nll: tuple[float, ...]
    kl: float
    top1_agreement: float


class Quality(Strict):
    """The scored documents. Means are over tokens: a longer document weighs more."""

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

    @property
    def top1(self) -> float:
        """Share of the tokens for which both caches have the same first choice."""
        return float(np.average([document.top1_agreement for document in self.documents], weights=self.tokens))


def ppl_change_between(before: Quality, after: Quality) -> Change:
    """The change of perplexity between two candidates that scored the same tokens."""
    pairs = zip(before.documents, after.documents, strict=True)
    return ppl_change([np.subtract(new.candidate_nll, old.candidate_nll) for old, new in pairs])


class Record(Strict):
    """One finished cell of a sweep: a method under one policy, compared with the full cache in one process."""

    schema_version: Literal[2] = SCHEMA_VERSION
    created: str
    environment: Environment
    model: ModelInfo
    text: TextInfo
    policy: MethodInfo
    conditions: Conditions
    latency: Latency
    memory: Memory
    quality: Quality

    @property
    def keep_ratio(self) -> float:
        """The keep ratio, or the mean of ``layer_keep_ratios`` if there are any."""
        ratios = self.policy.layer_keep_ratios
        return self.policy.keep_ratio if ratios is None else statistics.fmean(ratios)

    @property
    def label(self) -> str:
        """The keep ratio as text: 1.0, 0.9, 0.05."""
        return ratio_label(self.keep_ratio)


class Result(Strict):
    """The measurements of one method in one test.

    Args:
        method: a text for the method that is the same for equal methods.
        conditions: such as numbers of prompt and scored tokens, by name; only results with equal ones are compared.
        latency, memory, quality: the measurements that were made.
    """

    method: str
    conditions: dict[str, int | None]
    latency: Latency | None = None
    memory: Memory | None = None
    quality: Quality | None = None


class Entry(Result):
    """The result of one test in one run of pytest, stored for comparison with later runs.

    Args:
        run: the name of the session, the same for all its tests.
        test: the test's node id.
        verdicts: the verdict of each metric in that run; empty if nothing was compared.
        passed: whether the test passed.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    run: str
    test: str
    created: str
    environment: Environment
    model: ModelInfo
    text: TextInfo
    verdicts: dict[str, str] = {}
    passed: bool


def ratio_label(keep_ratio: float) -> str:
    """A keep ratio as text: 1.0, 0.9, 0.05."""
    text = f"{keep_ratio:.3g}"
    return text if "." in text else f"{text}.0"

"""The schema of a result: what was measured, of which method and model, on which text and machine, and how.

Measurements fill it, files hold it, verdicts compare it and pictures show it. The figures are in ``records.figures``.
"""

from __future__ import annotations

import statistics
from typing import Final, Literal

from pydantic import Field

from knormpress.records.figures import Cost, Latency, Memory, Quality, Strict
from knormpress.records.lm_eval import HarnessTasks
from knormpress.records.retrieval import Retrieval

__all__ = [
    "SCHEMA_VERSION",
    "Conditions",
    "Entry",
    "Environment",
    "MethodInfo",
    "ModelInfo",
    "Record",
    "Result",
    "TextInfo",
    "ratio_label",
]

SCHEMA_VERSION: Final = 2


class Environment(Strict):
    """The machine and the software of a measurement; ``node`` is the machine's name in a cluster, and None outside.

    A model that is spread over several devices has a ``device_map``, see ``workload.devices.describe_map``; ``device``
    and ``device_name`` then name all of them.
    """

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
    node: str | None = None
    device_map: str | None = None

    @property
    def place(self) -> str:
        """The device with its name; for a model that is spread, its parts too."""
        spread = "" if self.device_map is None else f"; {self.device_map}"
        return f"{self.device} ({self.device_name}){spread}"


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
    layer_scores: tuple[str, ...] | None = None


class Conditions(Strict):
    """The conditions under which a cell of a sweep was measured; ``texts`` of each retrieval task in ``tasks``.

    The full cache computes the whole prompt, in chunks of ``prefill_chunk`` if there is one. So does the candidate,
    unless it took the prompt in chunks of ``candidate_chunk`` tokens, or loaded its first ``reused_tokens`` tokens.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_chunk: int | None
    rounds: int
    samples: int
    context_tokens: int
    scored_tokens: int
    tasks: tuple[str, ...] = ()
    texts: int = 0
    candidate_chunk: int | None = None
    reused_tokens: int | None = None


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
    retrieval: Retrieval | None = None
    cost: Cost | None = None

    @property
    def keep_ratio(self) -> float:
        """The keep ratio, or the mean of ``layer_keep_ratios`` if there are any."""
        ratios = self.policy.layer_keep_ratios
        return self.policy.keep_ratio if ratios is None else statistics.fmean(ratios)

    @property
    def label(self) -> str:
        """The keep ratio as text: 1.0, 0.9, 0.05."""
        return ratio_label(self.keep_ratio)

    @property
    def way(self) -> str:
        """How the candidate took the prompt, where the full cache did not: ``in chunks`` or ``reused``; else empty."""
        if self.conditions.reused_tokens is not None:
            return "reused"
        return "" if self.conditions.candidate_chunk is None else "in chunks"

    @property
    def row(self) -> str:
        """The head of a table's row: the keep ratio, or ``plan`` and the mean of its ratios; below it the ``way``."""
        name = f"plan {self.keep_ratio:.2f}" if self.policy.layer_keep_ratios else self.label
        return f"{name}\n{self.way}" if self.way else name


class Result(Strict):
    """The measurements of one method in one test.

    Args:
        method: a text for the method that is the same for equal methods.
        conditions: such as numbers of prompt and scored tokens, by name; only results with equal ones are compared.
        latency, memory, quality, retrieval, cost, lm_eval: the measurements that were made.
    """

    method: str
    conditions: dict[str, int | None]
    latency: Latency | None = None
    memory: Memory | None = None
    quality: Quality | None = None
    retrieval: Retrieval | None = None
    cost: Cost | None = None
    lm_eval: HarnessTasks | None = None


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
    verdicts: dict[str, str] = Field(default_factory=dict)
    passed: bool


def ratio_label(keep_ratio: float) -> str:
    """A keep ratio as text: 1.0, 0.9, 0.05."""
    text = f"{keep_ratio:.3g}"
    return text if "." in text else f"{text}.0"

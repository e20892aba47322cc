"""What a measurement leaves behind: the schema of a record, and the JSON Lines file that holds records."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from knormpress.errors import KnormError
from knormpress.files import replacing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "ROUNDING_KL",
    "SCHEMA_VERSION",
    "Conditions",
    "DocumentScore",
    "Entry",
    "Environment",
    "Latency",
    "Memory",
    "MemoryReading",
    "ModelInfo",
    "Policy",
    "Quality",
    "Record",
    "Run",
    "TextInfo",
    "append_record",
    "parse_entry",
    "read_records",
]

SCHEMA_VERSION: Final = 2

ROUNDING_KL: Final = 1e-8
"""Nats: a smaller divergence is rounding, by which attention computed in parts differs from attention in one."""


class _Strict(BaseModel):
    # JSON has no NaN or infinity: as strings they survive the round trip, and the file stays JSON for every reader.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), ser_json_inf_nan="strings")


class Environment(_Strict):
    """The machine and the software a cell was measured with."""

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


class ModelInfo(_Strict):
    """Which model: ``fingerprint`` is a hash over its configuration and weights."""

    name: str
    source: str
    fingerprint: str
    dtype: str
    parameters: int


class TextInfo(_Strict):
    """Which text: ``sha256`` is over the whole text, before it was cut into documents."""

    name: str
    source: str
    sha256: str


class Policy(_Strict):
    """The method and, for the methods that prune by a press, its fields (see ``KnormPress``)."""

    method: str
    keep_ratio: float
    prune_after: int
    skip_layers: tuple[int, ...]
    layer_keep_ratios: tuple[float, ...] | None
    keep_recent: int
    prune_interval: int
    schedule: Literal["proportional", "iterative"]


class Conditions(_Strict):
    """How a cell was measured."""

    prompt_tokens: int
    new_tokens: int
    prefill_chunk: int | None
    rounds: int
    samples: int
    context_tokens: int
    scored_tokens: int


class Run(_Strict):
    """One timed generation, in seconds: time to first token, then the gap before each further token."""

    ttft_s: float
    gaps_s: tuple[float, ...]

    @property
    def tpot_s(self) -> float:
        """Mean gap, in seconds; of a run with at least one."""
        return sum(self.gaps_s) / len(self.gaps_s)

    @property
    def tokens_per_s(self) -> float:
        """New tokens / whole time, the prompt's time included."""
        return (len(self.gaps_s) + 1) / (self.ttft_s + sum(self.gaps_s))


class Latency(_Strict):
    """Generations of baseline and candidate, measured in turn: ``baseline[i]`` and ``candidate[i]`` are a pair.

    ``stopped`` says why there are no more pairs, and ``calibration_s`` how long a fixed work took before and after, see
    ``metrics.latency.TimedPairs``. ``weights_tpot_s`` is what a token takes behind an almost empty cache, see
    ``bench.weights_tpot``; None where that was not measured.
    """

    baseline: tuple[Run, ...]
    candidate: tuple[Run, ...]
    stopped: Literal["precise", "time", "rounds"]
    calibration_s: tuple[float, float]
    ttft_cold_s: float | None = Field(description="the first call of the process; None in every later cell")
    weights_tpot_s: float | None = None


class MemoryReading(_Strict):
    """A figure in bytes named for what it is, or None and the reason why this device can't give it."""

    name: str
    bytes: int | None
    reason: str | None = None


class Memory(_Strict):
    """Bytes of storage the caches hold after the prompt, and what the device reports beside them."""

    baseline_cache_bytes: int
    candidate_cache_bytes: int
    baseline_device: tuple[MemoryReading, ...]
    candidate_device: tuple[MemoryReading, ...]


class DocumentScore(_Strict):
    """One document scored through both caches: the negative log-likelihood (nats) of each scored token, in order."""

    document: int
    baseline_nll: tuple[float, ...]
    candidate_nll: tuple[float, ...]
    kl: float
    top1_agreement: float


class Quality(_Strict):
    """The scored documents. KL is the mean of KL(full || candidate) in nats over a document's scored tokens."""

    documents: tuple[DocumentScore, ...]


class Record(_Strict):
    """One finished cell of a sweep: a method under one policy against the full cache, in one process."""

    schema_version: Literal[2] = SCHEMA_VERSION
    created: str
    environment: Environment
    model: ModelInfo
    text: TextInfo
    policy: Policy
    conditions: Conditions
    latency: Latency
    memory: Memory
    quality: Quality


class Entry(_Strict):
    """What one test measured in one run of pytest, for the comparison with later runs.

    Args:
        run: names the session, the same for all its tests.
        test: the test's node id.
        method: what the method is, as text that is equal for equal methods.
        conditions: prompt and scored tokens and the like, by name; those of an earlier entry must be equal.
        verdicts: metric to verdict, as it was found in that run; empty where nothing was compared.
        passed: whether the test passed.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    run: str
    test: str
    created: str
    environment: Environment
    model: ModelInfo
    text: TextInfo
    method: str
    conditions: dict[str, int | None]
    latency: Latency | None = None
    memory: Memory | None = None
    quality: Quality | None = None
    verdicts: dict[str, str] = {}
    passed: bool


def append_record(path: Path, record: Record | Entry) -> None:
    """Add ``record`` as one line to the JSON Lines file ``path``.

    A kill at any moment leaves the file as it was or as it is to be. Processes that append at once take turns, but on
    Windows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(path.parent):
        before = path.read_bytes() if path.exists() else b""
        if before and not before.endswith(b"\n"):
            before += b"\n"  # a last line that was cut short must not swallow the new one
        with replacing(path) as beside, beside.open("wb") as file:
            file.write(before + record.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``: the folder itself, so that no lock file is left lying about."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def read_records(path: Path) -> Iterator[Record]:
    """The records of a JSON Lines file, in order; empty lines are passed over.

    Raises:
        KnormError: the file can't be read, or a line is not a whole record of this schema version; the file is left as
            it is.
    """
    try:
        # Not splitlines(): a name may hold U+2028 or another of the line ends that JSON leaves unescaped.
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise KnormError(
            f"no records can be read from {path} ({error.strerror}); measure first: knormpress sweep"
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield Record.model_validate_json(line)
        except ValidationError as error:
            raise KnormError(
                f"{path} line {number} is not a whole record of schema version {SCHEMA_VERSION} ({_fault(error)}); "
                "mend or remove that line, or start over with --fresh"
            ) from error


def parse_entry(text: str, where: str) -> Entry:
    """The entry that the JSON ``text`` holds.

    Raises:
        KnormError: it is not a whole entry of this schema version; ``where`` it stands is told.
    """
    try:
        return Entry.model_validate_json(text)
    except ValidationError as error:
        raise KnormError(
            f"{where} is not a whole entry of schema version {SCHEMA_VERSION} ({_fault(error)}); "
            "mend it, or move that file away"
        ) from error


def _fault(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["loc"] == ("schema_version",):
        return f"its schema_version is {first['input']!r}"
    return f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}"

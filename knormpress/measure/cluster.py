"""A sweep on the nodes of a Ray cluster: each device and prompt length is measured by one worker, all at the same time.

A worker owns its device for as long as there is something to measure on it: a GPU, or a node with all its CPUs. So no
two measurements disturb each other, and the model is loaded once. All cells of a device and prompt length come from one
process, as they do without a cluster, and can be compared with each other.

The driver, which is the process that was started by the user, loads no model. It sends the text, so that all nodes have
the same, and it alone writes the results. What a lost worker was measuring is measured again.

Needs the extra ``cluster``. Only workers import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from knormpress.cluster.connect import connected, expect_given_out
from knormpress.cluster.pool import Job, Pool
from knormpress.cluster.worker import Worker
from knormpress.errors import KnormError
from knormpress.progress import Progress
from knormpress.records.results import Results
from knormpress.records.schema import Record

if TYPE_CHECKING:
    from knormpress.measure.options import Source
    from knormpress.measure.sweep import SweepSettings
    from knormpress.workload.bench import Bench
    from knormpress.workload.corpora import Corpus

__all__ = ["bench_of", "run_on_cluster"]


def run_on_cluster(
    settings: SweepSettings, path: Path, *, address: str, fresh: bool = False, progress: Progress | None = None
) -> list[Record]:
    """Measure a sweep as ``measure.sweep.run`` does, on the nodes of a Ray cluster.

    Args:
        settings: the grid. ``cuda`` and ``xpu`` are measured on each GPU that Ray knows, ``cpu`` and ``mps`` on each
            node; ``auto`` means the GPUs if there are any.
        path, fresh, progress: see ``measure.sweep.run``. The records of a device and prompt length are added together.
            One that was measured in part goes on at its node, if that is still there.
        address: see ``cluster.connect.connected``.

    Returns:
        The record of every cell, in the order device, prompt length, policy.

    Raises:
        KnormError: Ray is not installed or does not answer, no node has such a device, a node can't measure, or one of
            its workers was lost again and again. Finished records are in the file.
    """
    from knormpress.workload.corpora import load_corpus

    expect_given_out(settings.source.device, settings.source.device_map)
    progress = progress or Progress()
    results = Results(path, fresh=fresh, progress=progress)
    corpus = load_corpus(settings.source.corpus)
    progress.say(corpus.notice)
    with connected(address) as ray, Pool(ray, progress) as pool:
        text = pool.share(corpus)
        jobs = [
            _job(settings, text, device, prompt_tokens, results.known)
            for device in dict.fromkeys(settings.source.device)
            for prompt_tokens in settings.effort.prompt_tokens
        ]
        found: dict[Job, list[Record]] = {}
        for job, node, lines in pool.run(jobs):
            records = [Record.model_validate_json(line) for line in lines]
            _expect_same_weights(node, records[0], found)
            found[job] = records
            for record in records:
                if record not in results.known:
                    results.add(record)
    return [record for job in jobs for record in found[job]]


class _Length(NamedTuple):
    """What one worker measures in one go: all cells of a device, as the user named it, and a prompt length.

    ``known`` are records as JSON.
    """

    settings: SweepSettings
    device: str
    prompt_tokens: int
    known: tuple[str, ...]


def _job(settings: SweepSettings, text: Any, device: str, prompt_tokens: int, known: Sequence[Record]) -> Job:
    """A length; for the node that measured some of its cells, if one did."""
    known = [record for record in known if record.conditions.prompt_tokens == prompt_tokens]
    kind = "" if device == "auto" else device
    places = [record.environment for record in known]
    return Job(
        f"a prompt of {prompt_tokens:,} tokens on {device}",
        device,
        _measure,
        (text, _Length(settings, device, prompt_tokens, tuple(record.model_dump_json() for record in known))),
        homes=frozenset(place.node for place in places if place.node and place.device.startswith(kind)),
    )


def _expect_same_weights(node: str, record: Record, found: Mapping[Job, Sequence[Record]]) -> None:
    for other in (other for others in found.values() for other in others):
        if other.model.fingerprint != record.model.fingerprint:
            raise KnormError(
                f"{node}: its model has other weights than that of {other.environment.node}; give all nodes the same "
                "files, and name them with --model"
            )


def _measure(worker: Worker, corpus: Corpus, length: _Length) -> list[str]:
    """Measure a length; returns records as JSON."""
    from knormpress.measure.sweep import measure_length

    bench = bench_of(worker, length.settings.source, corpus, length.device)
    known = map(Record.model_validate_json, length.known)
    records = measure_length(length.settings, bench, length.prompt_tokens, known, worker.progress)
    return [record.model_dump_json() for record in records]


def bench_of(worker: Worker, source: Source, corpus: Corpus, device: str) -> Bench:
    """The model on the worker's device, loaded unless that was the last one it was asked for.

    Raises:
        KnormError: the model can't be loaded, or the node's torch can't use the device.
    """
    from knormpress.workload.bench import Bench
    from knormpress.workload.devices import resolve

    if device not in worker.kept:
        worker.kept.clear()
        worker.progress.step(0, 1, "loading the model")
        bench = Bench.open(source.model, corpus, device=resolve(device), dtype=source.dtype)
        worker.kept[device] = replace(bench, environment=bench.environment.model_copy(update={"node": worker.node}))
    kept: Bench = worker.kept[device]
    return kept

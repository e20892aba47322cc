"""A search for a plan on the nodes of a Ray cluster: layers are measured by all of its devices at the same time.

Each worker owns a device, loads the model once and reads the calibration texts once. Around a base, it gets all moves
of a layer together. A whole plan is tried by one worker, since the next one depends on it. The policies of the report
are divided among all.

The driver, which is the process that was started by the user, opens the model on its CPU, but computes nothing with it:
it needs the tokenizer, the layers and the fingerprint. It sends the text and what is cut from it, so that all nodes
have the same, and it alone writes the measurements and the plan. What a lost worker was measuring is measured again.

Needs the extra ``cluster``. Only what computes imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from knormpress.cluster.connect import connected, expect_given_out
from knormpress.cluster.pool import Job, Pool
from knormpress.cluster.worker import Worker
from knormpress.errors import KnormError
from knormpress.measure.cluster import bench_of
from knormpress.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from knormpress.measure.options import Source
    from knormpress.methods.knorm import KnormPress
    from knormpress.records.plan import KeptTokens, Plan, Point
    from knormpress.tune.notes import Damage
    from knormpress.tune.place import Meter
    from knormpress.tune.probes import Probes
    from knormpress.tune.search import Targets
    from knormpress.tune.texts import Texts
    from knormpress.tune.unseen import Tried
    from knormpress.workload.bench import Bench
    from knormpress.workload.corpora import Corpus

__all__ = ["tune_on_cluster"]

# Under this name a worker keeps the calibration texts.
_READ = "the calibration texts"


def tune_on_cluster(
    targets: Targets, source: Source, path: Path, *, address: str, progress: Progress | None = None, **how: Any
) -> Plan:
    """Search for a plan as ``tune.search.tune`` does, on the nodes of a Ray cluster.

    Args:
        targets, path, progress: see ``tune.search.tune``; ``how`` are its other arguments.
        source: the model and the text. ``cuda`` and ``xpu`` mean each GPU that Ray knows, ``cpu`` and ``mps`` each
            node; ``auto`` means the GPUs if there are any.
        address: see ``cluster.connect.connected``.

    Returns:
        The plan: on equal devices the same as without a cluster.

    Raises:
        KnormError: Ray is not installed or does not answer, no node has such a device, a node has other weights or
            can't measure, one of its workers was lost again and again, or as ``tune.search.tune``.
    """
    expect_given_out(source.device, source.device_map)
    device = source.one_device
    import torch

    from knormpress.tune.search import tune
    from knormpress.workload.bench import Bench
    from knormpress.workload.corpora import load_corpus

    progress = progress or Progress()
    corpus = load_corpus(source.corpus)
    if corpus.notice:
        progress.say(corpus.notice)
    with connected(address) as ray, Pool(ray, progress, lasting=True) as pool:
        pool.fitting(device)
        bench = Bench.open(source.model, corpus, device=torch.device("cpu"), dtype=source.dtype)
        return tune(bench, targets, path, place=_Nodes(pool, bench, source, corpus), progress=progress, **how)


class _Wanted(NamedTuple):
    """What a worker opens: a model on the device that the user named, which must have this fingerprint."""

    source: Source
    device: str
    fingerprint: str


class _Nodes:
    """The nodes of a cluster, see ``place.Place``."""

    def __init__(self, pool: Pool, bench: Bench, source: Source, corpus: Corpus) -> None:
        from knormpress.cache.fingerprint import model_fingerprint

        self._pool, self._corpus = pool, pool.share(corpus)
        self._wanted = _Wanted(source, source.one_device, model_fingerprint(bench.model))

    def load(self) -> None:
        """Load the model on every device."""
        list(self._pool.run([self.job("the model", _load) for _ in self.devices()]))

    @contextmanager
    def probes(self, texts: Texts, progress: Progress) -> Iterator[Meter]:
        """See ``place.Place``."""
        shared = self._pool.share(texts)
        reading = [self.job("the calibration texts", _probe, shared, _items) for _ in self.devices()]
        items = [done.result for done in self._pool.run(reading)]
        if min(items) < max(items):
            progress.say(
                f"the devices' full caches find {min(items)} to {max(items)} items: they round differently, and their "
                "measurements compare less well; name devices of one kind"
            )
        yield _Probes(self, self._pool, shared, max(items))

    def report(self, tried: Sequence[Tried], texts: Texts, progress: Progress) -> tuple[Point, ...]:
        """See ``place.Place``; each device measures some of the policies, and the full cache beside them."""
        shared, count = self._pool.share(texts), min(len(self.devices()), len(tried))
        jobs = [self.job("the report", _report, shared, tried[part::count]) for part in range(count)]
        points = {done.job: done.result for done in self._pool.run(jobs)}
        return tuple(points[jobs[number % count]][number // count] for number in range(len(tried)))

    def kept_tokens(self, press: KnormPress, prompt: Tensor) -> KeptTokens:
        """See ``place.Place``."""
        (done,) = self._pool.run([self.job("the kept tokens", _kept_tokens, press, prompt)])
        kept: KeptTokens = done.result
        return kept

    def devices(self) -> Sequence[object]:
        """The devices to measure on, at least one."""
        return self._pool.fitting(self._wanted.device)

    def job(self, name: str, function: Callable[..., Any], *arguments: Any) -> Job:
        """A job for one of the devices, on which a worker opens the model."""
        return Job(name, self._wanted.device, function, (self._corpus, self._wanted, *arguments))


class _Probes:
    """The calibration texts at the nodes, see ``place.Meter``."""

    def __init__(self, nodes: _Nodes, pool: Pool, texts: Any, items: int) -> None:
        self._nodes, self._pool, self._texts = nodes, pool, texts
        self.items = items

    def measure(self, press: KnormPress) -> Damage:
        """See ``place.Meter``."""
        (done,) = self._pool.run([self._job("a plan", partial(_damage, press=press))], shows_steps=False)
        damage: Damage = done.result
        return damage

    def around(self, base: KnormPress, moves: Mapping[KnormPress, int]) -> Iterator[tuple[KnormPress, Damage]]:
        """See ``place.Meter``. Low layers come first: their passes are the longest."""
        layers: dict[int, dict[KnormPress, int]] = {}
        for press, layer in moves.items():
            layers.setdefault(layer, {})[press] = layer
        jobs = [
            self._job(f"layer {layer}", partial(_damages, base=base, moves=batch))
            for layer, batch in sorted(layers.items())
        ]
        for done in self._pool.run(jobs, shows_steps=False):
            yield from done.result

    def _job(self, name: str, ask: Callable[[Probes], Any]) -> Job:
        return self._nodes.job(name, _probe, self._texts, ask)


# What follows is done by workers.


def _load(worker: Worker, corpus: Corpus, wanted: _Wanted) -> None:
    """Open the model."""
    _bench(worker, corpus, wanted)


def _probe(worker: Worker, corpus: Corpus, wanted: _Wanted, texts: Texts, ask: Callable[[Probes], Any]) -> Any:
    """What ``ask`` returns of the calibration texts, which are read before it asks for the first time."""
    from knormpress.tune.place import reading

    bench = _bench(worker, corpus, wanted)
    if _READ not in worker.kept:
        stack = ExitStack()
        probes = stack.enter_context(reading(bench, texts.to(bench.device), worker.progress))
        worker.kept[_READ] = stack, probes
    return ask(worker.kept[_READ][1])


def _items(probes: Probes) -> int:
    return probes.items


def _damage(probes: Probes, press: KnormPress) -> Damage:
    return probes.measure(press)


def _damages(probes: Probes, base: KnormPress, moves: Mapping[KnormPress, int]) -> list[tuple[KnormPress, Damage]]:
    return list(probes.around(base, moves))


def _report(worker: Worker, corpus: Corpus, wanted: _Wanted, texts: Texts, tried: Sequence[Tried]) -> tuple[Point, ...]:
    from knormpress.tune.place import report

    if _READ in worker.kept:
        # The full caches of the calibration texts, and what controls the model's passes.
        worker.kept.pop(_READ)[0].close()
    bench = _bench(worker, corpus, wanted)
    return report(bench, tried, texts.to(bench.device), worker.progress)


def _kept_tokens(worker: Worker, corpus: Corpus, wanted: _Wanted, press: KnormPress, prompt: Tensor) -> KeptTokens:
    from knormpress.tune.unseen import kept_tokens

    bench = _bench(worker, corpus, wanted)
    return kept_tokens(bench, press, prompt.to(bench.device))


def _bench(worker: Worker, corpus: Corpus, wanted: _Wanted) -> Bench:
    from knormpress.cache.fingerprint import model_fingerprint

    loaded = wanted.device in worker.kept
    bench = bench_of(worker, wanted.source, corpus, wanted.device)
    if not loaded and model_fingerprint(bench.model) != wanted.fingerprint:
        raise KnormError(
            "its model has other weights than the driver's; give all nodes the same files, and name them with --model"
        )
    return bench

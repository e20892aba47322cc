"""A sweep on the nodes of a Ray cluster: each device and prompt length is measured by one worker, all at the same time.

A worker owns its device for as long as there is something to measure on it: a GPU, or a node with all its CPUs. So no
two measurements disturb each other, and the model is loaded once. All cells of a device and prompt length come from one
process, as they do without a cluster, and can be compared with each other.

The driver, which is the process that was started by the user, loads no model. It sends the text, so that all nodes have
the same, and it alone writes the results. What a lost worker was measuring is measured again.

Needs the extra ``cluster``. Only workers import torch.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from knormpress import __version__
from knormpress.errors import KnormError
from knormpress.progress import Progress
from knormpress.records.results import Results
from knormpress.records.schema import Record

if TYPE_CHECKING:
    from knormpress.measure.sweep import SweepSettings
    from knormpress.workload.bench import Bench
    from knormpress.workload.corpora import Corpus

__all__ = ["Device", "devices_of", "run_on_cluster"]

# A length whose worker was lost is given to another one, so many times in all.
_TRIES = 3
# Seconds to wait for the head of the cluster to take a connection, and between two looks at what workers say.
_ANSWER_S = 10.0
_LOOK_S = 0.5


def run_on_cluster(
    settings: SweepSettings, path: Path, *, address: str, fresh: bool = False, progress: Progress | None = None
) -> list[Record]:
    """Measure a sweep as ``measure.sweep.run`` does, on the nodes of a Ray cluster.

    Args:
        settings: the grid. ``cuda`` and ``xpu`` are measured on each GPU that Ray knows, ``cpu`` and ``mps`` on each
            node; ``auto`` means the GPUs if there are any.
        path, fresh, progress: see ``measure.sweep.run``. The records of a device and prompt length are added together.
            One that was measured in part goes on at its node, if that is still there.
        address: ``local`` starts a cluster on this machine and stops it in the end; ``auto`` is the cluster that this
            machine is a node of; or HOST:PORT of its head.

    Returns:
        The record of every cell, in the order device, prompt length, policy.

    Raises:
        KnormError: Ray is not installed or does not answer, no node has such a device, a node can't measure, or one of
            its workers was lost again and again. Finished records are in the file.
    """
    from knormpress.workload.corpora import load_corpus

    for name in settings.source.device:
        if ":" in name:
            raise KnormError(f"device is {name}, but Ray gives out the devices; use {name.partition(':')[0]}")
    if settings.source.device_map is not None:
        raise KnormError("--device-map spreads a model over one machine's devices; leave it out with --ray")
    progress = progress or Progress()
    results = Results(path, fresh=fresh, progress=progress)
    corpus = load_corpus(settings.source.corpus)
    progress.say(corpus.notice)
    with _connected(address) as ray:
        return _Driver(ray, settings, corpus, results, progress).run()


class Device(NamedTuple):
    """What one worker owns: a GPU, the ``number`` of its node, with its share of the CPUs; or all CPUs of a node."""

    node_id: str
    node: str
    gpus: int
    cpus: int
    number: int = 0


def devices_of(nodes: Iterable[Mapping[str, Any]]) -> list[Device]:
    """The devices of the living nodes that ``ray.nodes()`` lists: each GPU, and each node with CPUs."""
    devices = []
    for node in nodes:
        cpus, gpus = (int(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
        if not node["Alive"]:
            continue
        # Ray calls a node by its address, unless it was given a name.
        named = node["NodeName"] != node["NodeManagerAddress"]
        name = str(node["NodeName"] if named else node["NodeManagerHostname"])
        devices += [Device(node["NodeID"], name, 1, cpus // gpus, number) for number in range(gpus)]
        if cpus:
            devices.append(Device(node["NodeID"], name, 0, cpus))
    return devices


class _Length(NamedTuple):
    """What one worker measures in one go: all cells of a device, as the user named it, and a prompt length."""

    device: str
    prompt_tokens: int

    def __str__(self) -> str:
        return f"a prompt of {self.prompt_tokens:,} tokens on {self.device}"


class _Driver:
    """Gives lengths to workers, tells what they say, and keeps what they find."""

    def __init__(self, ray: Any, settings: SweepSettings, corpus: Corpus, results: Results, progress: Progress) -> None:
        self.ray, self.settings, self.results, self.progress = ray, settings, results, progress
        self.corpus = ray.put(corpus)
        names = tuple(dict.fromkeys(settings.source.device))
        self.lengths = [_Length(name, tokens) for name in names for tokens in settings.effort.prompt_tokens]
        self.waiting = list(self.lengths)
        self.found: dict[_Length, list[Record]] = {}
        self.lost: Counter[_Length] = Counter()
        self.workers: dict[Device, Any] = {}
        here = ray.get_runtime_context().get_node_id()
        self.ear = ray.remote(_Ear).options(num_cpus=0, scheduling_strategy=_on(here)).remote()
        self.counted: dict[_Length, tuple[int, int]] = {}
        self.said: set[str] = set()

    def run(self) -> list[Record]:
        """Measure everything; no worker is left in the end, however it comes."""
        running: dict[Any, tuple[Device, _Length]] = {}
        try:
            while self.waiting or running:
                self._start(running)
                done, _ = self.ray.wait(list(running), timeout=_LOOK_S)
                self._listen()
                for one in done:
                    self._take(one, *running.pop(one))
        finally:
            for worker in self.workers.values():
                self.ray.kill(worker)
        return [record for length in self.lengths for record in self.found[length]]

    def _start(self, running: dict[Any, tuple[Device, _Length]]) -> None:
        """Give each free device a length; one that gets none is given back to the cluster."""
        devices = devices_of(self.ray.nodes())
        if not running:
            self._expect_devices(devices)
        busy = {device for device, _ in running.values()}
        for device in (device for device in devices if device not in busy):
            length = next((length for length in self.waiting if device in self._suitable(length, devices)), None)
            if length is not None:
                self.waiting.remove(length)
                self.progress.step(*self._steps(), f"{device.node}: {length}")
                running[self._measure(device, length)] = device, length
            elif device in self.workers:
                self.ray.kill(self.workers.pop(device))

    def _expect_devices(self, devices: Sequence[Device]) -> None:
        for length in self.waiting:
            if not self._suitable(length, devices):
                names = ", ".join(sorted({device.node for device in devices})) or "none"
                what = "GPU" if _wants_gpu(length.device, devices) else "node with CPUs"
                raise KnormError(
                    f"device is {length.device}, but the cluster has no {what}; its nodes: {names}; add one with ray "
                    "start, or name another device"
                )

    def _suitable(self, length: _Length, devices: Sequence[Device]) -> list[Device]:
        """The devices of the right kind; where a node of them has measured some of the cells, those of that node."""
        gpu = _wants_gpu(length.device, devices)
        fitting = [device for device in devices if bool(device.gpus) == gpu]
        kind = "" if length.device == "auto" else length.device
        places = [record.environment for record in self._known(length)]
        homes = {place.node for place in places if place.device.startswith(kind) and not self.lost[length]}
        return [device for device in fitting if device.node in homes] or fitting

    def _known(self, length: _Length) -> list[Record]:
        return [record for record in self.results.known if record.conditions.prompt_tokens == length.prompt_tokens]

    def _measure(self, device: Device, length: _Length) -> Any:
        """Have the device's worker measure a length; returns Ray's reference to the result."""
        if device not in self.workers:
            worker = self.ray.remote(_Worker).options(
                num_cpus=device.cpus, num_gpus=device.gpus, scheduling_strategy=_on(device.node_id)
            )
            self.workers[device] = worker.remote(device.node, os.getcwd(), self.ear)
        known = [record.model_dump_json() for record in self._known(length)]
        return self.workers[device].measure.remote(__version__, self.settings, self.corpus, length, known)

    def _take(self, one: Any, device: Device, length: _Length) -> None:
        """Keep what a worker found; if it was lost, let its length wait again."""
        from ray.exceptions import RayError, RayTaskError

        try:
            lines = self.ray.get(one)
        except RayTaskError as error:
            cause = error.cause
            told = str(cause) if isinstance(cause, KnormError) else f"{type(cause).__name__}: {_last_line(cause)}"
            raise KnormError(f"{device.node}: {told}") from error
        except RayError as error:
            self.ray.kill(self.workers.pop(device))
            self.lost[length] += 1
            told = f"{device.node}: the worker was lost while it measured {length}: {_last_line(error)}"
            if self.lost[length] == _TRIES:
                raise KnormError(f"{told}; this was try {_TRIES} of {_TRIES}") from error
            self.progress.say(f"{told}; it is measured again")
            self.waiting.insert(0, length)
            return
        records = [Record.model_validate_json(line) for line in lines]
        others = (record for found in self.found.values() for record in found)
        for other in others:
            if other.model.fingerprint != records[0].model.fingerprint:
                raise KnormError(
                    f"{device.node}: its model has other weights than that of {other.environment.node}; give all nodes "
                    "the same files, and name them with --model"
                )
        self.found[length] = records
        known = self._known(length)
        for record in records:
            if record not in known:
                self.results.add(record)

    def _listen(self) -> None:
        """Pass on what workers say, each line once, and how far they are."""
        for node, length, what in self.ray.get(self.ear.take.remote()):
            if isinstance(what, str):
                if what not in self.said:
                    self.said.add(what)
                    self.progress.say(f"{node}: {what}")
                continue
            done, total, doing = what
            self.counted[length] = done, total
            self.progress.step(*self._steps(), f"{node}: {doing}")

    def _steps(self) -> tuple[int, int]:
        """Steps that are done, and their total: a length that has not begun counts as the largest of the others."""
        totals = [total for _, total in self.counted.values()]
        unknown = len(self.lengths) - len(totals)
        return sum(done for done, _ in self.counted.values()), sum(totals) + unknown * max(totals, default=1)


class _Ear:
    """Hears what workers say, until the driver asks for it. A Ray actor."""

    def __init__(self) -> None:
        self._heard: list[tuple[str, _Length, str | tuple[int, int, str]]] = []

    def tell(self, node: str, length: _Length, what: str | tuple[int, int, str]) -> None:
        self._heard.append((node, length, what))

    def take(self) -> list[tuple[str, _Length, str | tuple[int, int, str]]]:
        heard, self._heard = self._heard, []
        return heard


class _Worker:
    """Owns a device, and measures on it. A Ray actor.

    Args:
        node: the name of its node.
        folder: the driver's current folder. Where the node has it too, relative paths and git mean the same there.
        ear: an ``_Ear``.
    """

    def __init__(self, node: str, folder: str, ear: Any) -> None:
        self._node, self._ear = node, ear
        self._benches: dict[_Length, Bench] = {}
        if Path(folder).is_dir():
            os.chdir(folder)
        _leave_threads_to_torch()

    def measure(
        self, version: str, settings: SweepSettings, corpus: Corpus, length: _Length, known: list[str]
    ) -> list[str]:
        """Measure a length; ``known`` and what is returned are records as JSON."""
        from knormpress.measure.sweep import measure_length

        if version != __version__:
            raise KnormError(f"has KnormPress {__version__}, and the driver {version}; install the same on all nodes")
        progress = _Spoken(lambda what: self._ear.tell.remote(self._node, length, what))
        bench = self._bench(settings, corpus, length, progress)
        records = measure_length(
            settings, bench, length.prompt_tokens, map(Record.model_validate_json, known), progress
        )
        return [record.model_dump_json() for record in records]

    def _bench(self, settings: SweepSettings, corpus: Corpus, length: _Length, progress: Progress) -> Bench:
        from knormpress.workload.bench import Bench
        from knormpress.workload.devices import resolve

        key = length._replace(prompt_tokens=0)
        if key not in self._benches:
            progress.step(0, 1, "loading the model")
            device = resolve(length.device)
            bench = Bench.open(settings.source.model, corpus, device=device, dtype=settings.source.dtype)
            environment = bench.environment.model_copy(update={"node": self._node})
            self._benches = {key: replace(bench, environment=environment)}
        return self._benches[key]


class _Spoken(Progress):
    """Tells lines and steps to a driver: a new kind of step at once, others once a second at most."""

    def __init__(self, tell: Callable[[str | tuple[int, int, str]], object]) -> None:
        self._tell = tell
        self._doing, self._when = "", 0.0

    def say(self, line: str) -> None:
        self._tell(line)

    def step(self, done: int, total: int, doing: str) -> None:
        now = time.monotonic()
        if doing != self._doing or done == total or now - self._when >= 1.0:
            self._doing, self._when = doing, now
            self._tell((done, total, doing))


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster at ``address``.

    Raises:
        KnormError: Ray is not installed, or does not answer within about a minute.
    """
    if find_spec("ray") is None:
        raise KnormError('Ray is not installed; pip install "knormpress[cluster]"')
    if address not in ("local", "auto"):
        _expect_answer(address)
    # Ray reads these when it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "local":
        # It would have its workers give way to all other processes, also while a clock runs.
        os.environ.setdefault("RAY_worker_niceness", "0")
    else:
        # It would try for a quarter of an hour.
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    import ray

    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # of many kinds
        raise KnormError(
            f"no Ray cluster can be reached at --ray {address}: {_first_line(error).rstrip('.')}; wanted local, auto "
            "or HOST:PORT of the head, on a machine that is a node of it"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _expect_answer(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        if not host or "/" in host:
            raise ValueError
        socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
    except ValueError:
        raise KnormError(f"--ray is {address!r}; wanted local, auto, or HOST:PORT of the cluster's head") from None
    except OSError as error:
        raise KnormError(
            f"nothing answers at --ray {address} ({error}); wanted local, auto, or HOST:PORT of the cluster's head"
        ) from error


def _on(node_id: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def _wants_gpu(device: str, devices: Iterable[Device]) -> bool:
    if device == "auto":
        return any(device.gpus for device in devices)
    return device in ("cuda", "xpu")


def _leave_threads_to_torch() -> None:
    """Take back the number of threads that Ray sets, if the user did not set one where the node was started.

    Ray counts the CPUs of the node. torch may choose otherwise, and would without Ray; results can depend on it.
    """
    try:
        started = Path(f"/proc/{os.environ['RAY_RAYLET_PID']}/environ").read_bytes()
    except (KeyError, OSError):
        return
    if not any(setting.startswith(b"OMP_NUM_THREADS=") for setting in started.split(b"\0")):
        os.environ.pop("OMP_NUM_THREADS", None)


def _first_line(error: BaseException) -> str:
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def _last_line(error: BaseException) -> str:
    return next(filter(None, map(str.strip, reversed(str(error).splitlines()))), type(error).__name__)

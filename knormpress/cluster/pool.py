"""The driver's side: give jobs to workers, tell what they say, and give what a lost worker did to another one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

from knormpress import __version__
from knormpress.cluster.devices import Device, devices_of, fitting
from knormpress.cluster.words import last_line
from knormpress.cluster.worker import Ear, Said, Worker
from knormpress.errors import KnormError
from knormpress.progress import Progress

__all__ = ["Done", "Job", "Pool"]

# A job whose worker was lost is given to another one, so many times in all.
_TRIES = 3
# Seconds between two looks at what workers say.
_LOOK_S = 0.5


@dataclass(frozen=True, eq=False)
class Job:
    """What one worker does in one go.

    Args:
        name: what it measures, in words.
        device: the device that it needs, as the user named it.
        function: a function of a module that all nodes have. It takes the ``Worker`` and ``arguments``, and returns
            what can be pickled.
        arguments: what can be pickled, or what ``Pool.share`` returned.
        homes: the names of nodes that it is for, if they have the device, until a worker is lost with it.
    """

    name: str
    device: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    homes: frozenset[str] = frozenset()


class Done(NamedTuple):
    """A job, the name of the node that did it, and what its function returned."""

    job: Job
    node: str
    result: Any


class Pool:
    """Workers on the devices of a cluster. In the end of its context no worker is left, however it comes.

    Args:
        ray: see ``connect.connected``.
        progress: gets what workers say.
        lasting: keep workers that have nothing to do. Otherwise their devices go back to the cluster at once.
    """

    def __init__(self, ray: Any, progress: Progress, *, lasting: bool = False) -> None:
        self._ray, self._progress, self._lasting = ray, progress, lasting
        self._workers: dict[Device, Any] = {}
        here = ray.get_runtime_context().get_node_id()
        self._ear = ray.remote(Ear).options(num_cpus=0, scheduling_strategy=_on(here)).remote()
        self._said: set[str] = set()
        self._jobs = 0

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for worker in self._workers.values():
            self._ray.kill(worker)

    def share(self, value: object) -> Any:
        """Send ``value`` to the nodes once; returns what stands for it among the arguments of jobs."""
        return self._ray.put(value)

    def fitting(self, wanted: str) -> list[Device]:
        """The devices that ``wanted`` means now, see ``devices.fitting``."""
        return fitting(wanted, devices_of(self._ray.nodes()))

    def run(self, jobs: Sequence[Job], *, shows_steps: bool = True) -> Iterator[Done]:
        """Do the jobs; yields each as soon as it is done. The first ones are begun first.

        Where the iterator is closed, jobs that workers have begun are finished, and what they return is lost.

        Args:
            jobs: what to do.
            shows_steps: pass the workers' steps on, as steps of one whole. What they say is always passed on.

        Raises:
            KnormError: no node has a device that is needed, a node can't do a job, or the workers of one were lost
                again and again.
        """
        waiting, lost = list(jobs), Counter[Job]()
        steps = _Steps(self._progress, len(waiting)) if shows_steps else None
        running: dict[Any, tuple[Device, Job]] = {}
        while waiting or running:
            self._start(waiting, running, lost, steps)
            done, _ = self._ray.wait(list(running), timeout=_LOOK_S)
            self._listen(steps)
            for reference in done:
                device, job = running.pop(reference)
                found = self._take(reference, device, job, lost)
                if found is None:
                    waiting.insert(0, job)
                else:
                    yield found

    def _start(
        self, waiting: list[Job], running: dict[Any, tuple[Device, Job]], lost: Counter[Job], steps: _Steps | None
    ) -> None:
        """Give each free device a job; one that gets none is given back to the cluster, unless workers last."""
        devices = devices_of(self._ray.nodes())
        if not running:
            for wanted in dict.fromkeys(job.device for job in waiting):
                fitting(wanted, devices)
        busy = {device for device, _ in running.values()}
        for device in (device for device in devices if device not in busy):
            job = next((job for job in waiting if device in _suitable(job, devices, lost)), None)
            if job is not None:
                waiting.remove(job)
                if steps is not None:
                    steps.show(f"{device.node}: {job.name}")
                running[self._send(device, job, steps)] = device, job
            elif device in self._workers and not self._lasting:
                self._ray.kill(self._workers.pop(device))

    def _send(self, device: Device, job: Job, steps: _Steps | None) -> Any:
        """Have the device's worker do the job; returns Ray's reference to the result."""
        if device not in self._workers:
            worker = self._ray.remote(Worker).options(
                num_cpus=device.cpus, num_gpus=device.gpus, scheduling_strategy=_on(device.node_id)
            )
            self._workers[device] = worker.remote(device.node, os.getcwd(), self._ear)
        self._jobs += 1
        if steps is not None:
            steps.begin(job, self._jobs)
        return self._workers[device].do.remote(__version__, self._jobs, job.function, *job.arguments)

    def _take(self, reference: Any, device: Device, job: Job, lost: Counter[Job]) -> Done | None:
        """What a worker returned; None if it was lost."""
        from ray.exceptions import RayError, RayTaskError

        try:
            return Done(job, device.node, self._ray.get(reference))
        except RayTaskError as error:
            cause = error.cause
            told = str(cause) if isinstance(cause, KnormError) else f"{type(cause).__name__}: {last_line(cause)}"
            raise KnormError(f"{device.node}: {told}") from error
        except RayError as error:
            self._ray.kill(self._workers.pop(device))
            lost[job] += 1
            told = f"{device.node}: the worker was lost while it measured {job.name}: {last_line(error)}"
            if lost[job] == _TRIES:
                raise KnormError(f"{told}; this was try {_TRIES} of {_TRIES}") from error
            self._progress.say(f"{told}; it is measured again")
            return None

    def _listen(self, steps: _Steps | None) -> None:
        """Pass on what workers say, each line once, and how far they are."""
        for node, number, said in self._ray.get(self._ear.take.remote()):
            if isinstance(said, str):
                if said not in self._said:
                    self._said.add(said)
                    self._progress.say(f"{node}: {said}")
            elif steps is not None:
                steps.hear(node, number, said)


class _Steps:
    """How far several jobs are, told as one."""

    def __init__(self, progress: Progress, jobs: int) -> None:
        self._progress, self._jobs = progress, jobs
        self._running: dict[int, Job] = {}
        self._counted: dict[Job, tuple[int, int]] = {}

    def begin(self, job: Job, number: int) -> None:
        """Hear what is said of ``number`` as of this job."""
        self._running[number] = job

    def hear(self, node: str, number: int, said: Said) -> None:
        """A step of a job; those of an earlier run are not told."""
        if number in self._running and not isinstance(said, str):
            done, total, doing = said
            self._counted[self._running[number]] = done, total
            self.show(f"{node}: {doing}")

    def show(self, doing: str) -> None:
        """Tell the steps that are done, and their total: a job not begun counts as the largest of the others."""
        totals = [total for _, total in self._counted.values()]
        done = sum(done for done, _ in self._counted.values())
        self._progress.step(done, sum(totals) + (self._jobs - len(totals)) * max(totals, default=1), doing)


def _suitable(job: Job, devices: Sequence[Device], lost: Counter[Job]) -> list[Device]:
    """The devices that a job can be given to now."""
    try:
        found = fitting(job.device, devices)
    except KnormError:  # none for a while; while something runs, one may come back
        return []
    return [device for device in found if device.node in job.homes and not lost[job]] or found


def _on(node_id: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)

"""A cluster of two nodes, which are processes of this machine. It is started once for all tests of this folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from knormpress.progress import Progress

ROOT = Path(__file__).parents[3]

with_ray = [
    pytest.mark.skipif(sys.platform != "linux", reason="a Ray cluster of several nodes runs on Linux alone"),
    # Ray's own threads and sockets are closed when they are collected.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Told(Progress):
    """Remembers the lines and the kinds of steps that it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: set[str] = set()

    def say(self, line: str) -> None:
        self.lines.append(line)

    def step(self, done: int, total: int, doing: str) -> None:
        self.steps.add(doing)


@pytest.fixture(scope="package")
def head() -> Iterator[Any]:
    """A cluster of one node with a CPU, to which workers come with the modules of the tests."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        # Workers that give way to all other processes may wait for minutes on a busy machine.
        patch.setenv("RAY_worker_niceness", "0")
        # Without what these tests don't look at, it is there sooner.
        lean = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "node_name": "first", **lean})
        yield cluster
        cluster.shutdown()


@pytest.fixture(scope="package")
def nodes(head: Any) -> Any:
    """The same cluster, from here on of two nodes."""
    head.add_node(num_cpus=1, node_name="second")
    return head

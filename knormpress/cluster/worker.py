"""The processes of a cluster that do jobs, and the one that hears what they say. Only jobs import torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from knormpress import __version__
from knormpress.errors import KnormError
from knormpress.progress import Progress

__all__ = ["Ear", "Said", "Worker"]

Said = str | tuple[int, int, str]
"""A line, or a step: how many are done, of how many, and what is being done."""


class Worker:
    """Owns a device, and does jobs on it. A Ray actor.

    Args:
        node: the name of its node.
        folder: the driver's current folder. Where the node has it too, relative paths and git mean the same there.
        ear: an ``Ear``.

    Attributes:
        kept: what jobs leave for later ones, such as a loaded model.
        progress: tells the driver how far the present job is.
    """

    def __init__(self, node: str, folder: str, ear: Any) -> None:
        self.node, self.kept, self.progress = node, dict[str, Any](), Progress()
        self._ear = ear
        if Path(folder).is_dir():
            os.chdir(folder)
        _leave_threads_to_torch()

    def do(self, version: str, number: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Do the job with this ``number``, see ``pool.Job``.

        Raises:
            KnormError: the driver has another ``version`` of KnormPress.
        """
        if version != __version__:
            raise KnormError(f"has KnormPress {__version__}, and the driver {version}; install the same on all nodes")
        self.progress = _Spoken(lambda said: self._ear.tell.remote(self.node, number, said))
        return function(self, *arguments)


class Ear:
    """Hears what workers say, until the driver asks for it. A Ray actor."""

    def __init__(self) -> None:
        self._heard: list[tuple[str, int, Said]] = []

    def tell(self, node: str, number: int, said: Said) -> None:
        """Hear what a node says of the job with this ``number``."""
        self._heard.append((node, number, said))

    def take(self) -> list[tuple[str, int, Said]]:
        """What was heard since the last time."""
        heard, self._heard = self._heard, []
        return heard


class _Spoken(Progress):
    """Tells lines and steps to a driver: a new kind of step at once, others once a second at most."""

    def __init__(self, tell: Callable[[Said], object]) -> None:
        self._tell = tell
        self._doing, self._when = "", 0.0

    def say(self, line: str) -> None:
        self._tell(line)

    def step(self, done: int, total: int, doing: str) -> None:
        now = time.monotonic()
        if doing != self._doing or done == total or now - self._when >= 1.0:
            self._doing, self._when = doing, now
            self._tell((done, total, doing))


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

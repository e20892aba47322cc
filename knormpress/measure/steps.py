"""The steps of a sweep, for the display of its progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from knormpress.measure.options import Effort
from knormpress.progress import Progress

__all__ = ["Steps"]


class Steps:
    """Counts finished steps: each generation, prefill or document is one step.

    Args:
        effort: how much is measured.
        tasks: the number of retrieval tasks.
        cells: the number of cells of each prompt length on each device.
        progress: gets every step.
        doing: the first step.
    """

    def __init__(self, effort: Effort, tasks: int, cells: Sequence[int], progress: Progress, doing: str) -> None:
        self.progress = progress
        self.rounds = effort.rounds
        self.texts = effort.texts * tasks
        self.documents = effort.samples + self.texts
        self.total = sum(map(self._steps, cells))
        self.done = 0
        self.doing = doing

    def runs(self, cells: int) -> int:
        """The timed runs of ``cells`` and of the full cache beside them."""
        return (cells + 1) * self.rounds

    def _steps(self, cells: int) -> int:
        """Everything for ``cells`` of one length: runs, a pass for the memory of each and the full cache, documents."""
        return self.runs(cells) + cells + 1 + self.documents if cells else 0

    def begin(self, doing: str) -> None:
        """Report that ``doing`` is what comes now."""
        self.doing = doing
        self.progress.step(self.done, self.total, doing)

    def tick(self) -> None:
        """Report that one more step is finished."""
        self.done += 1
        self.progress.step(self.done, self.total, self.doing)

    def tick_at_most(self, times: int) -> Callable[[], None]:
        """A ``tick`` that counts at most ``times`` steps, since the number of pairs is not known before measuring."""
        remaining = iter(range(times))

        def tick() -> None:
            if next(remaining, None) is not None:
                self.tick()

        return tick

    def ask_nothing(self) -> None:
        """Subtract the steps of the retrieval of one prompt length, which can't be measured, from the total."""
        self.total -= self.texts
        self.begin(self.doing)

    def leave_out(self, cells: int, of: int) -> None:
        """Subtract the steps of ``cells``, of a length's ``of``, which are in the file already, from the total."""
        if cells:
            self.progress.say(f"{cells} of {of} cells were measured before and are taken from the file")
            self.total -= self._steps(of) - self._steps(of - cells)
            self.begin(self.doing)

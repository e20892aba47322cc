"""How a long measurement tells what it is doing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any

__all__ = ["Progress", "TerminalProgress", "ticking"]


class Progress:
    """What a sweep tells of itself while it runs; this one keeps it quiet."""

    def say(self, line: str) -> None:
        """Something the user should know: which text is used, what was measured before."""

    def step(self, done: int, total: int, doing: str) -> None:
        """``done`` of ``total`` steps of about equal length are behind; ``doing`` is under way."""


def ticking(progress: Progress, total: int, doing: str) -> Callable[[], None]:
    """A function to call after each of ``total`` equal steps."""
    done = 0
    progress.step(0, total, doing)

    def tick() -> None:
        nonlocal done
        done += 1
        progress.step(done, total, doing)

    return tick


_logger = logging.getLogger("knormpress")


class _Sayer(logging.Handler):
    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.say(self.format(record))


class TerminalProgress(Progress):
    """A bar with the time left on stderr; one plain line for each thing done where stderr is no terminal.

    What KnormPress logs meanwhile, such as that a model is being fetched, is shown above the bar.
    """

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        from knormpress.console import make_console

        self._console = make_console(stderr=True)
        columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        self._bar = Bar(
            *columns,
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)
        self._doing = ""
        self._handler = _Sayer(self)

    def __enter__(self) -> TerminalProgress:
        _logger.addHandler(self._handler)
        _logger.setLevel(logging.INFO)
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
        _logger.removeHandler(self._handler)

    def say(self, line: str) -> None:
        """Print ``line`` above the bar."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def step(self, done: int, total: int, doing: str) -> None:
        """Move the bar to ``done`` of ``total``; without a terminal, say what one is ``doing`` when that changes."""
        self._bar.update(self._task, completed=done, total=total, description=doing)
        if self._bar.disable and doing != self._doing:
            self.say(f"[{done}/{total}] {doing}")
        self._doing = doing

"""Progress in a terminal: a bar with the time left, or plain lines."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Any

from knormpress.progress import Progress

__all__ = ["TerminalProgress"]


_logger = logging.getLogger("knormpress")


class _LogLines(logging.Handler):
    """Passes log lines to a progress."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.say(self.format(record))


class TerminalProgress(Progress):
    """A bar with the time left on stderr; if stderr is not a terminal, a plain line for each kind of step.

    Log lines of KnormPress, such as the download of a model, are shown above the bar.
    """

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        from knormpress.show.console import make_console

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
        self._handler = _LogLines(self)

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
        """Move the bar to ``done`` of ``total``; without a terminal, print ``doing`` when it changes."""
        self._bar.update(self._task, completed=done, total=total, description=doing)
        if self._bar.disable and doing != self._doing:
            self.say(f"[{done}/{total}] {doing}")
        self._doing = doing

"""How a long measurement reports its progress."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "ticking"]


class Progress:
    """Takes the reports of a long measurement. This class ignores them; ``show.progress`` has one that shows them."""

    def say(self, line: str) -> None:
        """Report something that the user should know, such as which text is used."""

    def step(self, done: int, total: int, doing: str) -> None:
        """Report that ``done`` of ``total`` about equal steps are finished; ``doing`` names the current step."""


def ticking(progress: Progress, total: int, doing: str) -> Callable[[], None]:
    """Return a function to call after each of ``total`` equal steps."""
    done = 0
    progress.step(0, total, doing)

    def tick() -> None:
        nonlocal done
        done += 1
        progress.step(done, total, doing)

    return tick

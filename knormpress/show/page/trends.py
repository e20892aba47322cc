"""How each figure of each test moves over the stored commits: its slope, and the steps with their commits and dates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from knormpress.compare.verdicts import THRESHOLDS, machine_class
from knormpress.errors import KnormError
from knormpress.records.git import ancestors, is_shallow
from knormpress.records.schema import Entry
from knormpress.show.page.followed import FIGURES, Figure
from knormpress.show.page.parts import Block, Cell, Heading, Statement, Statements, Table
from knormpress.show.pictures.style import pretty
from knormpress.stats.trend import FEWEST_FOR_SLOPE, FEWEST_FOR_STEPS, Trend, trend

__all__ = ["Followed", "follow", "trend_blocks"]

_MOST_COMMITS = 60
# A standard deviation that is a small part of what would be a regression is of no interest.
_OF_THRESHOLD = 0.05


@dataclass(frozen=True)
class Followed:
    """A figure of a test over the commits: the newest entry of each, oldest first, and the trend in %.

    ``number`` is that of the test in the report's table.
    """

    number: int
    test: str
    figure: Figure
    commits: tuple[Entry, ...]
    trend: Trend

    @property
    def steps(self) -> list[str]:
        """The run of the first commit after each step."""
        return [self.commits[step.at].run for step in self.trend.steps]

    def statement(self) -> Statement | None:
        """What is worse since a step, or worse with each commit; None if nothing is."""
        threshold, worse = THRESHOLDS[self.figure.metric], self.figure.worse
        name = f"{self.test}: {self.figure.label}"
        if self.trend.steps:
            step = self.trend.steps[-1]
            if worse * step.size <= 0:
                return None
            return Statement("unsure", "step", f"{name} {_percent(step.size)} at {_where(self.commits[step.at])}.")
        low = min(worse * end for end in self.trend.slope.ends)
        whole = self.trend.slope.percent * (len(self.commits) - 1)
        if low <= 0 or worse * whole <= threshold:
            return None
        return Statement(
            "unsure", "creep", f"{name} {_percent(whole)} over {len(self.commits)} commits, a little with each."
        )

    def row(self) -> tuple[Cell, ...]:
        """The row of the table."""
        slope, steps = self.trend.slope, self.trend.steps
        ends = " to ".join(map(_percent, slope.ends))
        told = "; ".join(f"{_percent(step.size)} at {_where(self.commits[step.at])}" for step in steps)
        few = len(self.commits) < FEWEST_FOR_STEPS
        names = (str(self.number), self.test, self.figure.label, str(len(self.commits)))
        return (*names, (_percent(slope.percent), ends), told or ("too few commits" if few else "none"))

    @staticmethod
    def table(followed: Sequence[Followed]) -> Table:
        """All figures that have a trend."""
        return Table(
            "The trend over the commits",
            ("No.", "Test", "Figure", "Commits", "Slope a commit", "Steps"),
            tuple(one.row() for one in followed),
            row_heads=3,
            note=f"Clean runs that passed, of the newest {_MOST_COMMITS} commits of this line; times of one machine "
            f"only. A slope needs {FEWEST_FOR_SLOPE} commits and a step {FEWEST_FOR_STEPS}; a step lasts for two.",
            folded=True,
        )


def trend_blocks(followed: Sequence[Followed]) -> Iterator[Block]:
    """What got worse by and by, and where."""
    told = tuple(filter(None, (one.statement() for one in followed)))
    if told:
        yield Heading("Over the stored commits")
        yield Statements(told)


def follow(tests: Sequence[Mapping[str, Entry]]) -> Iterator[Followed]:
    """The figures of ``tests`` that have enough commits; a test is given by its entry for each run, oldest first."""
    line = _line([entry for by_run in tests for entry in by_run.values()])
    for number, by_run in enumerate(tests, start=1):
        entries = [entry for entry in by_run.values() if entry.passed and not entry.environment.git_dirty]
        for figure in FIGURES:
            commits = _by_commit([entry for entry in entries if math.isfinite(figure.of(entry))], figure, line)
            levels = [statistics.median(map(figure.of, runs)) for runs in commits]
            if figure.level == 1.0 and levels:
                middle = statistics.median(levels)
                levels = [100 * level / middle for level in levels]
            found = trend(levels, least=_OF_THRESHOLD * THRESHOLDS[figure.metric])
            if found is not None:
                newest = tuple(runs[-1] for runs in commits)
                yield Followed(number, newest[-1].test, figure, newest, found)


def _line(entries: Sequence[Entry]) -> Mapping[str, int] | None:
    """The place of each commit that the newest entry comes from, its own the last; None if git can't tell."""
    newest = max(entries, key=lambda entry: entry.created, default=None)
    commit = newest.environment.git_commit if newest else None
    if commit is None or is_shallow():
        return None
    try:
        return {one: place for place, one in enumerate(reversed(ancestors(commit)))}
    except KnormError:
        return None


def _by_commit(entries: Sequence[Entry], figure: Figure, line: Mapping[str, int] | None) -> list[list[Entry]]:
    """The entries of each commit of the ``line``, in its order; without one, of all commits in the order of their runs.

    An entry without a commit stands for itself.
    """
    if line is not None:
        of_line = [entry for entry in entries if entry.environment.git_commit in line]
        entries = sorted(of_line, key=lambda entry: line[str(entry.environment.git_commit)])
    commits: dict[str, list[Entry]] = {}
    for entry in entries:
        if not figure.is_timed or machine_class(entry.environment) == machine_class(entries[-1].environment):
            commits.setdefault(entry.environment.git_commit or entry.run, []).append(entry)
    return list(commits.values())[-_MOST_COMMITS:]


def _where(entry: Entry) -> str:
    return f"{(entry.environment.git_commit or 'no git')[:7]} ({entry.created[:10]})"


def _percent(value: float) -> str:
    return pretty(f"{value:+.2f} %" if abs(value) >= 0.005 else "0.00 %")

"""The stored runs: the verdict on every test, and its figures over the commits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from knormpress.compare.stored import judge_newest
from knormpress.compare.verdicts import Verdict
from knormpress.errors import KnormError
from knormpress.records.decisions import Acceptance, Rename
from knormpress.records.history import History
from knormpress.records.schema import Entry
from knormpress.show.page.followed import FIGURES, Figure, tests_of
from knormpress.show.page.parts import Block, Cell, Chart, Charts, Heading, Statement, Statements, Table, Tone, Words
from knormpress.show.page.trends import Followed
from knormpress.show.page.words import interval
from knormpress.show.pictures.history import Course, draw_history
from knormpress.show.pictures.style import pretty
from knormpress.show.verdict_table import count_words, worst_first

__all__ = ["decided_blocks", "judge", "past_blocks", "verdict_blocks"]

_MOST_RUNS = 30
_TONES: dict[str, Tone] = {"ok": "good", "improved": "good", "regressed": "bad", "missing": "bad", "noise": "unsure"}


def judge(history: History, thresholds: Mapping[str, float]) -> tuple[list[Verdict], str]:
    """The verdicts on the newest run; or none, and the reason why not."""
    if not history.entries:
        return [], ""
    try:
        return judge_newest(history, thresholds), ""
    except KnormError as error:
        return [], f"The newest stored run can't be judged: {error}."


def verdict_blocks(verdicts: Sequence[Verdict], note: str) -> Iterator[Block]:
    """The number of tests of the newest run with each word, and every test that is not ok, the worst first."""
    if not verdicts and not note:
        return
    yield Heading("The newest stored run, compared with the commit before")
    if note:
        yield Words(note)
        return
    tests = "1 test was" if len(verdicts) == 1 else f"{len(verdicts)} tests were"
    yield Words(f"{tests} compared: {count_words(verdicts)}.")
    not_ok = [verdict for verdict in worst_first(verdicts) if verdict.word != "ok"]
    told = [Statement(_TONES.get(v.word, "plain"), v.word, f"{v.test}: {_pretty_reason(v.reason)}.") for v in not_ok]
    if told:
        yield Statements(tuple(told))


def decided_blocks(history: History) -> Iterator[Block]:
    """The pinned commit, every accepted loss and every new name of a test, with who decided it, when and why."""
    told = []
    for one in history.decisions:
        by = f"by {one.who} on {one.created[:10]}"
        if isinstance(one, Acceptance):
            loss = f"{one.entry.test}: {one.metric} {pretty(one.before)} to {pretty(one.now)} at {_commit(one.entry)}"
            told.append(Statement("plain", "accepted", f"{loss}, {by}: {one.why}"))
        elif isinstance(one, Rename):
            told.append(Statement("plain", "renamed", f"{one.old} is {one.new}, {by}."))
        elif one.commit is not None and one.commit == history.pinned:
            told.append(Statement("plain", "pinned", f"{one.commit[:12]}, {by}: a loss since then fails too."))
    if told:
        yield Heading("What was decided")
        yield Statements(tuple(told))


def _commit(entry: Entry) -> str:
    return (entry.environment.git_commit or "no git")[:7]


def _pretty_reason(reason: str) -> str:
    """A reason with intervals written as elsewhere in a report."""
    return reason.replace("..", " to ")


def past_blocks(history: History, verdicts: Sequence[Verdict], followed: Sequence[Followed]) -> Iterator[Block]:
    """Charts of every figure over the newest runs, with regressed points and steps marked, and tables of the same."""
    if not history.entries:
        return
    if verdicts:
        yield _judged(verdicts)
    runs = list(dict.fromkeys(entry.run for entry in history.entries))
    if len(runs) > _MOST_RUNS:
        yield Words(f"The newest {_MOST_RUNS} of {len(runs)} runs are shown.")
    past = _Past(history, verdicts, followed)
    yield Words("The number at a line is the number of its test in the table below.")
    yield Charts(tuple(past.charts()))
    if followed:
        yield Followed.table(followed)
    yield past.table()


def _judged(verdicts: Sequence[Verdict]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for verdict in worst_first(verdicts):
        for finding in verdict.findings:
            change: Cell = "" if finding.change is None else (pretty(str(finding.change)), interval(finding.change))
            rows.append((verdict.test, finding.metric, finding.word, *map(pretty, finding.figures), change))
        if not verdict.findings:
            rows.append((verdict.test, "", verdict.word, "", "", ""))
    head = ("Test", "Figure", "Verdict", "Before", "Now", "Change")
    return Table("The newest run, figure by figure", head, tuple(rows), row_heads=2, folded=True)


class _Past:
    """The entries of the newest runs by test, and what regressed; tests have numbers that count all stored runs."""

    def __init__(self, history: History, verdicts: Sequence[Verdict], followed: Sequence[Followed]) -> None:
        self.runs = list(dict.fromkeys(entry.run for entry in history.entries))[-_MOST_RUNS:]
        self.commits = {entry.run: _commit(entry) for entry in history.entries}
        self.tests = tests_of(history.entries)
        self.steps = {(one.number, one.figure.metric): one.steps for one in followed}
        judged = [
            (entry.run, entry.test, metric, word)
            for entry in history.entries
            for metric, word in entry.verdicts.items()
        ]
        judged += [(self.runs[-1], v.test, finding.metric, finding.word) for v in verdicts for finding in v.findings]
        self.regressed = {(run, test, metric) for run, test, metric, word in judged if word == "regressed"}

    def charts(self) -> Iterator[Chart]:
        for figure in FIGURES:
            courses = []
            for number, by_run in enumerate(self.tests, start=1):
                values = [figure.of(by_run[run]) if run in by_run else math.nan for run in self.runs]
                if any(map(math.isfinite, values)):
                    bad = [at for at, run in enumerate(self.runs) if run in by_run and self._fell(by_run[run], figure)]
                    steps = self.steps.get((number, figure.metric), ())
                    courses.append(
                        Course(number, values, bad, [at for at, run in enumerate(self.runs) if run in steps])
                    )
            if courses:
                drawn = draw_history(courses, [self.commits[run] for run in self.runs], figure.label, figure.level)
                yield Chart(figure.title, drawn, self._words(figure, courses), themed=True)

    def _fell(self, entry: Entry, figure: Figure) -> bool:
        return (entry.run, entry.test, figure.metric) in self.regressed

    def _words(self, figure: Figure, courses: Sequence[Course]) -> str:
        bad = [
            f"test {course.number} at {self.commits[self.runs[at]]} ({_shown(course.values[at])})"
            for course in courses
            for at in course.regressed
        ]
        steps = [f"test {course.number} at {self.commits[self.runs[at]]}" for course in courses for at in course.steps]
        return (
            f"{figure.title} of {len(courses)} tests over {len(self.runs)} runs. "
            f"Regressed: {', '.join(bad) or 'none'}. Steps: {', '.join(steps) or 'none'}. "
            "All values are in the table that follows."
        )

    def table(self) -> Table:
        rows: list[tuple[Cell, ...]] = []
        for number, by_run in enumerate(self.tests, start=1):
            for run in self.runs:
                if run not in by_run:
                    continue
                entry = by_run[run]
                cells: list[Cell] = []
                for figure in FIGURES:
                    text = _shown(figure.of(entry))
                    cells.append((text, "regressed") if self._fell(entry, figure) else text)
                rows.append((str(number), entry.test, self.commits[run], entry.created[:10], *cells))
        head = ("No.", "Test", "Commit", "Day", *(figure.label for figure in FIGURES))
        return Table("Every test over the runs, oldest first", head, tuple(rows), row_heads=2, folded=True)


def _shown(value: float) -> str:
    return pretty(f"{value:.3f}") if math.isfinite(value) else "none"

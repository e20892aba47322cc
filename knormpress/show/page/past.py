"""The stored runs: the verdict on every test, and its figures over the commits."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from knormpress.compare.stored import judge_newest
from knormpress.compare.verdicts import Verdict
from knormpress.errors import KnormError
from knormpress.records.figures import Timed
from knormpress.records.history import History
from knormpress.records.schema import Entry
from knormpress.show.page.parts import Block, Cell, Chart, Charts, Heading, Statement, Statements, Table, Tone, Words
from knormpress.show.page.words import interval
from knormpress.show.pictures.history import Course, draw_history
from knormpress.show.pictures.style import pretty
from knormpress.show.verdict_table import count_words, worst_first

__all__ = ["FIGURES", "judge", "past_blocks", "verdict_blocks"]

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
    if not_ok:
        yield Statements(
            tuple(
                Statement(_TONES.get(v.word, "plain"), v.word, f"{v.test}: {_pretty_reason(v.reason)}.") for v in not_ok
            )
        )


def _pretty_reason(reason: str) -> str:
    """A reason with intervals written as elsewhere in a report."""
    return reason.replace("..", " to ")


def past_blocks(history: History, verdicts: Sequence[Verdict]) -> Iterator[Block]:
    """Charts of every figure over the newest runs, with regressed points marked, and the same figures as a table."""
    if not history.entries:
        return
    if verdicts:
        yield _judged(verdicts)
    runs = list(dict.fromkeys(entry.run for entry in history.entries))
    if len(runs) > _MOST_RUNS:
        yield Words(f"The newest {_MOST_RUNS} of {len(runs)} runs are shown.")
    past = _Past.of([entry for entry in history.entries if entry.run in runs[-_MOST_RUNS:]], verdicts)
    yield Words("The number at a line is the number of its test in the table below.")
    yield Charts(tuple(past.charts()))
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


@dataclass(frozen=True)
class _Figure:
    """A figure of a stored entry: a ratio to the full cache of the same run, or a change in %."""

    metric: str
    title: str
    label: str
    level: float
    of: Callable[[Entry], float]


class _Past:
    """Entries by test and run. A test counts as another test if its method, model, text or conditions change."""

    def __init__(self, entries: Sequence[Entry], regressed: set[tuple[str, str, str]]) -> None:
        self.regressed = regressed
        self.runs = list(dict.fromkeys(entry.run for entry in entries))
        self.commits = {entry.run: (entry.environment.git_commit or "no git")[:7] for entry in entries}
        self.tests: dict[object, dict[str, Entry]] = {}
        for entry in entries:
            key = (
                entry.test,
                entry.model.fingerprint,
                entry.model.dtype,
                entry.text.sha256,
                entry.method,
                tuple(sorted(entry.conditions.items())),
            )
            self.tests.setdefault(key, {})[entry.run] = entry

    @classmethod
    def of(cls, entries: Sequence[Entry], verdicts: Sequence[Verdict]) -> _Past:
        regressed = {
            (entry.run, entry.test, metric)
            for entry in entries
            for metric, word in entry.verdicts.items()
            if word == "regressed"
        }
        newest = entries[-1].run
        for verdict in verdicts:
            for finding in verdict.findings:
                if finding.word == "regressed":
                    regressed.add((newest, verdict.test, finding.metric))
        return cls(entries, regressed)

    def charts(self) -> Iterator[Chart]:
        for figure in FIGURES:
            courses = []
            for number, by_run in enumerate(self.tests.values(), start=1):
                values = [figure.of(by_run[run]) if run in by_run else math.nan for run in self.runs]
                if any(map(math.isfinite, values)):
                    bad = [at for at, run in enumerate(self.runs) if run in by_run and self._fell(by_run[run], figure)]
                    courses.append(Course(number, values, bad))
            if courses:
                drawn = draw_history(courses, [self.commits[run] for run in self.runs], figure.label, figure.level)
                yield Chart(figure.title, drawn, self._words(figure, courses), themed=True)

    def _fell(self, entry: Entry, figure: _Figure) -> bool:
        return (entry.run, entry.test, figure.metric) in self.regressed

    def _words(self, figure: _Figure, courses: Sequence[Course]) -> str:
        bad = [
            f"test {course.number} at {self.commits[self.runs[at]]} ({_shown(course.values[at])})"
            for course in courses
            for at in course.regressed
        ]
        return (
            f"{figure.title} of {len(courses)} tests over {len(self.runs)} runs. "
            f"Regressed: {', '.join(bad) or 'none'}. All values are in the table that follows."
        )

    def table(self) -> Table:
        rows: list[tuple[Cell, ...]] = []
        for number, by_run in enumerate(self.tests.values(), start=1):
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


def _ratio(name: Timed) -> Callable[[Entry], float]:
    def figure(entry: Entry) -> float:
        latency = entry.latency
        return statistics.median(latency.ratios(name)) if latency is not None and latency.decodes else math.nan

    return figure


FIGURES = (
    _Figure("ttft", "Time to first token over commits", "TTFT / full cache", 1.0, _ratio("ttft")),
    _Figure("tpot", "Time per output token over commits", "TPOT / full cache", 1.0, _ratio("tpot")),
    _Figure(
        "bytes",
        "Cache bytes over commits",
        "Bytes / full cache",
        1.0,
        lambda e: e.memory.ratio if e.memory else math.nan,
    ),
    _Figure(
        "ppl",
        "Perplexity over commits",
        "PPL change (%)",
        0.0,
        lambda e: e.quality.ppl_percent if e.quality else math.nan,
    ),
    _Figure(
        "tasks",
        "Tasks of lm-evaluation-harness over commits",
        "Right documents (points)",
        0.0,
        lambda e: e.lm_eval.change.percent if e.lm_eval else math.nan,
    ),
)

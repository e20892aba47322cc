"""The stored runs: what became of every test, and its figures over the commits."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from knormpress.errors import KnormError
from knormpress.history import History, judge_newest
from knormpress.intervals import percent
from knormpress.plots.history import Course, draw_history
from knormpress.plots.style import pretty
from knormpress.records import Entry, Latency, Quality, Run
from knormpress.report.parts import Block, Cell, Chart, Charts, Finding, Findings, Heading, Table, Tone, Words
from knormpress.report.words import interval
from knormpress.verdict_table import count_words, worst_first
from knormpress.verdicts import Verdict

__all__ = ["FIGURES", "judge", "past_blocks", "verdict_blocks"]

_MOST_RUNS = 30
_TONES: dict[str, Tone] = {"ok": "good", "improved": "good", "regressed": "bad", "missing": "bad", "noise": "unsure"}


def judge(history: History, thresholds: Mapping[str, float]) -> tuple[list[Verdict], str]:
    """The verdicts of the newest run; or none, and why there can't be any."""
    if not history.entries:
        return [], ""
    try:
        return judge_newest(history, thresholds), ""
    except KnormError as error:
        return [], f"The newest stored run can't be judged: {error}."


def verdict_blocks(verdicts: Sequence[Verdict], note: str) -> Iterator[Block]:
    """How many tests of the newest run got which word; every test that is not ok, the worst first."""
    if not verdicts and not note:
        return
    yield Heading("The newest stored run against the commit before")
    if note:
        yield Words(note)
        return
    tests = "1 test was" if len(verdicts) == 1 else f"{len(verdicts)} tests were"
    yield Words(f"{tests} compared: {count_words(verdicts)}.")
    told = [verdict for verdict in worst_first(verdicts) if verdict.word != "ok"]
    if told:
        yield Findings(
            tuple(Finding(_TONES.get(v.word, "plain"), v.word, f"{v.test}: {_pretty_reason(v.reason)}.") for v in told)
        )


def _pretty_reason(reason: str) -> str:
    """A reason with an interval's ends apart, as elsewhere in a report."""
    return reason.replace("..", " to ")


def past_blocks(history: History, verdicts: Sequence[Verdict]) -> Iterator[Block]:
    """Charts of every figure over the newest runs with regressed points marked, and the same as tables."""
    if not history.entries:
        return
    if verdicts:
        yield _judged(verdicts)
    runs = list(dict.fromkeys(entry.run for entry in history.entries))
    if len(runs) > _MOST_RUNS:
        yield Words(f"Shown are the newest {_MOST_RUNS} of {len(runs)} runs.")
    past = _Past.of([entry for entry in history.entries if entry.run in runs[-_MOST_RUNS:]], verdicts)
    yield Words("The numbers at the lines are those of the tests in the table beneath.")
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
    """A figure of a stored entry: ratio to the full cache of the same run, or change in %."""

    metric: str
    title: str
    label: str
    level: float
    of: Callable[[Entry], float]


class _Past:
    """Entries by test and run. A test whose method, model, text or conditions changed counts as another."""

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


def _ratio(of: Callable[[Run], float]) -> Callable[[Entry], float]:
    def figure(entry: Entry) -> float:
        latency: Latency | None = entry.latency
        if latency is None or not latency.baseline or not latency.candidate[0].gaps_s:
            return math.nan
        pairs = zip(latency.baseline, latency.candidate, strict=True)
        return statistics.median(of(candidate) / of(baseline) for baseline, candidate in pairs)

    return figure


def _bytes(entry: Entry) -> float:
    memory = entry.memory
    return math.nan if memory is None else memory.candidate_cache_bytes / memory.baseline_cache_bytes


def _ppl(entry: Entry) -> float:
    quality: Quality | None = entry.quality
    if quality is None:
        return math.nan
    gaps = [np.subtract(document.candidate_nll, document.baseline_nll) for document in quality.documents]
    return percent(math.exp(float(np.concatenate(gaps).mean())))


FIGURES = (
    _Figure("ttft", "Time to first token over commits", "TTFT / full cache", 1.0, _ratio(lambda run: run.ttft_s)),
    _Figure(
        "tpot", "Time per output token over commits", "TPOT / full cache", 1.0, _ratio(lambda run: sum(run.gaps_s))
    ),
    _Figure("bytes", "Cache bytes over commits", "Bytes / full cache", 1.0, _bytes),
    _Figure("ppl", "Perplexity over commits", "PPL change (%)", 0.0, _ppl),
)

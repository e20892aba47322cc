"""Timed generations whose true change is known: simulated runs that go through the real loop and its stopping rule.

``python -m tests.simulated`` prints the tables of ``docs/measuring.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import pytest

from knormpress.compare.verdicts import THRESHOLDS, Verdict, confirmed, judge, slower
from knormpress.measure import pairs
from knormpress.measure.latency import are_precise
from knormpress.measure.options import Effort
from knormpress.records.figures import Latency, Run
from knormpress.records.schema import Entry
from knormpress.stats.intervals import Floats
from tests.entry_factory import make_entry

__all__ = ["MACHINES", "SESSIONS", "Machine", "Session", "alarms", "covers", "seen", "timed", "verdicts"]

_MOST_RUNS = 256
_EFFORT = Effort()


@dataclass(frozen=True)
class Machine:
    """A machine on which a run's time is off by chance; ``draw`` gives that in units of ``spread``, (runs, 2).

    Args:
        draw: from the random numbers, what each run's TTFT and TPOT are off.
        spread: the standard deviation of a pair's log ratio, in %, where ``draw`` has one of 1.
        precision: of the timing, in %.
        most: the pairs that its time is enough for.
        own_drift: by how many % the candidate itself becomes slower from each pair to the next.
    """

    draw: Callable[[np.random.Generator], Floats]
    spread: float = 2.0
    precision: float = _EFFORT.precision
    most: int = 24
    own_drift: float = 0.0


_SHAPE: Final = (_MOST_RUNS, 2)


def _bursts(random: np.random.Generator) -> Floats:
    return np.asarray(random.normal(0, 0.7, _SHAPE) + (random.random(_SHAPE) < 0.1) * random.exponential(6, _SHAPE))


def _climb(random: np.random.Generator) -> Floats:
    return np.asarray(random.normal(0, 0.8, _SHAPE) + 0.5 * np.arange(_MOST_RUNS)[:, None])


def _walk(random: np.random.Generator) -> Floats:
    return np.asarray(random.normal(0, 0.6, _SHAPE) + np.cumsum(random.normal(0, 0.8, _SHAPE), axis=0))


def _normal(random: np.random.Generator) -> Floats:
    return random.normal(0, 1, _SHAPE)


MACHINES: Mapping[str, Machine] = {
    "normal, 1.5 %": Machine(_normal, spread=1.5),
    "normal, 4 %": Machine(_normal, spread=4.0),
    "normal, 2 %, precision 1.5": Machine(_normal, precision=1.5),
    "normal, 4 %, at most 8 pairs": Machine(_normal, spread=4.0, most=8),
    "Student's t, 3 degrees of freedom": Machine(lambda random: random.standard_t(3, _SHAPE) / math.sqrt(3)),
    "Student's t, 2 degrees of freedom": Machine(lambda random: random.standard_t(2, _SHAPE) / 2),
    "a run in ten much slower": Machine(_bursts),
    "the machine becomes steadily slower": Machine(_climb),
    "the machine's speed is a random walk": Machine(_walk),
    "the candidate itself becomes slower": Machine(_normal, own_drift=0.2),
}
"""The machines of the simulation. "Normal, 4 %" has pairs whose ratios have a standard deviation of 4 %."""


@dataclass
class _Clock:
    """A clock that goes on by 1 with each run."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class _Timed:
    """Runs of a machine, in the order in which they are asked for."""

    off: Floats
    clock: _Clock
    own_drift: float
    number: int = 0

    def run(self, ttft_s: float, tpot_s: float, drift: float) -> Run:
        ttft, tpot = np.exp(self.off[self.number] + drift * (self.number // 2))
        self.number += 1
        self.clock.now += 1
        return Run(ttft_s=float(ttft_s * ttft), gaps_s=(float(tpot_s * tpot),))


def timed(
    machine: Machine,
    random: np.random.Generator,
    *,
    change: tuple[float, float] = (0.0, 0.0),
    rounds: int = _EFFORT.rounds,
) -> Latency:
    """Runs in turn until the real rule stops them; TTFT and TPOT change by ``change`` %.

    The prompt takes as long as all further tokens.
    """
    off = machine.draw(random) * machine.spread / 100 / math.sqrt(2)
    made = _Timed(off, _Clock(), machine.own_drift)
    ttft, tpot = (1 + one / 100 for one in change)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs.time, "perf_counter", made.clock)
        (found,) = pairs.in_turn(
            lambda: made.run(1.0, 1.0, 0.0),
            lambda: made.run(ttft, tpot, machine.own_drift / 100),
            rounds=rounds,
            is_precise=lambda pairs: are_precise(pairs, machine.precision),
            seconds=2 * machine.most,
        )
    return Latency(
        baseline=tuple(found.baseline),
        candidate=tuple(found.candidate),
        stopped=found.stopped,
        calibration_s=(1.0, 1.0),
        ttft_cold_s=None,
    )


def covers(machine: Machine, trials: int, seed: int) -> Iterator[tuple[bool, bool, int]]:
    """Whether the intervals of TTFT and TPOT hold the truth, and the number of pairs, for each trial."""
    random = np.random.default_rng(seed)
    for _ in range(trials):
        found = timed(machine, random, change=(0.0, -20.0))
        # What drifts is known by its mean over the pairs that were measured.
        drifted = math.exp(machine.own_drift / 100 * (found.pairs - 1) / 2)
        held = [
            change.low is not None and change.low <= 100 * (true * drifted - 1) <= change.ends[1]
            for change, true in ((found.ttft, 1.0), (found.tpot, 0.8))
        ]
        yield held[0], held[1], found.pairs


@dataclass(frozen=True)
class Session:
    """A pytest session of ``tests`` timed tests, compared with ``stored`` earlier ones.

    ``processes`` is the standard deviation, in %, by which a test's true changes differ from one session to another of
    the same code.
    """

    machine: Machine
    tests: int = 4
    stored: int = 1
    processes: float = 1.0


SESSIONS: Mapping[str, Session] = {
    "quiet: pairs 1.5 %, processes 0.5 %": Session(replace(MACHINES["normal, 1.5 %"], most=6), processes=0.5),
    "quiet, against three stored sessions": Session(
        replace(MACHINES["normal, 1.5 %"], most=6), stored=3, processes=0.5
    ),
    "pairs 4 %, processes 1 %": Session(MACHINES["normal, 4 %"]),
    "pairs 4 %, at most 8, processes 1 %": Session(MACHINES["normal, 4 %, at most 8 pairs"]),
    "the same, against three stored sessions": Session(MACHINES["normal, 4 %, at most 8 pairs"], stored=3),
    "Student's t, 2 degrees of freedom, processes 1 %": Session(MACHINES["Student's t, 2 degrees of freedom"]),
    "a run in ten much slower, processes 1 %": Session(MACHINES["a run in ten much slower"]),
}
"""The sessions of the simulation."""


def verdicts(session: Session, random: np.random.Generator, change: tuple[float, float] = (0.0, 0.0)) -> list[Verdict]:
    """The verdicts on a session whose TTFT and TPOT became slower by ``change`` %, decided as the plugin does."""
    entry = make_entry(parts=("latency",))

    def measured(run: str, true: tuple[float, float]) -> Entry:
        latency = timed(session.machine, random, change=true)
        return entry.model_copy(update={"run": run, "latency": latency})

    def of_one_process(change: tuple[float, float]) -> tuple[float, float]:
        ttft, tpot = (one + random.normal(0, session.processes) for one in change)
        return ttft, tpot

    found = []
    for _ in range(session.tests):
        before = [measured(f"before {number}", of_one_process((0.0, 0.0))) for number in range(session.stored)]
        true = of_one_process(change)
        verdict = judge(before, [measured("now", true)], THRESHOLDS, "")
        if slower(verdict):
            verdict = confirmed(verdict, judge(before, [measured("now", true)], THRESHOLDS, ""))
        found.append(verdict)
    return found


def alarms(session: Session, random: np.random.Generator, sessions: int) -> int:
    """How many of so many sessions of identical code fail."""
    return sum(any(one.word == "regressed" for one in verdicts(session, random)) for _ in range(sessions))


def seen(session: Session, random: np.random.Generator, times: int) -> int:
    """How often a loss of 10 % in TPOT, in one test, fails it."""
    alone = replace(session, tests=1)
    return sum("tpot" in slower(one) for _ in range(times) for one in verdicts(alone, random, (0.0, 10.0)))


def _print_sessions(sessions: int) -> None:
    print("| the sessions | false alarms | TPOT +10 % seen |", "| --- | --- | --- |", sep="\n")
    for name, session in SESSIONS.items():
        random = np.random.default_rng(2)
        shares = [100 * count(session, random, sessions) / sessions for count in (alarms, seen)]
        print(f"| {name} | {shares[0]:.1f} % | {shares[1]:.1f} % |", flush=True)
    print(f"binomial standard error of 1 and 95 %: {', '.join(_error(share, sessions) for share in (0.01, 0.95))} %")


def _error(share: float, trials: int) -> str:
    return f"{100 * math.sqrt(share * (1 - share) / trials):.1f}"


def _print_coverage(trials: int) -> None:
    print("| what the times are like | covered | pairs, median |", "| --- | --- | --- |", sep="\n")
    for name, machine in MACHINES.items():
        found = list(covers(machine, trials, seed=1))
        held = np.mean([one[:2] for one in found])
        print(f"| {name} | {100 * held:.1f} % | {np.median([one[2] for one in found]):.0f} |", flush=True)
    print(f"binomial standard error of a row: {_error(0.95, 2 * trials)} %")


if __name__ == "__main__":
    _print_coverage(trials=5_000)
    _print_sessions(sessions=1_000)

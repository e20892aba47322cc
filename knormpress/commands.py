"""What commands do once their options are read: measure, tell of it on stderr, and when stopped say how to go on."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from knormpress.errors import KnormError
from knormpress.progress import TerminalProgress

if TYPE_CHECKING:
    from knormpress.plan import Plan
    from knormpress.records import Record
    from knormpress.sweep import SweepSettings
    from knormpress.tune import Targets
    from knormpress.verdicts import Verdict

__all__ = ["Stopped", "judge_runs", "measure_cells", "search_plan"]


class Stopped(Exception):
    """The user stopped a command; the message says what is kept and how to go on."""


@contextmanager
def _stoppable(how_to_go_on: str, *, begin: str = "") -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(f"{begin}stopped: {how_to_go_on}") from None


def _again(fresh: bool) -> str:
    return "the same command without --fresh" if fresh else "the same command"


def measure_cells(settings: SweepSettings, path: Path, *, fresh: bool) -> list[Record]:
    """The records of a sweep; ``settings``, ``path`` and ``fresh`` are as for ``sweep.run``.

    Raises:
        Stopped: the user stopped it.
    """
    from knormpress.sweep import run

    stopped = f"finished cells are kept in {path}, and {_again(fresh)} goes on from there"
    with _stoppable(stopped), TerminalProgress() as progress:
        return list(run(settings, path, fresh=fresh, progress=progress))


def search_plan(
    targets: Targets,
    path: Path,
    *,
    model: str | None,
    device: str,
    dtype: str,
    corpus: str | None,
    context: int,
    minutes: float,
    fresh: bool,
) -> Plan:
    """The plan that ``tune.tune`` finds, and leaves at ``path``; where model and text come from is as for a sweep.

    Raises:
        Stopped: the user stopped it.
    """
    from knormpress.bench import Bench
    from knormpress.corpora import load_corpus
    from knormpress.devices import resolve
    from knormpress.tune import tune

    stopped = f"what was measured is kept beside {path}, and {_again(fresh)} goes on from there"
    with _stoppable(stopped), TerminalProgress() as progress:
        text = load_corpus(corpus)
        if text.notice:
            progress.say(text.notice)
        bench = Bench.open(model, text, device=resolve(device), dtype=dtype)
        return tune(bench, targets, path, context=context, minutes=minutes, fresh=fresh, progress=progress)


def judge_runs(
    base: str | None, tests: str, storage: Path, thresholds: Mapping[str, float]
) -> tuple[list[Verdict], list[str], list[str]]:
    """The verdicts on the newest stored run, or on HEAD measured in turn with ``base``.

    Args:
        base: a commit; None judges what is stored.
        tests: with ``base``, what pytest is to run.
        storage: where the runs are.
        thresholds: see ``verdicts.THRESHOLDS``.

    Returns:
        The verdicts, what to know of the stored runs, and which runs of HEAD failed tests.

    Raises:
        KnormError: there is no such commit or no run, or pytest can't run the tests.
        Stopped: the user stopped it.
    """
    from knormpress.history import History, judge_commits, judge_newest
    from knormpress.in_turn import measure_in_turn, resolve_commit

    if base is None:
        history = History.read(storage)
        return judge_newest(history, thresholds), list(history.notes), []
    commits = resolve_commit(base), resolve_commit("HEAD")
    if commits[0] == commits[1]:
        raise KnormError(f"{base} and HEAD are one commit, {commits[0][:12]}; name another")
    before = {entry.run for entry in History.read(storage).entries}
    # Runs of another hour are no pairs: the machine's speed may have moved since.
    stopped = f"runs that ended are kept in {storage}; commits are measured in one go, so the same command starts over"
    with _stoppable(stopped, begin="\n"):  # pytest was stopped amid a line
        faults = measure_in_turn(*commits, shlex.split(tests), storage, lambda text: typer.echo(text, err=True))
    history = History.read(storage).without(before)
    return judge_commits(history, *commits, thresholds), list(history.notes), faults

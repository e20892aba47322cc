"""The work of the commands: measure, show progress on stderr, and say how to continue after a stop."""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from knormpress.errors import KnormError
from knormpress.files import room_for
from knormpress.show.progress import TerminalProgress

if TYPE_CHECKING:
    from knormpress.compare.verdicts import Verdict
    from knormpress.measure.options import Candidates, Effort, Source
    from knormpress.records.plan import Plan
    from knormpress.records.schema import Entry, Record
    from knormpress.tune.search import Targets

__all__ = ["Stopped", "accept_loss", "judge_runs", "measure_cells", "run_tasks", "search_plan", "write_page"]


class Stopped(Exception):
    """The user stopped a command; the message says what is kept and how to continue."""


@contextmanager
def _stoppable(how_to_continue: str, *, begin: str = "") -> Iterator[None]:
    """Turn Ctrl-C into ``Stopped``."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(f"{begin}stopped: {how_to_continue}") from None


def _again(fresh: bool) -> str:
    return "the same command without --fresh" if fresh else "the same command"


def measure_cells(
    candidates: Candidates, effort: Effort, source: Source, path: Path, *, fresh: bool, ray: str | None = None
) -> list[Record]:
    """The records of a sweep, measured now or earlier.

    Args:
        candidates, effort, source: see ``measure.sweep.SweepSettings``.
        path, fresh: see ``measure.sweep.run``.
        ray: the address of a Ray cluster to measure on, see ``measure.cluster.run_on_cluster``; None for this process.

    Raises:
        Stopped: the user stopped the command.
    """
    from knormpress.measure.cluster import run_on_cluster
    from knormpress.measure.sweep import SweepSettings, run

    settings = SweepSettings(candidates, effort, source)
    stopped = f"finished cells are kept in {path}, and {_again(fresh)} continues from there"
    with _stoppable(stopped), TerminalProgress() as progress:
        if ray is not None:
            return run_on_cluster(settings, path, address=ray, fresh=fresh, progress=progress)
        return list(run(settings, path, fresh=fresh, progress=progress))


def search_plan(
    targets: Targets, source: Source, path: Path, *, fresh: bool, ray: str | None = None, **how: Any
) -> Plan:
    """Search for a plan with ``tune.search.tune``, which writes it to ``path``; ``how`` are its other arguments.

    Args:
        targets, path, fresh: see there.
        source: the model and the text.
        ray: the address of a Ray cluster to measure on, see ``tune.cluster.tune_on_cluster``; None for this process.

    Raises:
        KnormError: the name of ``path`` doesn't end in .json, by which ``plot`` and ``report`` recognise a plan.
        Stopped: the user stopped the command.
    """
    if path.suffix != ".json":
        raise KnormError(f"--output is {str(path)!r}; wanted a file whose name ends in .json, such as plan.json")
    from knormpress.tune.cluster import tune_on_cluster
    from knormpress.tune.search import tune
    from knormpress.workload.bench import Bench
    from knormpress.workload.corpora import load_corpus
    from knormpress.workload.devices import resolve

    stopped = f"the measurements are kept beside {path}, and {_again(fresh)} continues from there"
    with _stoppable(stopped), TerminalProgress() as progress:
        if ray is not None:
            return tune_on_cluster(targets, source, path, address=ray, fresh=fresh, progress=progress, **how)
        text = load_corpus(source.corpus)
        if text.notice:
            progress.say(text.notice)
        bench = Bench.open(
            source.model, text, device=source.device_map or resolve(source.one_device), dtype=source.dtype
        )
        return tune(bench, targets, path, fresh=fresh, progress=progress, **how)


def run_tasks(
    names: Sequence[str],
    path: Path,
    *,
    source: Source,
    folder: Path | None,
    few_shot: int | None,
    limit: int | None,
    chat_template: bool,
    **how: Any,
) -> Entry:
    """Run tasks of lm-evaluation-harness through both caches, and add the result to ``path``.

    Args:
        names, folder: see ``lm_eval.run.find_tasks``.
        path: a JSON Lines file.
        source: the model, its device and dtype.
        few_shot, limit, chat_template: see ``lm_eval.run.compare_tasks``.
        how: the method and its policy, see ``lm_eval.model.KnormLM``.

    Raises:
        KnormError: the harness is not installed, or can't run the tasks with this model and method; or ``path`` can't
            be written, which is told before anything is run if it is so already.
        Stopped: the user stopped the command.
    """
    from knormpress.lm_eval import expect_harness

    expect_harness()
    from knormpress.lm_eval.model import KnormLM
    from knormpress.lm_eval.run import compare_tasks, find_tasks
    from knormpress.methods.method import describe_method
    from knormpress.records.jsonl import store_record
    from knormpress.records.schema import Entry
    from knormpress.workload.bench import describe_model
    from knormpress.workload.devices import resolve
    from knormpress.workload.environment import describe_environment
    from knormpress.workload.models import load_model

    manager = find_tasks(names, folder)
    stopped = "nothing is kept, and the same command starts over"
    with room_for(path), _stoppable(stopped), TerminalProgress() as progress:
        device = source.device_map or resolve(source.one_device)
        loaded = load_model(source.model, device=device, dtype=source.dtype)
        asked = KnormLM(loaded.model, tokenizer=loaded.tokenizer, progress=progress, **how)
        tasks, text = compare_tasks(asked, manager, names, few_shot=few_shot, limit=limit, chat_template=chat_template)
        entry = Entry(
            run=uuid.uuid4().hex,
            test=f"knormpress lm-eval {','.join(names)}",
            created=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            environment=describe_environment(*loaded.devices, device_map=loaded.device_map),
            model=describe_model(loaded),
            text=text,
            method=describe_method(asked.method),
            conditions={"few_shot": few_shot, "limit": limit, "prefill_chunk": asked.prefill_chunk},
            lm_eval=tasks,
            passed=True,
        )
        store_record(path, entry, progress)
    return entry


def judge_runs(
    base: str | None, tests: str, storage: Path, thresholds: Mapping[str, float]
) -> tuple[list[Verdict], list[str], list[str]]:
    """The verdicts on the newest stored run, or on HEAD measured in turn with ``base``.

    Args:
        base: a commit; None judges the stored runs.
        tests: with ``base``, the arguments for pytest.
        storage: the folder of the stored runs.
        thresholds: see ``verdicts.THRESHOLDS``.

    Returns:
        The verdicts, notes about the stored runs, and a message for each run of HEAD with failed tests.

    Raises:
        KnormError: there is no such commit or no run, or pytest can't run the tests.
        Stopped: the user stopped the command.
    """
    from knormpress.compare.commits import measure_in_turn, resolve_commit, uncommitted, untracked
    from knormpress.compare.stored import judge_commits, judge_newest
    from knormpress.records.history import History

    if base is None:
        history = History.read(storage)
        return judge_newest(history, thresholds), list(history.notes), []
    changed = uncommitted()
    if changed is not None:
        typer.echo("head is the working tree with its uncommitted changes", err=True)
    left_out = untracked(storage)
    if left_out:
        typer.echo(f"untracked files are left out: {', '.join(left_out[:3])}{', ...' * (len(left_out) > 3)}", err=True)
    commits = resolve_commit(base), changed or resolve_commit("HEAD")
    if commits[0] == commits[1]:
        raise KnormError(f"{base} and HEAD are the same commit, {commits[0][:12]}; name another commit")
    before = {entry.run for entry in History.read(storage).entries}
    # Earlier runs can't be paired with new ones: the machine's speed may have changed.
    stopped = f"finished runs are kept in {storage}, but the same command starts over: commits are measured together"
    with _stoppable(stopped, begin="\n"):  # pytest was stopped in the middle of a line
        faults = measure_in_turn(*commits, shlex.split(tests), storage, lambda text: typer.echo(text, err=True))
    history = History.read(storage).without(before)
    return judge_commits(history, *commits, thresholds), list(history.notes), faults


def accept_loss(test: str, metric: str, why: str, storage: Path, thresholds: str) -> Iterator[str]:
    """Store what ``compare.decided.accept`` decides; yields a line for each test.

    Args:
        test, metric, why: see ``compare.decided.accept``.
        storage: the folder of the stored runs.
        thresholds: see ``verdicts.read_thresholds``.
    """
    from knormpress.compare.decided import accept
    from knormpress.compare.verdicts import read_thresholds
    from knormpress.records.decisions import decide
    from knormpress.records.history import History

    for one in accept(History.read(storage), test, metric, why, read_thresholds(thresholds)):
        decide(storage, one)
        yield f"accepted: {metric} of {one.entry.test}, {one.before} -> {one.now}"


def write_page(files: Sequence[Path], storage: Path, page: Path, markdown: Path | None) -> Sequence[str]:
    """Write a report on ``files`` and the stored runs; returns notes about the stored runs.

    Args:
        files: records of sweeps, runs of ``lm-eval``, and plans (.json).
        storage: pytest-benchmark's storage.
        page, markdown: see ``report.write_report``.
    """
    from knormpress.records.history import History
    from knormpress.records.jsonl import read_entries, read_records
    from knormpress.records.plan import read_plan
    from knormpress.show.page.report import write_report

    plans = [read_plan(path) for path in files if path.suffix == ".json"]
    records: list[Record] = []
    tasks: list[Entry] = []
    for path in files:
        if path.suffix != ".json":
            entries = read_entries(path)
            if entries is None:
                records.extend(read_records(path))
            else:
                tasks.extend(entries)
    history = History.read(storage)
    with TerminalProgress() as progress:
        write_report(records, history, page, markdown, plans=plans, tasks=tasks, progress=progress)
    return history.notes

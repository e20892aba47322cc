"""The grid of a sweep, measured a cell at a time: device x prompt length x policy, each against the full cache.

A cell that the results file holds already is not measured again. It is the same cell when the machine and the software,
the weights and their type, the text, the policy and the conditions are all equal, and the git commit too. Changes that
are not committed are not seen: use ``fresh`` after them.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import Any

from knormpress import bench as benches
from knormpress.bench import Bench
from knormpress.corpora import load_corpus
from knormpress.devices import resolve
from knormpress.errors import KnormError
from knormpress.fingerprints import model_fingerprint
from knormpress.methods import make_method
from knormpress.plan import Plan
from knormpress.press import KnormPress
from knormpress.progress import Progress
from knormpress.records import (
    Conditions,
    Environment,
    ModelInfo,
    Policy,
    Quality,
    Record,
    TextInfo,
    append_record,
    read_records,
)

__all__ = ["SweepSettings", "run"]

_LEAST_SCORED = 32


@dataclass(frozen=True)
class SweepSettings:
    """What to measure.

    Args:
        presses: the policies, each of them a column of the grid.
        method: the method that they are handed to, see ``methods.make_method``.
        samples: documents (>= 1) on which perplexity is measured.
        prompt_tokens: prompt lengths (>= 1), of the timed generations and of the context of scored tokens alike.
        new_tokens: tokens (>= 2) of a timed generation.
        scored_tokens: tokens (>= 1) scored behind each document's context; fewer, but at least 32, where the model has
            no positions for more behind a long prompt.
        rounds: timed pairs (>= 1) of each cell at least.
        precision: half width in % (> 0) of the timings' intervals at which no more pairs are timed.
        seconds: beyond ``rounds``, time (>= 0) after which no more pairs are begun.
        prefill_chunk: tokens (>= 1) of a prompt that a forward pass takes at most; None sends it whole.
        plan: one more policy, that of a plan file.
        model, dtype: see ``models.load_model``.
        corpus: see ``corpora.load_corpus``.
        devices: see ``devices.resolve``.

    Raises:
        KnormError: a value is out of its range, or a prompt is too short for a policy to prune anything.
    """

    presses: tuple[KnormPress, ...]
    method: str = "knorm"
    samples: int = 3
    prompt_tokens: tuple[int, ...] = (1024,)
    new_tokens: int = 32
    scored_tokens: int = 256
    rounds: int = 5
    precision: float = 3.0
    seconds: float = 20.0
    prefill_chunk: int | None = None
    plan: Plan | None = None
    model: str | None = None
    dtype: str = "float32"
    corpus: str | None = None
    devices: tuple[str, ...] = ("auto",)

    def __post_init__(self) -> None:
        if self.plan is not None:
            object.__setattr__(self, "presses", (*self.presses, self.plan.press))
        for name, example in (("presses", "keep ratio 0.9"), ("prompt_tokens", "1024"), ("devices", "cpu")):
            values = tuple(dict.fromkeys(getattr(self, name)))
            if not values:
                raise KnormError(f"{name} is empty; wanted at least one, such as {example}")
            object.__setattr__(self, name, values)
        shortest = min(self.prompt_tokens)
        for name, value, least in (
            ("prompt_tokens", shortest, 1),
            ("samples", self.samples, 1),
            ("scored_tokens", self.scored_tokens, 1),
            ("rounds", self.rounds, 1),
            ("new_tokens", self.new_tokens, 2),
            ("prefill_chunk", self.prefill_chunk, 1),
        ):
            if value is not None and value < least:
                raise KnormError(f"{name} is {value}; wanted at least {least}")
        for name, number in (("precision", self.precision), ("seconds", self.seconds)):
            if not number >= 0:
                raise KnormError(f"{name} is {number}; wanted a number of at least 0")
        for press in self.presses:
            make_method(self.method, press)
            if press.drops and shortest < press.prune_after:
                raise KnormError(
                    f"a prompt of {shortest} tokens is too short to be pruned: pruning begins at prune_after "
                    f"{press.prune_after}; use longer prompts or a smaller prune_after"
                )


def run(
    settings: SweepSettings, path: Path, *, fresh: bool = False, progress: Progress | None = None
) -> Iterator[Record]:
    """Measure every cell that ``path`` does not hold, adding each to the file as soon as it is finished.

    A kill loses the cell under way and the perplexities of those to come, never a finished cell.

    Args:
        settings: the grid.
        path: the JSON Lines file of results, made where it is missing.
        fresh: measure everything anew. The old file is renamed once the first new cell is there to take its place.
        progress: told of every step.

    Yields:
        The record of every cell, measured now or found in the file, in the order device, prompt length, policy.

    Raises:
        KnormError: the file, a device, the model or the text can't be used; the file is left as it is.
    """
    progress = progress or Progress()
    _make_folder(path.parent)
    held = {} if fresh or not path.exists() else {_key(record): record for record in read_records(path)}
    # "cpu" and "cpu:0" are one device.
    devices = {(device.type, device.index or 0): device for device in map(resolve, settings.devices)}.values()
    corpus = load_corpus(settings.corpus)
    if corpus.notice:
        progress.say(corpus.notice)
    steps = _Steps(settings, progress)
    aside = _free_name(path) if fresh and path.exists() else None
    for device in devices:
        steps.begin("loading the model")
        bench = Bench.open(settings.model, corpus, device=device, dtype=settings.dtype)
        _check_presses(settings, bench)
        for prompt_tokens in settings.prompt_tokens:
            for record in _measure(settings, bench, prompt_tokens, held, steps):
                if _key(record) not in held:
                    if aside is not None:
                        path.rename(aside)
                        progress.say(f"the earlier results are now in {aside}")
                        aside = None
                    append_record(path, record)
                yield record


def _measure(
    settings: SweepSettings, bench: Bench, prompt_tokens: int, held: dict[_Key, Record], steps: _Steps
) -> Iterator[Record]:
    """The cells of one device and one prompt length."""
    cells = {press: _before_measuring(settings, bench, press, prompt_tokens) for press in settings.presses}
    pending = [press for press, known in cells.items() if _key_of(**known) not in held]
    steps.leave_out(len(cells) - len(pending))
    chunk = settings.prefill_chunk
    cold_s = None
    qualities: dict[KnormPress, Quality] = {}
    if pending:
        bench.check_length(prompt_tokens + settings.new_tokens)
        scored = _scored_tokens(settings, bench, prompt_tokens)
        texts = bench.documents(length=prompt_tokens + scored + 1, count=settings.samples)
        if scored < settings.scored_tokens:
            steps.progress.say(
                f"behind {prompt_tokens:,} tokens only {scored:,} are scored, not {settings.scored_tokens:,}: "
                f"the model is made for {bench.positions:,} positions"
            )
        prompt = texts[0][:, :prompt_tokens]
        steps.begin("the first call")
        cold_s = benches.cold_ttft(bench, prompt, prefill_chunk=chunk)
        steps.begin("perplexity, all keep ratios at once")
        methods = [make_method(settings.method, press) for press in pending]
        found = benches.quality(
            bench, texts, methods, context=prompt_tokens, prefill_chunk=chunk, after_document=steps.tick
        )
        qualities = dict(zip(pending, found, strict=True))
    for press, known in cells.items():
        if press not in qualities:
            yield held[_key_of(**known)]
            continue
        method = make_method(settings.method, press)
        if press.drops:
            benches.refuse_unpruned(f"method {settings.method!r} at {_ratio(press)}", qualities[press])
        steps.begin(f"memory, {_ratio(press)}")
        memory = benches.memory(bench, prompt, method, prefill_chunk=chunk, after_run=steps.tick)
        steps.begin(f"timing, {_ratio(press)}")
        latency = benches.latency(
            bench,
            prompt,
            method,
            new_tokens=settings.new_tokens,
            rounds=settings.rounds,
            precision=settings.precision,
            seconds=settings.seconds,
            prefill_chunk=chunk,
            cold_s=cold_s,
            after_run=steps.tick_at_most(steps.runs),
        )
        latency = latency.model_copy(update={"weights_tpot_s": benches.weights_tpot(bench, prompt)})
        cold_s = None
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        yield Record(created=created, latency=latency, memory=memory, quality=qualities[press], **known)


def _before_measuring(settings: SweepSettings, bench: Bench, press: KnormPress, prompt_tokens: int) -> dict[str, Any]:
    """The part of a cell's record that is known beforehand, and tells it from other cells."""
    return {
        "environment": bench.environment,
        "model": bench.model_info,
        "text": bench.text_info,
        "policy": Policy(method=settings.method, **press.as_dict()),
        "conditions": Conditions(
            prompt_tokens=prompt_tokens,
            new_tokens=settings.new_tokens,
            prefill_chunk=settings.prefill_chunk,
            rounds=settings.rounds,
            samples=settings.samples,
            context_tokens=prompt_tokens,
            scored_tokens=_scored_tokens(settings, bench, prompt_tokens),
        ),
    }


def _scored_tokens(settings: SweepSettings, bench: Bench, prompt_tokens: int) -> int:
    """As many as were asked for, or as the model has positions for; of too few, ``Bench.documents`` is to complain."""
    room = math.inf if bench.positions is None else bench.positions - prompt_tokens - 1
    return int(room) if _LEAST_SCORED <= room < settings.scored_tokens else settings.scored_tokens


_Key = tuple[Environment, str, str, str, Policy, Conditions]


def _key(record: Record) -> _Key:
    return _key_of(record.environment, record.model, record.text, record.policy, record.conditions)


def _key_of(environment: Environment, model: ModelInfo, text: TextInfo, policy: Policy, conditions: Conditions) -> _Key:
    # Writing results can make a tree dirty, and the same weights and text can come under other names.
    clean = environment.model_copy(update={"git_dirty": None})
    return clean, model.fingerprint, model.dtype, text.sha256, policy, conditions


def _ratio(press: KnormPress) -> str:
    if press.layer_keep_ratios is None:
        return f"keep ratio {press.keep_ratio}"
    return f"a plan of mean keep ratio {statistics.fmean(press.layer_keep_ratios):.3f}"


def _check_presses(settings: SweepSettings, bench: Bench) -> None:
    if settings.plan is not None:
        settings.plan.expect(model_fingerprint(bench.model), "--plan")
    for press in settings.presses:
        if press.drops and min(press.ratios(bench.layers)) == 1.0:
            raise KnormError(
                f"skip_layers {press.skip_layers} names every layer of {bench.model_info.name}, so that nothing would "
                "be pruned; skip fewer"
            )


def _make_folder(folder: Path) -> None:
    """Found out before anything is measured, not when the first cell is to be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KnormError(f"results can't be written to {folder}: {error.strerror}; choose another --output") from error
    if not os.access(folder, os.W_OK):
        raise KnormError(f"results can't be written to {folder}: it is read-only; choose another --output")


def _free_name(path: Path) -> Path:
    """The first of results.1.jsonl, results.2.jsonl, ... that is not there."""
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in count(1))
    return next(name for name in names if not name.exists())


class _Steps:
    """Counts what is done: one step for a generation, a prefill or a document."""

    def __init__(self, settings: SweepSettings, progress: Progress) -> None:
        self.progress = progress
        self.runs = 2 * (settings.rounds + 1)
        self.per_cell = self.runs + 2
        self.documents = settings.samples
        self.cells = len(settings.presses)
        lengths = len(settings.devices) * len(settings.prompt_tokens)
        self.total = lengths * (self.cells * self.per_cell + self.documents)
        self.done = 0
        self.doing = ""

    def begin(self, doing: str) -> None:
        self.doing = doing
        self.progress.step(self.done, self.total, doing)

    def tick(self) -> None:
        self.done += 1
        self.progress.step(self.done, self.total, self.doing)

    def tick_at_most(self, times: int) -> Callable[[], None]:
        """A ``tick`` that counts so often and no more: how many pairs it takes is not known beforehand."""
        left = iter(range(times))

        def tick() -> None:
            if next(left, None) is not None:
                self.tick()

        return tick

    def leave_out(self, cells: int) -> None:
        """Take off the total what ``cells`` of one prompt length, measured already, would have cost."""
        if cells:
            self.progress.say(f"{cells} of {self.cells} cells were measured before and are taken from the file")
            self.total -= cells * self.per_cell + (self.documents if cells == self.cells else 0)
            self.begin(self.doing)

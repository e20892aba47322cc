"""Measure the cells of a sweep: device x prompt length x policy, each compared with the full cache.

The cells of one device and prompt length are measured together and share the full cache's runs. So they can be compared
with each other, too.

A plan has two cells more, for it shortens TTFT only where the prompt comes in another way: in chunks, each of which is
pruned, and behind a context that was pruned and saved before. Their quality is measured through that way too, and the
full cache beside them computes the whole prompt.

A cell that is already in the results file is not measured again. It is the same cell if the machine and the software,
the files of the git commit, the weights and their dtype, the text, the policy and the conditions are all equal.
Changes without a commit are not noticed: use ``fresh`` after them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from knormpress.cache.fingerprint import model_fingerprint
from knormpress.errors import KnormError
from knormpress.measure.cost import can_count, count_full_prefill, measure_cost
from knormpress.measure.latency import cold_ttft, measure_latency, weights_tpot
from knormpress.measure.memory import measure_memory
from knormpress.measure.options import Candidates, Effort, Source
from knormpress.measure.prefill import Way, can_be_reused
from knormpress.measure.quality import decodes_in_few_passes, measure_quality
from knormpress.measure.retrieval import measure_retrieval
from knormpress.measure.steps import Steps
from knormpress.methods.knorm import KnormPress
from knormpress.methods.registry import make_method
from knormpress.policy.plan import shipped_plan
from knormpress.progress import Progress
from knormpress.records.figures import Cost, Latency, Memory, Quality
from knormpress.records.git import tree
from knormpress.records.plan import read_plan
from knormpress.records.results import Results
from knormpress.records.retrieval import Retrieval
from knormpress.records.schema import Conditions, Environment, MethodInfo, ModelInfo, Record, TextInfo
from knormpress.workload.bench import Bench
from knormpress.workload.corpora import load_corpus
from knormpress.workload.devices import resolve
from knormpress.workload.tasks.draw import LENGTHS
from knormpress.workload.tasks.haystack import DEFAULT_TASKS, Haystack, haystacks, named_tasks

__all__ = ["SweepSettings", "measure_length", "run", "tasks_of"]

_LOADING = "loading the model"
_LEAST_SCORED = 32
# Of the further ways of a plan's prompt: tokens in a chunk, and tokens of a question behind a context that is reused.
_CHUNK = 1_024
_QUESTION = 32
# The prompt for which the usual lengths of texts with something to find are made.
_USUAL_PROMPT = 1_024


@dataclass(frozen=True)
class SweepSettings:
    """What to measure: the candidates, how much to measure, and the model and text to measure on.

    Raises:
        KnormError: there is no such method, or a prompt is too short for a policy to prune anything.
    """

    candidates: Candidates = field(default_factory=Candidates)
    effort: Effort = field(default_factory=Effort)
    source: Source = field(default_factory=Source)

    def __post_init__(self) -> None:
        tasks_of(self.effort)
        shortest = min(self.effort.prompt_tokens)
        for press in self.candidates.presses:
            make_method(self.candidates.method, press)
            if press.drops and shortest < press.prune_after:
                raise KnormError(
                    f"a prompt of {shortest} tokens is too short to be pruned: pruning begins at prune_after "
                    f"{press.prune_after}; use longer prompts or a smaller prune_after"
                )


def run(
    settings: SweepSettings, path: Path, *, fresh: bool = False, progress: Progress | None = None
) -> Iterator[Record]:
    """Measure every cell that is not in ``path``; add those of a device and prompt length as soon as they are finished.

    If the process is killed, what was measured of the current prompt length is lost, but no finished cell.

    Args:
        settings: the grid.
        path: the JSON Lines file of results, created if it is missing.
        fresh: measure every cell again. The old file is renamed when the first new cell is finished.
        progress: gets every step.

    Yields:
        The record of every cell, measured now or read from the file, in the order device, prompt length, policy.

    Raises:
        KnormError: the file, a device, the model or the text can't be used; the file is unchanged.
    """
    progress = progress or Progress()
    results = Results(path, fresh=fresh, progress=progress)
    stored = _stored(settings, results.known)
    # "cpu" and "cpu:0" are the same device.
    named = {(device.type, device.index or 0): device for device in map(resolve, settings.source.device)}
    devices = [settings.source.device_map] if settings.source.device_map else named.values()
    corpus = load_corpus(settings.source.corpus)
    if corpus.notice:
        progress.say(corpus.notice)
    steps = None
    for device in devices:
        steps.begin(_LOADING) if steps else progress.step(0, 1, _LOADING)
        bench = Bench.open(settings.source.model, corpus, device=device, dtype=settings.source.dtype)
        if steps is None:
            settings = _with_plan(settings, bench, progress)
            _check_presses(settings, bench)
            cells = [_cells(settings, bench, tokens) for tokens in settings.effort.prompt_tokens]
            lengths = [len(wanted) for wanted in cells] * len(settings.source.device)
            steps = Steps(settings.effort, len(tasks_of(settings.effort)), lengths, progress, _LOADING)
        for wanted in cells:
            records = _measure(settings, bench, wanted, stored, steps)
            for record in records:
                if _key(record) not in stored:
                    results.add(record)
            yield from records


def measure_length(
    settings: SweepSettings, bench: Bench, prompt_tokens: int, known: Iterable[Record], progress: Progress
) -> list[Record]:
    """What ``run`` does for one device and one prompt length, without a file: measure the cells that are not ``known``.

    Args:
        settings: the grid that the length is one of.
        bench: the model on the device, and the text.
        prompt_tokens: the length.
        known: finished cells, of this grid or of others.
        progress: gets every step.

    Returns:
        The record of every cell, new or among ``known``, in the order of the policies.

    Raises:
        KnormError: the model or the text can't be used for this length.
    """
    settings = _with_plan(settings, bench, progress)
    _check_presses(settings, bench)
    wanted = _cells(settings, bench, prompt_tokens)
    steps = Steps(settings.effort, len(tasks_of(settings.effort)), [len(wanted)], progress, "preparing the texts")
    return _measure(settings, bench, wanted, _stored(settings, known), steps)


class _Cell(NamedTuple):
    """What is measured on one device: a policy behind a prompt, and how its caches take that."""

    prompt_tokens: int
    press: KnormPress
    way: Way


def _cells(settings: SweepSettings, bench: Bench, prompt_tokens: int) -> list[_Cell]:
    """Every policy with the prompt as the full cache takes it; then the plan with its further ways."""
    candidates, whole = settings.candidates, Way(settings.effort.prefill_chunk)
    cells = [_Cell(prompt_tokens, press, whole) for press in candidates.presses]
    if candidates.plan is None or candidates.plan == "auto" or candidates.method != "knorm":
        return cells
    planned = KnormPress.of(candidates.plan.press)
    if planned.drops and whole.chunk is None and prompt_tokens >= 2 * _CHUNK:
        cells.append(_Cell(prompt_tokens, planned, Way(_CHUNK)))
    if planned.drops and prompt_tokens >= planned.prune_after + _QUESTION and can_be_reused(bench.model, planned):
        cells.append(_Cell(prompt_tokens, planned, Way(whole.chunk, _QUESTION)))
    return cells


def _measure(
    settings: SweepSettings, bench: Bench, wanted: Sequence[_Cell], stored: dict[_Key, Record], steps: Steps
) -> list[Record]:
    """The records of one device and one prompt length, see ``run``."""
    effort, method_name, prompt_tokens = settings.effort, settings.candidates.method, wanted[0].prompt_tokens
    cells = {cell: _before_measuring(settings, bench, cell) for cell in wanted}
    pending = [cell for cell, known in cells.items() if _key_of(**known) not in stored]
    presses, ways = [cell.press for cell in pending], [cell.way for cell in pending]
    steps.leave_out(len(cells) - len(pending), len(cells))
    chunk = effort.prefill_chunk
    cold_s = None
    qualities: dict[_Cell, Quality] = {}
    retrieved: dict[_Cell, Retrieval] = {}
    if pending:
        bench.check_length(prompt_tokens + effort.new_tokens)
        scored = _scored_tokens(effort, bench, prompt_tokens)
        texts = bench.documents(length=prompt_tokens + scored + 1, count=effort.samples)
        if scored < effort.scored_tokens:
            steps.progress.say(
                f"after {prompt_tokens:,} tokens only {scored:,} are scored, not {effort.scored_tokens:,}: "
                f"the model is made for {bench.positions:,} positions"
            )
        prompt = texts[0][:, :prompt_tokens]
        asked = _haystacks(settings, bench, prompt_tokens, steps.progress)
        if not asked:
            steps.ask_nothing()
        steps.begin("the first call")
        cold_s = cold_ttft(bench.model, prompt, prefill_chunk=chunk)
        steps.begin("perplexity, all keep ratios at once")
        methods = [make_method(method_name, press) for press in presses]
        measured = measure_quality(
            bench.model,
            methods,
            texts,
            context=prompt_tokens,
            prefill_chunk=chunk,
            ways=ways,
            # Other caches would take a pass for each token.
            decoded=all(decodes_in_few_passes(bench.model, method) for method in methods),
            policies=presses,
            after_document=steps.tick,
        )
        qualities = dict(zip(pending, measured, strict=True))
        if asked:
            steps.begin("retrieval, all keep ratios at once")
            found = measure_retrieval(
                bench.model, methods, asked, prefill_chunk=chunk, ways=ways, policies=presses, after_text=steps.tick
            )
            retrieved = dict(zip(pending, found, strict=True))
    figures = _figures(settings, bench, pending, prompt, steps) if pending else {}
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    records = []
    for cell, known in cells.items():
        if cell not in figures:
            records.append(stored[_key_of(**known)])
            continue
        latency, memory, cost = figures[cell]
        latency, cold_s = latency.model_copy(update={"ttft_cold_s": cold_s}), None
        records.append(
            Record(
                created=created,
                latency=latency,
                memory=memory,
                quality=qualities[cell],
                retrieval=retrieved.get(cell),
                cost=cost,
                **known,
            )
        )
    return records


def _figures(
    settings: SweepSettings, bench: Bench, pending: Sequence[_Cell], prompt: Tensor, steps: Steps
) -> dict[_Cell, tuple[Latency, Memory, Cost | None]]:
    """What the cells of one device and one prompt length take; they share what the full cache takes."""
    effort, chunk = settings.effort, settings.effort.prefill_chunk
    methods = [make_method(settings.candidates.method, cell.press) for cell in pending]
    steps.begin("memory, all keep ratios")
    memories = measure_memory(
        bench.model,
        methods,
        prompt,
        prefill_chunk=chunk,
        ways=[cell.way for cell in pending],
        decoded_tokens=effort.new_tokens,
        policies=[cell.press for cell in pending],
        after_run=steps.tick,
    )
    costs: list[Cost | None] = [None] * len(pending)
    if effort.cost and can_count(bench.model):
        steps.begin("counted cost of the full cache")
        full = count_full_prefill(bench.model, prompt, prefill_chunk=chunk)
        for number, (cell, method) in enumerate(zip(pending, methods, strict=True)):
            if cell.way.question is None:  # no operator loads a file
                steps.begin(f"counted cost, {_name(cell)}")
                costs[number] = measure_cost(bench.model, method, prompt, full=full, prefill_chunk=cell.way.chunk)
    steps.begin("timing, all keep ratios in turn")
    latencies = measure_latency(
        bench.model,
        methods,
        prompt,
        new_tokens=effort.new_tokens,
        rounds=effort.rounds,
        precision=effort.precision,
        seconds=effort.seconds,
        prefill_chunk=chunk,
        ways=[cell.way for cell in pending],
        after_run=steps.tick_at_most(steps.runs(len(pending))),
        is_warm=True,  # by what memory was read for
    )
    weights = {"weights_tpot_s": weights_tpot(bench.model, prompt)}
    latencies = [latency.model_copy(update=weights) for latency in latencies]
    return dict(zip(pending, zip(latencies, memories, costs, strict=True), strict=True))


def _before_measuring(settings: SweepSettings, bench: Bench, cell: _Cell) -> dict[str, Any]:
    """The part of a cell's record that is known before measuring, and identifies the cell."""
    effort, (prompt_tokens, press, way) = settings.effort, cell
    return {
        "environment": bench.environment,
        "model": bench.model_info,
        "text": bench.text_info,
        "policy": MethodInfo(method=settings.candidates.method, **press.as_dict()),
        "conditions": Conditions(
            prompt_tokens=prompt_tokens,
            new_tokens=effort.new_tokens,
            prefill_chunk=effort.prefill_chunk,
            rounds=effort.rounds,
            samples=effort.samples,
            context_tokens=prompt_tokens,
            scored_tokens=_scored_tokens(effort, bench, prompt_tokens),
            tasks=tasks_of(effort),
            texts=effort.texts,
            candidate_chunk=None if way.chunk == effort.prefill_chunk else way.chunk,
            reused_tokens=None if way.question is None else prompt_tokens - way.question,
        ),
    }


def tasks_of(effort: Effort) -> tuple[str, ...]:
    """The names of the retrieval tasks that are asked for."""
    return tuple(task.name for task in named_tasks(DEFAULT_TASKS if effort.tasks is None else effort.tasks))


def _haystacks(settings: SweepSettings, bench: Bench, prompt_tokens: int, progress: Progress) -> list[Haystack]:
    """The texts with something to find, about as long as the prompt and long enough to be pruned."""
    effort = settings.effort
    least = max((press.prune_after for press in settings.candidates.presses if press.drops), default=1)
    scaled = (round(length * prompt_tokens / _USUAL_PROMPT) for length in LENGTHS["held-out"])
    lengths = [max(least, length) for length in scaled]
    try:
        tasks = tasks_of(effort)
        return haystacks(bench, tasks, count=effort.texts, lengths=lengths) if tasks else []
    except KnormError as error:
        if effort.tasks is not None:
            raise
        progress.say(f"no retrieval: {error}")
        return []


def _scored_tokens(effort: Effort, bench: Bench, prompt_tokens: int) -> int:
    """``effort.scored_tokens``, or what the model has positions for. If that is too few, ``Bench.documents`` raises."""
    room = math.inf if bench.positions is None else bench.positions - prompt_tokens - 1
    return int(room) if _LEAST_SCORED <= room < effort.scored_tokens else effort.scored_tokens


_Key = tuple[Environment, str, str, str, MethodInfo, Conditions]


def _stored(settings: SweepSettings, known: Iterable[Record]) -> dict[_Key, Record]:
    """The finished cells. One without counted cost is measured again where that is wanted and possible."""
    return {_key(record): record for record in known if record.cost or not settings.effort.cost or _reuses(record)}


def _key(record: Record) -> _Key:
    return _key_of(record.environment, record.model, record.text, record.policy, record.conditions)


def _key_of(
    environment: Environment, model: ModelInfo, text: TextInfo, policy: MethodInfo, conditions: Conditions
) -> _Key:
    # Writing results can make a git tree dirty, and the same weights and text can have different names.
    # A commit that changes no file changes no measurement, and nor does another node of the same kind.
    commit = environment.git_commit
    code = None if commit is None else tree(commit) or commit
    clean = environment.model_copy(update={"git_dirty": None, "git_commit": code, "node": None})
    return clean, model.fingerprint, model.dtype, text.sha256, policy, conditions


def _reuses(record: Record) -> bool:
    return record.conditions.reused_tokens is not None


def _name(cell: _Cell) -> str:
    _, press, way = cell
    chunks = "" if way.chunk is None else f" in chunks of {way.chunk:,}"
    way_of_prompt = chunks if way.question is None else " behind a saved context"
    if press.layer_keep_ratios is None:
        return f"keep ratio {press.keep_ratio}{way_of_prompt}"
    return f"a plan of mean keep ratio {press.mean_keep:.3f}{way_of_prompt}"


def _with_plan(settings: SweepSettings, bench: Bench, progress: Progress) -> SweepSettings:
    """``settings`` with the plan that comes with the package for the model, where one is wanted and can be measured."""
    candidates = settings.candidates
    if candidates.plan != "auto":
        return settings
    path = shipped_plan(model_fingerprint(bench.model)) if candidates.method == "knorm" else None
    plan = None if path is None else read_plan(path)
    if plan is not None and min(settings.effort.prompt_tokens) < plan.press.prune_after:
        plan = None
    elif plan is None and candidates.method == "knorm":
        progress.say(f"no plan: none comes with KnormPress for {bench.model_info.name}; knormpress tune finds one")
    return replace(settings, candidates=replace(candidates, plan=plan))


def _check_presses(settings: SweepSettings, bench: Bench) -> None:
    plan = settings.candidates.plan
    if plan is not None and plan != "auto":
        plan.expect(model_fingerprint(bench.model), "--plan")
    for press in settings.candidates.presses:
        if press.drops and min(press.ratios(bench.layers)) == 1.0:
            raise KnormError(
                f"skip_layers {press.skip_layers} names every layer of {bench.model_info.name}, so nothing would be "
                "pruned; skip fewer layers"
            )

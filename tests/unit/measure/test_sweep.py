"""The grid: which cells are measured, which are found, and what a kill or a wrong setting leaves behind.

One sweep is really measured; what is about the file and the cells alone is tested with figures taken from it.
"""

from __future__ import annotations

import gc
import itertools
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from knormpress import KnormPress
from knormpress.cache.fingerprint import model_fingerprint
from knormpress.compare.settings import group_records
from knormpress.errors import KnormError
from knormpress.measure import latency, sweep
from knormpress.measure.options import Candidates, Effort, Source
from knormpress.measure.quality import score_document
from knormpress.measure.sweep import SweepSettings, run
from knormpress.policy import plan as plan_file
from knormpress.progress import Progress
from knormpress.records import jsonl
from knormpress.records.figures import Quality
from knormpress.records.jsonl import read_records
from knormpress.records.plan import write_plan
from knormpress.records.schema import Record
from knormpress.workload.bench import Bench
from knormpress.workload.corpora import load_corpus
from knormpress.workload.device_map import DeviceMap
from tests.plan_factory import make_plan
from tests.tiny_folder import save_model, save_text


class Told(Progress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[int, int, str]] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def step(self, done: int, total: int, doing: str) -> None:
        self.steps.append((done, total, doing))


def changed(settings: SweepSettings, **values: Any) -> SweepSettings:
    """The settings with other values, each in whatever group has it."""
    groups = {}
    for name in ("candidates", "effort", "source"):
        group = getattr(settings, name)
        mine = {one.name: values.pop(one.name) for one in fields(group) if one.name in values}
        groups[name] = replace(group, **mine)
    assert not values
    return SweepSettings(**groups)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> SweepSettings:
    folder = tmp_path_factory.mktemp("tiny")
    return SweepSettings(
        Candidates(keep_ratios=(1.0, 0.8, 0.3), prune_after=16),
        Effort(
            tasks=(), prompt_tokens=(48,), new_tokens=3, samples=2, rounds=2, seconds=0.0, scored_tokens=16, cost=True
        ),
        Source(model=str(save_model(folder)), device=("cpu",), corpus=str(save_text(folder / "text.txt"))),
    )


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Spare these tests the fixed piece of work before and after each cell, and long collections of garbage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "unfreeze", lambda: None)
        patch.setattr(latency, "calibrate", lambda device: 0.01)
        yield


def opened(settings: SweepSettings) -> Bench:
    source = settings.source
    return Bench.open(source.model, load_corpus(source.corpus), device=torch.device("cpu"), dtype=source.dtype)


def ratios(records: Iterable[Record]) -> list[float]:
    return [record.policy.keep_ratio for record in records]


class Measured(NamedTuple):
    records: list[Record]
    path: Path
    told: Told


@pytest.fixture(scope="module")
def measured(settings: SweepSettings, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """A sweep of three cells as the first measurement of a process."""
    path, told = tmp_path_factory.mktemp("results") / "deep" / "results.jsonl", Told()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "_process_is_cold", True)
        return Measured(list(run(settings, path, progress=told)), path, told)


class MadeUp:
    """Stands in for all that takes time: every cell has the figures of one that was measured."""

    def __init__(self, patch: pytest.MonkeyPatch, record: Record) -> None:
        self.record, self.cells, self.texts = record, 0, []
        patch.setattr(sweep, "cold_ttft", lambda *_, **__: None)
        patch.setattr(sweep, "weights_tpot", lambda *_: 0.001)
        patch.setattr(sweep, "measure_memory", lambda _, methods, *__, **___: [record.memory] * len(methods))
        patch.setattr(sweep, "count_full_prefill", lambda *_, **__: ())
        patch.setattr(sweep, "measure_cost", lambda *_, **__: record.cost)
        patch.setattr(sweep, "measure_latency", self.latency)
        patch.setattr(sweep, "measure_quality", self.quality)

    def latency(self, _model: Any, methods: Sequence[Any], *_: Any, **__: Any) -> Any:
        self.cells += len(methods)
        return [self.record.latency] * len(methods)

    def quality(self, _model: Any, methods: Sequence[Any], texts: Sequence[torch.Tensor], **_: Any) -> list[Quality]:
        self.texts.append([text.shape[-1] for text in texts])
        return [self.record.quality] * len(methods)


@pytest.fixture
def made_up(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    return MadeUp(monkeypatch, measured.records[-1])


def test_every_cell_is_measured_and_written(measured: Measured) -> None:
    records = measured.records
    assert ratios(records) == [1.0, 0.8, 0.3]
    assert list(read_records(measured.path)) == records
    for record in records:
        assert [len(run.gaps_s) for run in record.latency.baseline + record.latency.candidate] == [2] * 4
        assert record.latency.weights_tpot_s is not None
        assert record.latency.weights_tpot_s > 0
        assert len(record.quality.documents) == 2
        for name in ("candidate_nll", "token_kl", "local_nll", "decoded_nll"):
            assert [len(getattr(document, name)) for document in record.quality.documents] == [16, 16]
        assert record.conditions.context_tokens == record.conditions.prompt_tokens == 48
        assert record.policy.prune_after == 16
        assert record.environment.device == "cpu"
        assert record.cost is not None
        assert record.cost.candidate_prefill.attention == record.cost.baseline_prefill.attention > 0
    memory = [record.memory for record in records]
    assert len({use.baseline_cache_bytes for use in memory}) == 1
    assert memory[0].candidate_cache_bytes == memory[0].baseline_cache_bytes
    assert memory[0].candidate_cache_bytes > memory[1].candidate_cache_bytes > memory[2].candidate_cache_bytes


def test_only_the_first_cell_holds_the_first_call_of_the_process(measured: Measured) -> None:
    first, *others = (record.latency.ttft_cold_s for record in measured.records)
    assert first is not None
    assert first > 0
    assert others == [None, None]


def test_all_cells_of_a_length_are_compared_with_the_same_runs(measured: Measured) -> None:
    first, *others = (record.latency.baseline for record in measured.records)
    assert others == [first, first]
    assert len({record.latency.candidate for record in measured.records}) == 3


def test_quality_is_that_of_the_documents_one_by_one(settings: SweepSettings, measured: Measured) -> None:
    bench, low = opened(settings), KnormPress(keep_ratio=0.3, prune_after=16)
    texts = bench.documents(length=48 + 16 + 1, count=2)
    for ids, document in zip(texts, measured.records[-1].quality.documents, strict=True):
        (alone,) = score_document(bench.model, ids, [low], context=48)
        assert document.baseline_nll == pytest.approx(alone.baseline_nll, abs=1e-5)
        assert document.candidate_nll == pytest.approx(alone.candidate_nll, abs=1e-5)
        assert document.kl == pytest.approx(alone.kl, abs=1e-5)
        assert document.kl > 1e-3


def test_steps_go_up_one_by_one_to_the_total(measured: Measured) -> None:
    told = measured.told
    assert told.steps.pop(0)[2] == "loading the model"  # which decides whether a plan is measured too
    done = [step[0] for step in told.steps]
    # 2 documents; for each of 3 cells and the full cache a pass for memory, and a run in 2 rounds
    assert {total for _, total, _ in told.steps} == {2 + 4 * (1 + 2)}
    assert done[-1] == 14
    assert all(after - before in (0, 1) for before, after in itertools.pairwise(done))
    assert "text.txt" in told.lines[0]


def test_the_full_cache_against_itself(settings: SweepSettings, tmp_path: Path) -> None:
    alone = changed(settings, method="full", keep_ratios=(1.0,), rounds=1)
    (record,) = run(alone, tmp_path / "results.jsonl")
    assert record.policy.method == "full"
    for document in record.quality.documents:
        assert document.baseline_nll == document.candidate_nll
        assert document.decoded_nll == ()  # a pass for each token
        assert document.kl == 0.0
        assert document.top1_agreement == 1.0


def test_the_grid_runs_over_prompt_lengths_in_order(settings: SweepSettings, tmp_path: Path, made_up: MadeUp) -> None:
    """And measures a device once that is named twice."""
    grid = changed(settings, keep_ratios=(0.8, 0.3), prompt_tokens=(24, 48), device=("cpu", "cpu:0"))
    records = run(grid, tmp_path / "results.jsonl")
    found = [(record.conditions.prompt_tokens, record.policy.keep_ratio) for record in records]
    assert found == [(24, 0.8), (24, 0.3), (48, 0.8), (48, 0.3)]


def test_no_more_tokens_are_scored_than_the_model_has_positions_for(
    settings: SweepSettings, tmp_path: Path, made_up: MadeUp
) -> None:
    long = changed(settings, keep_ratios=(0.3,), prompt_tokens=(48, 440), samples=1, scored_tokens=100)
    path, told = tmp_path / "results.jsonl", Told()
    records = list(run(long, path, progress=told))
    assert [record.conditions.scored_tokens for record in records] == [100, 512 - 440 - 1]
    assert made_up.texts == [[48 + 100 + 1], [512]]
    (line,) = (line for line in told.lines[1:] if not line.startswith("no plan: "))
    assert all(number in line for number in ("440", "71", "100", "512"))
    assert list(run(long, path)) == records


def test_measured_cells_are_found_again(settings: SweepSettings, measured: Measured, made_up: MadeUp) -> None:
    before, told = measured.path.read_bytes(), Told()
    assert list(run(settings, measured.path, progress=told)) == measured.records
    assert measured.path.read_bytes() == before
    assert any("3 of 3" in line for line in told.lines)
    assert told.steps[-1][:2] == (0, 0)
    assert made_up.cells == 0


def test_a_new_ratio_is_the_only_one_measured(settings: SweepSettings, tmp_path: Path, made_up: MadeUp) -> None:
    path = tmp_path / "results.jsonl"
    (first,) = run(changed(settings, keep_ratios=(0.8,)), path)
    grown = list(run(settings, path))
    assert ratios(grown) == [1.0, 0.8, 0.3]
    assert grown[1] == first
    assert ratios(read_records(path)) == [0.8, 1.0, 0.3]
    assert made_up.cells == 3


@pytest.mark.parametrize(
    "change",
    [
        {"prune_after": 17},
        {"skip_layers": (1,)},
        {"plan": "a policy that keeps the newest token"},
        {"method": "random"},
        {"samples": 1},
        {"rounds": 1},
        {"new_tokens": 4},
        {"scored_tokens": 15},
        {"prompt_tokens": (47,)},
        {"prefill_chunk": 20},
        {"dtype": "bfloat16"},
        {"corpus": "other text"},
        {"model": "other model"},
        {"device": ("auto",), "device_map": DeviceMap("auto", (("cpu", 0),))},
        {"device": ("auto",), "device_map": DeviceMap("auto", (("cpu", 100_000),))},
        {"threads": 7},
    ],
    ids=" ".join,
)
def test_a_cell_under_other_conditions_is_another_cell(
    settings: SweepSettings,
    measured: Measured,
    tmp_path: Path,
    made_up: MadeUp,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
) -> None:
    if "corpus" in change:
        change = {"corpus": str(save_text(tmp_path / "other.txt", seed=1))}
    if "model" in change:
        change = {"model": str(save_model(tmp_path / "other", layers=2))}
    if "plan" in change:
        model = {"name": "tiny", "dtype": "float32", "fingerprint": model_fingerprint(opened(settings).model)}
        change = {"plan": make_plan(press=KnormPress(0.3, 16, keep_recent=1), model=model)}
    path = Path(shutil.copy(measured.path, tmp_path))
    list(run(changed(settings, keep_ratios=(0.3,)), path))
    assert made_up.cells == 0
    if "threads" in change:
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=change["threads"]: threads)
        change = {}
    list(run(changed(settings, keep_ratios=(0.3,), **change), path))
    new = 2 if "plan" in change else 1  # its context is reused too
    assert made_up.cells == new
    assert len(list(read_records(path))) == 3 + new


def test_the_same_weights_and_text_under_other_names_are_the_same_cell(
    settings: SweepSettings, measured: Measured, tmp_path: Path, made_up: MadeUp
) -> None:
    elsewhere, text = save_model(tmp_path / "another name"), save_text(tmp_path / "another.txt")
    moved = changed(settings, model=str(elsewhere), corpus=str(text))
    assert list(run(moved, measured.path)) == measured.records
    assert made_up.cells == 0


def test_a_map_that_spreads_nothing_is_the_same_cell(
    settings: SweepSettings, measured: Measured, made_up: MadeUp
) -> None:
    mapped = changed(settings, device=("auto",), device_map=DeviceMap("auto", (("cpu", 10**9),)))
    assert list(run(mapped, measured.path)) == measured.records
    assert made_up.cells == 0


def test_a_model_that_waits_on_disk_has_the_same_figures(
    settings: SweepSettings, measured: Measured, tmp_path: Path
) -> None:
    """And the same cell is found again."""
    spread = changed(
        settings, keep_ratios=(0.3,), rounds=1, device=("auto",), device_map=DeviceMap("auto", (("cpu", 100_000),))
    )
    path = tmp_path / "results.jsonl"
    (record,) = run(spread, path)
    whole = measured.records[-1]
    assert record.environment.device == "cpu"
    assert "disk: model.layers.1-2" in str(record.environment.device_map)
    assert record.quality == whole.quality
    assert record.memory.candidate_cache_bytes == whole.memory.candidate_cache_bytes
    for side in ("baseline_decode", "candidate_decode", "candidate_prefill"):
        counts, of_whole = getattr(record.cost, side), getattr(whole.cost, side)
        assert counts.flops == of_whole.flops
        assert counts.moved > of_whole.moved  # accelerate brings the weights
    assert list(run(spread, path)) == [record]


def test_a_stop_loses_no_finished_length(settings: SweepSettings, tmp_path: Path, made_up: MadeUp) -> None:
    path, two = tmp_path / "results.jsonl", changed(settings, prompt_tokens=(48, 24))
    stopped = run(two, path)
    first = next(stopped)
    stopped.close()
    before = path.read_bytes()
    assert ratios(read_records(path)) == [1.0, 0.8, 0.3]
    assert next(run(two, path)) == first
    assert made_up.cells == 3
    list(run(two, path))
    assert path.read_bytes().startswith(before)
    assert ratios(read_records(path)) == [1.0, 0.8, 0.3] * 2
    assert made_up.cells == 6


def test_fresh_measures_anew_and_keeps_the_old_file(settings: SweepSettings, tmp_path: Path, made_up: MadeUp) -> None:
    path, two = tmp_path / "results.jsonl", changed(settings, keep_ratios=(0.3,), prompt_tokens=(48, 24))
    for expected in ({"results.jsonl"}, {"results.1.jsonl", "results.jsonl"}):
        list(run(two, path, fresh=True))
        assert {file.name for file in tmp_path.glob("*.jsonl")} == expected
    second = path.read_bytes()
    told = Told()
    stopped = run(two, path, fresh=True, progress=told)
    next(stopped)
    stopped.close()
    assert (tmp_path / "results.2.jsonl").read_bytes() == second
    assert any("results.2.jsonl" in line for line in told.lines)
    # The unfinished sweep goes on without `fresh`, on the new file.
    assert len(list(run(two, path))) == 2
    assert len(list(read_records(path))) == 2
    assert made_up.cells == 6


def test_fresh_leaves_the_old_file_until_there_is_something_new(settings: SweepSettings, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"whatever")
    with pytest.raises(KnormError):
        list(run(changed(settings, samples=1000), path, fresh=True))
    assert [file.name for file in tmp_path.iterdir()] == ["results.jsonl"]
    assert path.read_bytes() == b"whatever"


def test_a_file_cut_in_half_is_an_error_and_stays_as_it_is(
    settings: SweepSettings, measured: Measured, tmp_path: Path, made_up: MadeUp
) -> None:
    path = tmp_path / "results.jsonl"
    cut = measured.path.read_bytes()[:-100]
    path.write_bytes(cut)
    with pytest.raises(KnormError, match=r"results\.jsonl line 3 .*--fresh"):
        list(run(settings, path))
    assert path.read_bytes() == cut
    assert len(list(run(settings, path, fresh=True))) == 3
    assert (tmp_path / "results.1.jsonl").read_bytes() == cut


def test_a_folder_that_is_a_file_is_told_of_before_anything_is_measured(
    settings: SweepSettings, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KnormError, match=r"written to .*file.*another place"):
        next(run(changed(settings, model="not looked at"), tmp_path / "file" / "results.jsonl"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_tokens": (48, 15)}, "15 tokens .*prune_after 16"),
        ({"method": "nothing"}, "'nothing'"),
        ({"method": "full"}, "keeps every token.* 0.8"),
    ],
)
def test_wrong_settings_are_refused_when_made(settings: SweepSettings, change: dict[str, Any], message: str) -> None:
    with pytest.raises(KnormError, match=message):
        changed(settings, **change)


def test_a_prompt_below_prune_after_is_fine_if_nothing_is_to_be_pruned(settings: SweepSettings) -> None:
    assert changed(settings, keep_ratios=(1.0,), prompt_tokens=(8,)).effort.prompt_tokens == (8,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep_ratios": (1.0,), "skip_layers": (3,)}, "skip_layers .*layer 3.* 3 layers"),
        ({"keep_ratios": (0.3,), "skip_layers": (0, 1, -1)}, r"skip_layers \(0, 1, -1\) .*every layer"),
        ({"samples": 500}, "4,000 tokens"),
        ({"prompt_tokens": (500,)}, "512 positions.* 517"),
        # Room for 31 tokens to score, which is too few to settle for.
        ({"prompt_tokens": (480,), "scored_tokens": 100}, "512 positions.* 581"),
        ({"new_tokens": 480}, "512 positions.* 528"),
        ({"corpus": "no such file.txt"}, "no such file.txt"),
        ({"model": "./no/such/model"}, "no/such/model"),
        ({"device": ("cpu", "cuda:77")}, "cuda:77"),
        ({"plan": make_plan(press=KnormPress(0.3, 16))}, "--plan .*0123abcd"),
    ],
)
def test_what_can_not_be_measured_is_told_of_and_writes_nothing(
    settings: SweepSettings, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "results.jsonl"
    with pytest.raises(KnormError, match=message):
        list(run(changed(settings, **change), path))
    assert not path.exists()


def test_a_method_that_never_prunes_is_refused(
    settings: SweepSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "never_prunes.py").write_text(
        "from knormpress.methods.full import FullCache\n\n\ndef idle(press):\n    return FullCache()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KnormError, match=r"FullCache.* what the full cache does"):
        list(run(changed(settings, method="never_prunes:idle", keep_ratios=(0.8,)), tmp_path / "results.jsonl"))
    assert not (tmp_path / "results.jsonl").exists()


@pytest.fixture
def _in_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    git("init", "-q")
    (tmp_path / "code.py").write_text("a = 1\n")
    git("add", "code.py")
    git("commit", "-qm", "one")


def git(*arguments: str) -> None:
    who = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
    subprocess.run(["git", *who, *arguments], check=True, capture_output=True)


@pytest.mark.usefixtures("_in_a_repository")
def test_a_commit_makes_other_cells_but_an_edit_does_not(
    settings: SweepSettings, tmp_path: Path, made_up: MadeUp
) -> None:
    alone, path = changed(settings, keep_ratios=(0.3,)), tmp_path / "results.jsonl"
    list(run(alone, path))
    (tmp_path / "code.py").write_text("a = 2\n")
    list(run(alone, path))
    assert made_up.cells == len(list(read_records(path))) == 1
    git("commit", "-qam", "two")
    list(run(alone, path))
    assert made_up.cells == len(list(read_records(path))) == 2


@pytest.mark.usefixtures("_in_a_repository")
def test_a_commit_that_changes_no_file_makes_no_other_cells(
    settings: SweepSettings, tmp_path: Path, made_up: MadeUp
) -> None:
    alone, path = changed(settings, keep_ratios=(0.3,)), tmp_path / "results.jsonl"
    list(run(alone, path))
    git("commit", "-q", "--allow-empty", "-m", "empty")
    list(run(alone, path))
    assert made_up.cells == len(list(read_records(path))) == 1


@pytest.mark.usefixtures("made_up")
def test_what_a_full_disk_does_not_take_is_shown(
    settings: SweepSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, record: Record) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jsonl, "append_record", full)
    told = Told()
    with pytest.raises(KnormError, match=r"results\.jsonl.*No space left"):
        list(run(changed(settings, keep_ratios=(0.3,)), tmp_path / "results.jsonl", progress=told))
    assert Record.model_validate_json(told.lines[-1]).keep_ratio == 0.3


def test_usual_tasks_that_a_model_can_not_have_are_left_out_and_named_ones_are_an_error(
    settings: SweepSettings, tmp_path: Path, made_up: MadeUp
) -> None:
    path, told = tmp_path / "results.jsonl", Told()
    (record,) = run(changed(settings, keep_ratios=(0.3,), tasks=None), path, progress=told)
    assert record.retrieval is None
    assert any(line.startswith("no retrieval: ") for line in told.lines)
    assert told.steps[-1][1] == 2 + (2 + 4)
    # The cell is the same cell when it is asked for again.
    assert list(run(changed(settings, keep_ratios=(0.3,), tasks=None), path)) == [record]
    for tasks, expected in ((("json",), "json"), (("haystack",), "no task 'haystack'")):
        with pytest.raises(KnormError, match=expected):
            list(run(changed(settings, keep_ratios=(0.3,), tasks=tasks), tmp_path / "other.jsonl"))
    assert not (tmp_path / "other.jsonl").exists()


def test_a_plan_is_measured_in_chunks_and_behind_a_saved_context_too(
    settings: SweepSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    """Beside the full cache that computes the whole prompt; with the quality of that way, and cells of their own."""
    monkeypatch.setattr(sweep, "_CHUNK", 24)
    bench = opened(settings)
    press = KnormPress(layer_keep_ratios=(0.5, 0.25, 0.5), prune_after=16)
    model = {"name": "tiny", "dtype": "float32", "fingerprint": model_fingerprint(bench.model)}
    planned = changed(settings, keep_ratios=(0.8,), plan=make_plan(press=press, model=model), rounds=1)
    path, told = tmp_path / "results.jsonl", Told()
    records = list(run(planned, path, progress=told))
    assert told.steps[-1][0] == told.steps[-1][1]
    assert [record.way for record in records] == ["", "", "in chunks", "reused"]
    uniform, whole, chunked, reused = records
    assert chunked.conditions.candidate_chunk == 24
    assert reused.conditions.reused_tokens == 48 - 32
    assert group_records(reversed(records)) == [records]
    # A saved context is bit for bit the plan's own, and one in chunks is not.
    documents = [document.model_copy(update={"decoded_nll": ()}) for document in whole.quality.documents]
    assert list(reused.quality.documents) == documents
    baseline = [document.baseline_nll for document in whole.quality.documents]
    assert [document.baseline_nll for document in chunked.quality.documents] == baseline
    (ids, *_) = bench.documents(length=48 + 16 + 1, count=2)
    (alone,) = score_document(bench.model, ids, [press], context=48, prefill_chunk=24)
    assert chunked.quality.documents[0].candidate_nll == pytest.approx(alone.candidate_nll, abs=1e-5)
    assert chunked.quality.documents[0].candidate_nll != whole.quality.documents[0].candidate_nll
    for record in (chunked, reused):
        assert record.memory.baseline_cache_bytes == uniform.memory.baseline_cache_bytes
        assert record.memory.candidate_cache_bytes < uniform.memory.candidate_cache_bytes
    assert chunked.cost is not None
    assert reused.cost is None

    made_up = MadeUp(monkeypatch, measured.records[-1])
    assert list(run(planned, path)) == records
    assert made_up.cells == 0
    for change, ways in (
        ({"prefill_chunk": 20}, ["", "", "reused"]),
        ({"prompt_tokens": (47,)}, ["", ""]),
        ({"keep_ratios": (1.0,), "plan": make_plan(press=KnormPress(1.0, 16), model=model)}, [""]),
        ({"method": "random"}, ["", ""]),
    ):
        other = run(changed(planned, **change), tmp_path / "other.jsonl")
        assert [record.way for record in other] == ways


def test_the_plan_that_comes_with_the_package_is_measured_beside_the_ratios(
    settings: SweepSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_up: MadeUp
) -> None:
    """For its model, with key norms, and behind prompts that it prunes; in one table with the ratios."""
    corpus = load_corpus(settings.source.corpus)
    bench = Bench.open(settings.source.model, corpus, device=torch.device("cpu"), dtype="float32")
    layers = bench.layers
    press = KnormPress(layer_keep_ratios=(0.5,) * layers, prune_after=16, layer_scores=("keydiff",) * layers)
    model = {"name": "tiny", "dtype": "float32", "fingerprint": model_fingerprint(bench.model)}
    monkeypatch.setattr(plan_file, "_SHIPPED", tmp_path / "plans")
    plan = make_plan(press=press, model=model, frontier=(), sensitivities=None, kept=None)
    write_plan(plan, tmp_path / "plans" / "a.json")

    def planned(path: str, **how: Any) -> list[bool]:
        chosen = changed(settings, **{"keep_ratios": (1.0, 0.3), **how})
        records = list(run(chosen, tmp_path / path))
        assert all(len(group) == len(records) for group in group_records(records))
        return [record.policy.layer_scores is not None for record in records]

    assert planned("1.jsonl", prompt_tokens=(47,)) == [False, False, True]
    assert planned("2.jsonl", plan=None) == [False, False]
    assert planned("3.jsonl", method="random") == [False, False]
    assert planned("4.jsonl", prompt_tokens=(15,), keep_ratios=(1.0,)) == [False]

"""The grid: which cells are measured, which are found, and what a kill or a wrong setting leaves behind."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from knormpress import bench
from knormpress.bench import Bench
from knormpress.corpora import load_corpus
from knormpress.environment import describe_environment
from knormpress.errors import KnormError
from knormpress.methods import FullCache
from knormpress.metrics import score_document
from knormpress.press import KnormPress
from knormpress.progress import Progress
from knormpress.records import Record, read_records
from knormpress.sweep import SweepSettings, run
from tests.tiny_folder import save_model, save_text

CPU = torch.device("cpu")
LOW = KnormPress(keep_ratio=0.3, prune_after=16)
HIGH = KnormPress(keep_ratio=0.8, prune_after=16)
WHOLE = KnormPress(keep_ratio=1.0, prune_after=16)


class Told(Progress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[int, int, str]] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def step(self, done: int, total: int, doing: str) -> None:
        self.steps.append((done, total, doing))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """For a model this small a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_text(path / "text.txt")
    return save_model(path)


@pytest.fixture
def settings(folder: Path) -> SweepSettings:
    return SweepSettings(
        presses=(WHOLE, HIGH, LOW),
        samples=2,
        prompt_tokens=(48,),
        new_tokens=3,
        scored_tokens=16,
        rounds=2,
        seconds=0.0,
        model=str(folder),
        corpus=str(folder / "text.txt"),
        devices=("cpu",),
    )


def opened(settings: SweepSettings) -> Bench:
    return Bench.open(settings.model, load_corpus(settings.corpus), device=CPU, dtype=settings.dtype)


def ratios(records: Iterator[Record] | list[Record]) -> list[float]:
    return [record.policy.keep_ratio for record in records]


def test_every_cell_is_measured_and_written(settings: SweepSettings, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    records = list(run(settings, path))
    assert ratios(records) == [1.0, 0.8, 0.3]
    assert list(read_records(path)) == records
    for record in records:
        assert [len(run.gaps_s) for run in record.latency.baseline + record.latency.candidate] == [2] * 4
        assert len(record.quality.documents) == 2
        assert [len(document.candidate_nll) for document in record.quality.documents] == [16, 16]
        assert record.conditions.context_tokens == record.conditions.prompt_tokens == 48
        assert record.policy.prune_after == 16
        assert record.environment.device == "cpu"
    memory = [record.memory for record in records]
    assert len({use.baseline_cache_bytes for use in memory}) == 1
    assert memory[0].candidate_cache_bytes == memory[0].baseline_cache_bytes
    assert memory[0].candidate_cache_bytes > memory[1].candidate_cache_bytes > memory[2].candidate_cache_bytes


def test_quality_is_that_of_the_documents_one_by_one(settings: SweepSettings, tmp_path: Path) -> None:
    *_, record = run(settings, tmp_path / "results.jsonl")
    bench = opened(settings)
    texts = bench.documents(length=48 + 16 + 1, count=2)
    for ids, document in zip(texts, record.quality.documents, strict=True):
        alone = score_document(bench.model, ids, FullCache(), [LOW], context=48)
        assert document.baseline_nll == pytest.approx(alone.baseline_nll, abs=1e-5)
        assert document.candidate_nll == pytest.approx(alone.candidates[0].nll, abs=1e-5)
        assert document.kl == pytest.approx(alone.candidates[0].kl, abs=1e-5)
        assert document.kl > 1e-3


def test_grid_runs_over_prompt_lengths_in_order(settings: SweepSettings, tmp_path: Path) -> None:
    settings = replace(settings, presses=(HIGH, LOW), prompt_tokens=(24, 48), samples=1, rounds=1)
    records = list(run(settings, tmp_path / "results.jsonl"))
    found = [(record.conditions.prompt_tokens, record.policy.keep_ratio) for record in records]
    assert found == [(24, 0.8), (24, 0.3), (48, 0.8), (48, 0.3)]


def test_no_more_tokens_are_scored_than_the_model_has_positions_for(settings: SweepSettings, tmp_path: Path) -> None:
    settings = replace(settings, presses=(LOW,), prompt_tokens=(48, 440), samples=1, rounds=1, scored_tokens=100)
    path, told = tmp_path / "results.jsonl", Told()
    records = list(run(settings, path, progress=told))
    assert [record.conditions.scored_tokens for record in records] == [100, 512 - 440 - 1]
    assert [len(record.quality.documents[0].candidate_nll) for record in records] == [100, 71]
    expected = "behind 440 tokens only 71 are scored, not 100: the model is made for 512 positions"
    assert told.lines[1:] == [expected]
    assert list(run(settings, path)) == records


def test_the_weights_alone_are_timed_in_every_cell(settings: SweepSettings, tmp_path: Path) -> None:
    for record in run(replace(settings, samples=1, rounds=1), tmp_path / "results.jsonl"):
        assert record.latency.weights_tpot_s is not None
        assert record.latency.weights_tpot_s > 0


def test_the_weights_are_timed_behind_an_almost_empty_cache(settings: SweepSettings) -> None:
    opened_bench, fed = opened(settings), []
    (prompt,) = opened_bench.documents(length=200, count=1)

    def look(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The last pass waits, as a machine does now and then: the median must not notice.
        cache = kwargs["past_key_values"]
        fed.append((kwargs["input_ids"].shape[1], cache.get_seq_length()))
        time.sleep(0.5 if len(fed) == 16 else 0.0)

    with opened_bench.model.register_forward_pre_hook(look, with_kwargs=True):
        weights_s = bench.weights_tpot(opened_bench, prompt)
    assert fed == [(16, 0), *((1, stored) for stored in range(16, 31))]
    assert 0 < weights_s < 0.5 / 15


def test_only_the_first_call_of_the_process_is_cold(
    settings: SweepSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_process_is_cold", True)
    settings = replace(settings, presses=(WHOLE, LOW), rounds=1, samples=1)
    first, second = (record.latency.ttft_cold_s for record in run(settings, tmp_path / "a.jsonl"))
    assert first is not None
    assert first > 0
    assert second is None
    assert [record.latency.ttft_cold_s for record in run(settings, tmp_path / "b.jsonl")] == [None, None]


def test_measured_cells_are_found_again(settings: SweepSettings, tmp_path: Path) -> None:
    path, told = tmp_path / "results.jsonl", Told()
    first = list(run(settings, path))
    before = path.read_bytes()
    assert list(run(settings, path, progress=told)) == first
    assert path.read_bytes() == before
    assert any("3 of 3 cells were measured before" in line for line in told.lines)
    assert told.steps[-1][:2] == (0, 0)


def test_a_new_ratio_is_the_only_one_measured(settings: SweepSettings, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first = list(run(replace(settings, presses=(HIGH,)), path))
    grown = list(run(settings, path))
    assert ratios(grown) == [1.0, 0.8, 0.3]
    assert grown[1] == first[0]
    assert ratios(list(read_records(path))) == [0.8, 1.0, 0.3]


@pytest.mark.parametrize(
    "change",
    [
        {"presses": (replace(HIGH, prune_after=17),)},
        {"presses": (replace(HIGH, skip_layers=(1,)),)},
        {"presses": (replace(HIGH, keep_recent=1),)},
        {"method": "random"},
        {"samples": 2},
        {"rounds": 2},
        {"new_tokens": 4},
        {"scored_tokens": 15},
        {"prompt_tokens": (47,)},
        {"prefill_chunk": 20},
        {"dtype": "bfloat16"},
        {"corpus": "other text"},
        {"model": "other model"},
        {"threads": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_cell_under_other_conditions_is_another_cell(
    settings: SweepSettings, tmp_path: Path, change: dict[str, Any]
) -> None:
    settings = replace(settings, presses=(HIGH,), samples=1, rounds=1)
    path = tmp_path / "results.jsonl"
    list(run(settings, path))
    if "corpus" in change:
        change = {"corpus": str(save_text(tmp_path / "other.txt", seed=1))}
    if "model" in change:
        change = {"model": str(save_model(tmp_path / "other", layers=2))}
    if "threads" in change:
        torch.set_num_threads(change["threads"])
        change = {}
    try:
        list(run(replace(settings, **change), path))
    finally:
        torch.set_num_threads(1)
    assert len(list(read_records(path))) == 2


def test_the_same_weights_and_text_under_other_names_are_the_same_cell(settings: SweepSettings, tmp_path: Path) -> None:
    settings = replace(settings, presses=(HIGH,), samples=1, rounds=1)
    path = tmp_path / "results.jsonl"
    (first,) = run(settings, path)
    elsewhere = save_model(tmp_path / "another name")
    save_text(tmp_path / "another.txt")
    moved = replace(settings, model=str(elsewhere), corpus=str(tmp_path / "another.txt"))
    assert list(run(moved, path)) == [first]


def test_a_stop_loses_no_finished_cell(settings: SweepSettings, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    sweep = run(settings, path)
    first = next(sweep)
    sweep.close()
    before = path.read_bytes()
    assert list(read_records(path)) == [first]
    assert next(run(settings, path)) == first
    list(run(settings, path))
    assert path.read_bytes().startswith(before)
    assert ratios(list(read_records(path))) == [1.0, 0.8, 0.3]


def test_fresh_measures_anew_and_keeps_the_old_file(settings: SweepSettings, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    settings = replace(settings, presses=(HIGH, LOW), rounds=1, samples=1)
    for expected in (["results.jsonl"], ["results.1.jsonl", "results.jsonl"]):
        list(run(settings, path, fresh=True))
        assert sorted(file.name for file in tmp_path.iterdir()) == expected
    second = path.read_bytes()
    told = Told()
    sweep = run(settings, path, fresh=True, progress=told)
    next(sweep)
    sweep.close()
    assert (tmp_path / "results.2.jsonl").read_bytes() == second
    assert any("results.2.jsonl" in line for line in told.lines)
    # The unfinished sweep goes on without `fresh`, on the new file.
    assert len(list(run(settings, path))) == 2
    assert len(list(read_records(path))) == 2


def test_fresh_leaves_the_old_file_until_there_is_something_new(settings: SweepSettings, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"whatever")
    with pytest.raises(KnormError):
        list(run(replace(settings, samples=1000), path, fresh=True))
    assert [file.name for file in tmp_path.iterdir()] == ["results.jsonl"]
    assert path.read_bytes() == b"whatever"


def test_a_file_cut_in_half_is_an_error_and_stays_as_it_is(settings: SweepSettings, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    settings = replace(settings, presses=(HIGH, LOW), rounds=1, samples=1)
    list(run(settings, path))
    cut = path.read_bytes()[:-100]
    path.write_bytes(cut)
    with pytest.raises(KnormError, match=r"results\.jsonl line 2 is not a whole record"):
        list(run(settings, path))
    assert path.read_bytes() == cut
    assert len(list(run(settings, path, fresh=True))) == 2
    assert (tmp_path / "results.1.jsonl").read_bytes() == cut


def test_a_folder_that_is_a_file_is_told_of_before_anything_is_measured(
    settings: SweepSettings, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KnormError, match=r"results can't be written to .*file"):
        next(run(replace(settings, model="not looked at"), tmp_path / "file" / "results.jsonl"))


def test_steps_go_up_one_by_one_to_the_total(settings: SweepSettings, tmp_path: Path) -> None:
    told = Told()
    list(run(settings, tmp_path / "results.jsonl", progress=told))
    done = [step[0] for step in told.steps]
    # 2 documents, and for each of 3 cells 2 memory passes and 2 runs in each of 2 rounds and a warm-up
    assert {total for _, total, _ in told.steps} == {2 + 3 * (2 + 6)}
    assert done[-1] == 26
    assert all(after - before in (0, 1) for before, after in itertools.pairwise(done))
    assert "text.txt" in told.lines[0]


def test_documents_begin_as_the_models_texts_do(settings: SweepSettings) -> None:
    bench = opened(settings)
    first, second = bench.documents(length=40, count=2)
    assert first.shape == second.shape == (1, 40)
    assert first[0, 0] == second[0, 0] == 0
    text = Path(settings.corpus or "").read_text()
    assert bench.ids.shape == (len(text),)
    assert torch.equal(first[0, 1:], bench.ids[:39])
    assert 0 not in bench.ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"presses": ()}, "presses is empty"),
        ({"prompt_tokens": ()}, "prompt_tokens is empty"),
        ({"devices": ()}, "devices is empty"),
        ({"samples": 0}, "samples is 0; wanted at least 1"),
        ({"rounds": 0}, "rounds is 0; wanted at least 1"),
        ({"new_tokens": 1}, "new_tokens is 1; wanted at least 2"),
        ({"scored_tokens": 0}, "scored_tokens is 0; wanted at least 1"),
        ({"prompt_tokens": (48, 0)}, "prompt_tokens is 0; wanted at least 1"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0; wanted at least 1"),
        ({"prompt_tokens": (48, 15)}, "15 tokens is too short to be pruned: pruning begins at prune_after 16"),
        ({"method": "nothing"}, "no method 'nothing'"),
        ({"method": "full"}, "keeps every token"),
    ],
)
def test_wrong_settings_are_refused_when_made(settings: SweepSettings, change: dict[str, Any], message: str) -> None:
    with pytest.raises(KnormError, match=message):
        replace(settings, **change)


def test_a_prompt_below_prune_after_is_fine_when_nothing_is_to_be_pruned(settings: SweepSettings) -> None:
    assert replace(settings, presses=(WHOLE,), prompt_tokens=(8,)).prompt_tokens == (8,)


def test_repeated_values_are_one_cell(settings: SweepSettings) -> None:
    assert replace(settings, presses=(HIGH, LOW, HIGH), prompt_tokens=(48, 48)).presses == (HIGH, LOW)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"presses": (replace(WHOLE, skip_layers=(3,)),)}, "skip_layers names layer 3, but the model has 3 layers"),
        ({"presses": (replace(LOW, skip_layers=(0, 1, -1)),)}, "names every layer .* nothing would be pruned"),
        ({"samples": 500}, "the text has 4,000 tokens"),
        ({"prompt_tokens": (500,)}, "made for 512 positions, but .* take 517"),
        # Room for 31 tokens to score, which is too few to settle for.
        ({"prompt_tokens": (480,), "scored_tokens": 100}, "made for 512 positions, but .* take 581"),
        ({"new_tokens": 480}, "made for 512 positions, but .* take 528"),
        ({"corpus": "no such file.txt"}, "no such file.txt"),
        ({"model": "./no/such/model"}, "no/such/model"),
        ({"devices": ("cpu", "cuda:77")}, "cuda:77"),
    ],
)
def test_what_can_not_be_measured_is_told_of_and_writes_nothing(
    settings: SweepSettings, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "results.jsonl"
    with pytest.raises(KnormError, match=message):
        list(run(replace(settings, **change), path))
    assert not path.exists()


def test_a_method_that_never_prunes_is_refused(
    settings: SweepSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "idle_method.py").write_text(
        "from knormpress.methods import FullCache\n\n\ndef idle(press):\n    return FullCache()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KnormError, match=r"'idle_method:idle' at keep ratio 0\.8 predicts exactly"):
        list(run(replace(settings, method="idle_method:idle", presses=(HIGH,)), tmp_path / "results.jsonl"))
    sys.modules.pop("idle_method", None)
    assert not (tmp_path / "results.jsonl").exists()


def test_full_cache_against_itself(settings: SweepSettings, tmp_path: Path) -> None:
    (record,) = run(replace(settings, method="full", presses=(WHOLE,)), tmp_path / "results.jsonl")
    assert record.policy.method == "full"
    for document in record.quality.documents:
        assert document.baseline_nll == document.candidate_nll
        assert document.kl == 0.0
        assert document.top1_agreement == 1.0


def test_commit_is_that_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    outside = describe_environment(CPU)
    assert (outside.git_commit, outside.git_dirty) == (None, None)

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
        return subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "code.py").write_text("a = 1\n")
    git("add", ".")
    git("commit", "-qm", "one")
    (tmp_path / "results.jsonl").write_text("")
    inside = describe_environment(CPU)
    assert inside.git_commit == git("rev-parse", "HEAD")
    assert inside.git_dirty is False
    (tmp_path / "code.py").write_text("a = 2\n")
    assert describe_environment(CPU).git_dirty is True


def test_a_commit_makes_other_cells_but_an_edit_does_not(
    settings: SweepSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(settings, presses=(HIGH,), samples=1, rounds=1)
    path = tmp_path / "results.jsonl"
    monkeypatch.chdir(tmp_path)

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
        subprocess.run(["git", *who, *arguments], check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "code.py").write_text("a = 1\n")
    git("add", "code.py")
    git("commit", "-qm", "one")
    list(run(settings, path))
    (tmp_path / "code.py").write_text("a = 2\n")
    list(run(settings, path))
    assert len(list(read_records(path))) == 1
    git("commit", "-qam", "two")
    list(run(settings, path))
    assert len(list(read_records(path))) == 2

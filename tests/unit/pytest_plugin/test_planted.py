"""Known losses planted into a stranger's tests: each is seen by the tests that measure it, and changes nothing else."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
import torch

from knormpress import KnormPress
from knormpress.measure.losses import LOSSES
from knormpress.workload.models import load_model
from tests.record_factory import make_retrieval
from tests.unit.conftest import Run
from tests.unit.pytest_plugin.conftest import Stored

TESTS = """
def test_bytes(knorm_memory, knorm_method):
    knorm_memory(knorm_method, prompt_tokens=120)


def test_cost(knorm_cost, knorm_method):
    knorm_cost(knorm_method, prompt_tokens=120, new_tokens=2)


def test_quality(knorm_gate, knorm_method):
    knorm_gate(knorm_method, context=120, scored=24)
"""

METHODS = """
from contextlib import contextmanager
from transformers import DynamicCache


def plain(press):
    @contextmanager
    def method(model):
        yield lambda: DynamicCache(config=model.config)
    return method
"""


class Planted:
    """Runs tests with a loss, compared with a sound run before."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder

    def __call__(self, loss: str | None, *tests: str, source: str = TESTS, **options: object) -> dict[str, str]:
        """What the tests came to: the word, and the reason behind a colon."""
        asked, outcomes = self.folder / "asked", self.folder / "outcomes"
        named = [f"test_it.py::{test}[cpu-0.5]" for test in tests] or None
        asked.write_text(json.dumps({"loss": loss, "tests": named}))
        own = ("-p", "knormpress.pytest_plugin.planted", f"--knorm-asked={asked}", f"--knorm-outcomes={outcomes}")
        self.run(source, "--knorm-compare", *own, ppl_tolerance="1e6", **options)
        told = json.loads(outcomes.read_text())
        return {test.partition("::")[2].partition("[")[0]: f"{word}: {why}" for test, (word, why) in told.items()}


@pytest.fixture
def planted(run: Run, tmp_path: Path) -> Planted:
    return Planted(run, tmp_path)


def failed(told: dict[str, str]) -> set[str]:
    return {test for test, what in told.items() if what.startswith("failed: ")}


def test_without_a_loss_nothing_is_planted(planted: Planted) -> None:
    for _ in range(2):
        told = planted(None)
        assert set(told.values()) == {"passed: "}
    assert set(told) == {"test_bytes", "test_cost", "test_quality"}


LOST = [
    ("bytes", "test_bytes", "regressed: bytes +5."),
    ("host-read", "test_cost", "host_reads prefill +"),
    ("never-evicts", "test_bytes", "so nothing was pruned"),
    ("never-evicts", "test_quality", "predicts exactly what the full cache does"),
]


def test_each_loss_is_seen_by_the_test_that_measures_it(planted: Planted, stored: Stored) -> None:
    stored("planted", lambda: planted(None))
    for loss, test, said in LOST:
        told = planted(loss, test)
        assert set(told) == failed(told) == {test}
        assert said in told[test]
    # They are taken out again.
    assert failed(planted(None)) == set()


def test_a_loss_changes_nothing_else(planted: Planted, stored: Stored) -> None:
    stored("planted", lambda: planted(None))
    assert "test_quality" not in failed(planted("bytes"))
    for loss, test in (("host-read", "test_cost"), ("decode-time", ""), ("retrieval", "")):
        assert failed(planted(loss)) <= {test}


def test_a_layer_that_does_not_choose_by_a_score_is_told(
    planted: Planted, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(plain_methods=METHODS)
    monkeypatch.syspath_prepend(pytester.path)
    told = planted("random-layer", method="plain_methods:plain", keep_ratios="1.0")
    assert told["test_quality"].startswith("unplantable: ")


def test_ten_items_of_a_hundred_are_lost() -> None:
    sound = make_retrieval(0.9, texts=25, tasks=("list",))
    lost = LOSSES["retrieval"].retrieval(sound)
    assert (sound.share.found, lost.share.found, lost.share.known) == (90, 80, 100)
    none = make_retrieval(0.0)
    assert LOSSES["retrieval"].retrieval(none) == none


def test_decoding_takes_a_tenth_more_and_the_prompt_does_not(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    clock = itertools.count(0.0, 1.0)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    model = load_model(str(model_folder), device=torch.device("cpu")).model
    ids = torch.ones((1, 30), dtype=torch.int64)
    with LOSSES["decode-time"].method(KnormPress(0.5, prune_after=16))(model) as new_cache:
        cache = new_cache()
        model(input_ids=ids, past_key_values=cache)
        assert slept == []
        model(input_ids=ids[:, :1], past_key_values=cache)
    assert slept == [0.1]
    model(input_ids=ids[:, :1])
    assert slept == [0.1], "the hooks are gone"

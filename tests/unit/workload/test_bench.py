"""A model with its text: how long a prompt may be, and how documents begin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from knormpress.errors import KnormError
from knormpress.workload.bench import Bench
from knormpress.workload.corpora import load_corpus


@pytest.fixture(scope="module")
def bench(model_folder: Path) -> Bench:
    corpus = load_corpus(str(model_folder / "text.txt"))
    return Bench.open(str(model_folder), corpus, device=torch.device("cpu"), dtype="float64")


def test_it_says_what_it_was_opened_with(bench: Bench, model_folder: Path) -> None:
    assert bench.layers == 3
    assert bench.positions == 2048
    assert bench.model.dtype == torch.float64
    assert (bench.model_info.name, bench.model_info.dtype) == (model_folder.name, "float64")
    assert (bench.text_info.name, bench.environment.device) == ("text.txt", "cpu")


def test_documents_begin_as_the_models_texts_do(bench: Bench, model_folder: Path) -> None:
    first, second = bench.documents(length=40, count=2)
    assert first.shape == second.shape == (1, 40)
    assert first[0, 0] == second[0, 0] == bench.start[0] == 0
    assert bench.ids.shape == (len((model_folder / "text.txt").read_text()),)
    assert torch.equal(first[0, 1:], bench.ids[:39])
    assert 0 not in bench.ids


def test_nothing_longer_than_the_model_is_made_for(bench: Bench) -> None:
    bench.check_length(2048)
    for ask in (lambda: bench.check_length(2049), lambda: bench.documents(length=2049, count=1)):
        with pytest.raises(KnormError, match=r"2048 positions.* 2049"):
            ask()

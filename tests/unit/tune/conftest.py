"""A tiny model with a text long enough for the documents of a search."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from knormpress.workload.bench import Bench
from knormpress.workload.corpora import load_corpus
from tests.tiny_folder import save_model, save_text


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tune")
    save_text(path / "text.txt", characters=14_000)
    return save_model(path, positions=2048)


@pytest.fixture(scope="package")
def bench(folder: Path) -> Bench:
    return Bench.open(str(folder), load_corpus(str(folder / "text.txt")), device=torch.device("cpu"), dtype="float32")

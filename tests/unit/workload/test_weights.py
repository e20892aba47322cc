"""What tells one model from another: its weights and its configuration, and not who stored them or how."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from knormpress.errors import KnormError
from knormpress.workload.models import DTYPES, load_model
from knormpress.workload.weights import folder_fingerprint
from tests.tiny_folder import save_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("built") / "tiny")


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A copy of a tiny model that a test may spoil."""
    return Path(shutil.copytree(built, tmp_path / "tiny"))


def test_it_is_the_models_not_the_types_or_the_attentions(folder: Path) -> None:
    prints = {
        load_model(str(folder), device=CPU, dtype=dtype, attn_implementation=attention).fingerprint
        for dtype in DTYPES
        for attention in ("eager", "sdpa")
    }
    assert prints == {folder_fingerprint(folder)}
    assert len(folder_fingerprint(folder)) == 16


def test_it_does_not_see_how_the_weights_are_spread_over_files(folder: Path, tmp_path: Path) -> None:
    load_model(str(folder), device=CPU).model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert folder_fingerprint(tmp_path / "shards") == folder_fingerprint(folder)


def test_it_sees_a_single_weight_of_a_small_tensor(folder: Path) -> None:
    before = folder_fingerprint(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][-1] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert folder_fingerprint(folder) != before


@pytest.mark.parametrize("where", [0, -1])
def test_it_sees_both_ends_of_a_large_tensor(folder: Path, where: int) -> None:
    tensor = torch.zeros(300_001)
    save_file({"large": tensor}, folder / "model.safetensors")
    before = folder_fingerprint(folder)
    tensor[where] = 1
    save_file({"large": tensor}, folder / "model.safetensors")
    assert folder_fingerprint(folder) != before


def test_it_sees_the_type_that_the_weights_are_stored_in(folder: Path) -> None:
    before = folder_fingerprint(folder)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert folder_fingerprint(folder) != before


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"rms_norm_eps": 1e-3}, True),
        ({"transformers_version": "99.0"}, False),
        ({"dtype": "bfloat16"}, False),
        ({"_name_or_path": "elsewhere"}, False),
    ],
)
def test_it_sees_the_configuration_but_not_who_wrote_it(folder: Path, change: dict[str, object], seen: bool) -> None:
    before = folder_fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert (folder_fingerprint(folder) != before) == seen


def test_a_folder_without_a_model_has_none(tmp_path: Path) -> None:
    with pytest.raises(KnormError, match="safetensors") as caught:
        folder_fingerprint(tmp_path)
    assert str(tmp_path) in str(caught.value)

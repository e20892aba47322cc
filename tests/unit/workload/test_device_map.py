"""Models in parts: how a map is read, where each part is, and that answers are those of the whole model."""

from __future__ import annotations

import gc
import importlib.util
import logging
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from knormpress.errors import KnormError
from knormpress.workload.device_map import DeviceMap
from knormpress.workload.devices import describe_map, devices_of, input_device
from knormpress.workload.models import LoadedModel, load_model
from tests.strategies import tiny_model
from tests.tiny_folder import save_model

CPU = torch.device("cpu")
SPREAD = "auto,cpu=100KB"
IDS = torch.arange(2, 60)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("built") / "tiny")


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where weights are written that have to be."""
    path = tmp_path / "scratch"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


def load(folder: Path, text: str) -> LoadedModel:
    return load_model(str(folder), device=DeviceMap.read(text))


def logits(loaded: LoadedModel) -> Tensor:
    with torch.inference_mode():
        result: Tensor = loaded.model(IDS).logits
    return result


def said(text: str, folder: Path = Path()) -> str:
    """The message with which a map is refused, which must be one line."""
    with pytest.raises(KnormError) as caught:
        load(folder, text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "limits", "first"),
    [
        ("auto", (), "auto"),
        ("sequential, CPU=1.5kb", (("cpu", 1500),), "cpu"),
        ("balanced,cpu=0MB,cuda:1=2GiB", (("cpu", 0), ("cuda:1", 2 * 2**30)), "cuda:1"),
        ("balanced_low_0,xpu=3MiB", (("xpu", 3 * 2**20),), "xpu"),
    ],
)
def test_a_map_is_read_as_what_it_stands_for(text: str, limits: Any, first: str) -> None:
    read = DeviceMap.read(text)
    assert (read.name, read.limits, read.first) == (text.partition(",")[0], limits, first)


@pytest.mark.parametrize(
    "text",
    ["", "cpu", "Auto", "auto,", "auto,cpu", "auto,cpu=1", "auto,cpu=-1GB", "auto,disk=1GB", "auto,cpu=1GB,cpu=2GB"],
)
def test_what_is_no_map_is_refused(text: str) -> None:
    assert "auto,cuda:0=10GB,cpu=2GB" in said(text)


def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    assert "device 'cuda:7' can't be used" in said("auto,cuda:7=1GB", folder)


def test_without_accelerate_a_map_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "accelerate" else real(name))
    assert "pip install accelerate" in said("auto", Path("nowhere"))


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (
            SPREAD,
            "cpu: model.embed_tokens, model.layers.0; disk: model.layers.1-2, model.norm, model.rotary_emb, lm_head",
        ),
        ("sequential,cpu=0KB", "disk: all"),
    ],
)
def test_a_model_that_is_spread_answers_as_the_whole_one(
    folder: Path, text: str, where: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    whole = load_model(str(folder), device=CPU)
    with caplog.at_level(logging.INFO, "knormpress"):
        spread = load(folder, text)
    assert capfd.readouterr() == ("", "")
    assert [record.getMessage() for record in caplog.records] == [f"device map {text.partition(',')[0]}: {where}"]
    assert spread.device_map == describe_map(spread.model) == where
    assert spread.devices == (CPU,)
    assert input_device(spread.model) == CPU
    assert (spread.parameters, spread.fingerprint) == (whole.parameters, whole.fingerprint)
    assert not any(weight.requires_grad for weight in spread.model.parameters())
    assert torch.equal(logits(spread), logits(whole))


def test_what_fits_is_not_spread(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On a machine without an accelerator all of it is on the CPU, and that is told."""
    with caplog.at_level(logging.INFO, "knormpress"):
        loaded = load(folder, "auto,cpu=1GB")
    assert "the whole model is on cpu" in caplog.text
    assert (loaded.device_map, loaded.devices) == (None, (CPU,))
    assert torch.equal(logits(loaded), logits(load_model(str(folder), device=CPU)))


def test_what_is_written_for_the_disk_is_removed_with_the_model(tmp_path: Path, scratch: Path) -> None:
    """Experts are stored in another form than they compute in, so they can't be read from the model's own files."""
    whole = tiny_model("mixtral", dtype=torch.float32)
    whole.save_pretrained(save_model(tmp_path / "experts"))
    loaded = load(tmp_path / "experts", "auto,cpu=0KB")
    assert list(scratch.glob("*/*.safetensors"))
    with torch.inference_mode():
        assert torch.equal(logits(loaded), whole(IDS).logits)
    del loaded
    gc.collect()
    assert list(scratch.iterdir()) == []


def test_a_model_that_lacks_weights_is_refused_and_leaves_nothing(folder: Path, tmp_path: Path, scratch: Path) -> None:
    spoilt = save_model(tmp_path / "spoilt")
    weights = load_file(spoilt / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, spoilt / "model.safetensors", {"format": "pt"})
    assert "model.layers.2.mlp.up_proj.weight" in said(SPREAD, spoilt)
    gc.collect()
    assert list(scratch.iterdir()) == []


def test_where_the_parts_are() -> None:
    places = {"model.embed_tokens": "cuda:1", "model.layers.9": "cuda:1", "model.layers.10": torch.device("cuda:1")}
    places |= {"model.layers.11": "cuda:0", "model.layers.12": "cpu", "model.layers.14": "cpu", "lm_head": "disk"}
    model: Any = SimpleNamespace(hf_device_map=places)
    assert describe_map(model) == (
        "cuda:1: model.embed_tokens, model.layers.9-10; cuda:0: model.layers.11; "
        "cpu: model.layers.12, model.layers.14; disk: lm_head"
    )
    assert devices_of(model) == (torch.device("cuda:1"), torch.device("cuda:0"), CPU)

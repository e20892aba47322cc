"""Models in parts: layers on several devices, and layers whose weights wait in memory or on disk until they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from knormpress import KnormCache, KnormPress
from tests.fake_accelerator import CPU, DEVICE, TwoDevices
from tests.oracle import position_ids
from tests.strategies import left_padding, tiny_model, tokens
from tests.unit.cache.test_hooks import IDS, PRESS, chunk_after_pruning, make_model

PADDING = left_padding(30, 0, 9)
PARTS = ((0, 20), (20, 25), (25, 26))


def logits(model: Any, cache: KnormCache, start: int, end: int) -> Tensor:
    """Of the tokens from ``start`` to ``end`` of two rows, the second with padding."""
    ids = torch.cat([tokens(30, seed=1), tokens(30, seed=2)])[:, start:end]
    places = position_ids(PADDING)[:, start:end]
    result: Tensor = model(ids, attention_mask=PADDING[:, :end], position_ids=places, past_key_values=cache).logits
    return result


def test_layers_on_two_devices(tmp_path: Path) -> None:
    press = KnormPress(0.5, prune_after=8, skip_layers=(), prune_interval=4)
    whole = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        cache = KnormCache(whole, press)
        expected = [logits(whole, cache, *part) for part in (*PARTS, (26, 30))]
    with TwoDevices() as fake, torch.no_grad():
        split = fake.split(whole)
        cache = KnormCache(split, press)
        for part, wanted in zip(PARTS, expected, strict=False):
            # Not to the bit: how a product is summed depends on where in memory its factors lie.
            torch.testing.assert_close(logits(split, cache, *part), wanted, rtol=0, atol=1e-5)
        cache.save(tmp_path / "c.safetensors")
        loaded = KnormCache.load(tmp_path / "c.safetensors", split)
        for each in (cache, loaded):
            assert [layer.keys.device for layer in each.layers] == [CPU, DEVICE, DEVICE]
            torch.testing.assert_close(logits(split, each, 26, 30), expected[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("embedding", "first", "second", "third"), [("cpu", "cpu", "disk", "disk"), ("disk", "disk", "cpu", "disk")]
)
def test_weights_that_wait_on_disk(embedding: str, first: str, second: str, third: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    whole = make_model()
    whole.save_pretrained(tmp_path / "model")
    layers = {f"model.layers.{index}": place for index, place in enumerate((first, second, third))}
    others = {"model.embed_tokens": embedding, "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk"}
    spread = LlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map={**layers, **others}, offload_folder=tmp_path / "offloaded"
    ).eval()
    expected = chunk_after_pruning(whole)
    assert torch.equal(chunk_after_pruning(spread), expected)
    with torch.inference_mode():
        cache = KnormCache(spread, PRESS)
        spread(IDS[:, :28], past_key_values=cache)
        cache.save(tmp_path / "c.safetensors")
        for model in (spread, whole):  # the fingerprint is that of the weights, wherever they are
            loaded = KnormCache.load(tmp_path / "c.safetensors", model)
            assert torch.equal(model(IDS[:, 28:], past_key_values=loaded).logits, expected)

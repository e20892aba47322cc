"""The tokens kept on a device are those that the CPU would keep, judged in float64 from the very same keys."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from knormpress import KnormCache, KnormPress
from knormpress.measure.prefill import prefill

PRESS = KnormPress(0.5, prune_after=256)
TOKENS = 512


def wrongly_kept(positions: torch.Tensor, keys: torch.Tensor) -> list[str]:
    """Kept tokens (1, H, m) of ``keys`` (1, H, n, D) whose norm exceeds a dropped one's by more than rounding."""
    norms = torch.linalg.vector_norm(keys.cpu().double(), dim=-1)[0]
    wrong = []
    for head, (kept, norm) in enumerate(zip(positions.cpu().long()[0], norms, strict=True)):
        dropped = torch.ones_like(norm, dtype=torch.bool)
        dropped[kept] = False
        # float32 norms, summed in any order, are right to within a few of their last digits.
        limit = norm[dropped].min() * (1 + 8 * torch.finfo(torch.float32).eps)
        wrong += [f"head {head}, token {token}" for token in kept.tolist() if norm[token] > limit]
    return wrong


@pytest.fixture(scope="module")
def filled(knorm_bench):
    """The full cache and the pruned one, behind the same prompt."""
    model = knorm_bench.model
    (ids,) = knorm_bench.documents(length=TOKENS, count=1)
    full, pruned = DynamicCache(config=model.config), KnormCache(model, PRESS)
    with torch.inference_mode():
        prefill(model, ids, full)
        pruned.prefill_from(full)
    return full, pruned


def test_every_layer_keeps_the_lowest_norms(filled):
    full, pruned = filled
    for index, (layer, source) in enumerate(zip(pruned.layers, full.layers, strict=True)):
        if index in PRESS.skip_layers:
            assert layer.stored == TOKENS
            continue
        assert layer.positions.shape[-1] == TOKENS // 2
        assert not wrongly_kept(layer.positions, source.keys), f"layer {index}"


def test_control_one_wrong_token_is_seen(filled):
    full, pruned = filled
    positions, keys = pruned.layers[1].positions.clone(), full.layers[1].keys
    positions[0, 0, 0] = torch.linalg.vector_norm(keys[0, 0], dim=-1).argmax()
    assert len(wrongly_kept(positions, keys)) >= 1

"""Attention implementations beyond sdpa and eager: flash attention's two-dimensional masks, and flex attention."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from knormpress import KnormCache, KnormError, KnormPress
from knormpress.masks import dense_mask, flex_mask
from tests.oracle import run_masked, run_pruned
from tests.strategies import VOCABULARY, tiny_model

PRESS = KnormPress(0.5, prune_after=8, skip_layers=(0,), prune_interval=2)
PASSES = [15, 1, 1, 1, 9, 1, 1]


def emulated_flash(module, query, key, value, attention_mask, scaling=None, **_):
    """What flash attention computes from its inputs, without its kernel, which needs CUDA.

    Causal with the queries aligned to the last keys, and a mask (B, keys) that says which keys are no padding. Rows are
    independent, so padding is cut out of each, as the kernel's variable-length form does.
    """
    batch, heads, new, _ = query.shape
    groups = heads // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    out = torch.zeros_like(query)
    for row in range(batch):
        keep = torch.ones(key.shape[2], dtype=torch.bool) if attention_mask is None else attention_mask[row].bool()
        used = keep[-new:]
        if not used.any():
            continue
        k, v, q = key[row][:, keep], value[row][:, keep], query[row][:, used]
        causal = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        out[row][:, used] = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=causal, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


@pytest.fixture
def flash_model():
    AttentionInterface.register("two_dimensional", emulated_flash)
    AttentionMaskInterface.register("two_dimensional", flash_attention_mask)
    model = copy.deepcopy(tiny_model())
    model.set_attn_implementation("two_dimensional")
    return model


def tokens(rows):
    return torch.randint(2, VOCABULARY, (rows, sum(PASSES)), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("left", [(0,), (0, 7, 12)], ids=["whole", "padded"])
def test_two_dimensional_masks_equal_masking(flash_model, left):
    ids = tokens(len(left))
    padding = torch.stack([(torch.arange(sum(PASSES)) >= pad).long() for pad in left]) if len(left) > 1 else None
    cache = KnormCache(flash_model, PRESS)
    trace = run_pruned(flash_model, cache, ids, PASSES, padding)
    # The masked pass is computed by sdpa: flash attention takes no mask per head.
    expected = run_masked(tiny_model(), ids, trace.visible, padding)
    real = torch.ones_like(ids, dtype=torch.bool) if padding is None else padding.bool()
    assert (trace.logits - expected)[real].abs().max() < 1e-9
    assert cache.layers[1].holes == (len(left) > 1)


def test_a_flash_mask_that_hides_what_was_seen_is_refused(flash_model):
    """Its columns are those of all heads, which kept different tokens."""
    ids = tokens(2)[:, :20]
    mask = torch.tensor([[0] * 4 + [1] * 16, [1] * 20])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, other = KnormCache(flash_model, PRESS), KnormCache(flash_model, PRESS)

    def run(cache, start, end, mask):
        own = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        with torch.no_grad():
            return flash_model(ids[:, start:end], past_key_values=cache, **own).logits

    for each in (cache, other):
        run(each, 0, 16, mask)
    for row, column in [(0, 9), (1, 0)]:
        hiding = mask.clone()
        hiding[row, column] = 0
        before = cache.stats()
        with pytest.raises(KnormError, match="the attention mask hides tokens that earlier passes attended to"):
            run(cache, 16, 20, hiding)
        assert cache.stats() == before
    assert torch.equal(run(cache, 16, 20, mask), run(other, 16, 20, mask))


def test_a_flash_mask_may_hide_what_was_seen_while_nothing_is_pruned(flash_model):
    ids, hiding = tokens(1)[:, :20], torch.tensor([[1] * 3 + [0] + [1] * 16])
    logits = []
    for cache in (KnormCache(flash_model, KnormPress(1.0)), DynamicCache(config=flash_model.config)):
        with torch.no_grad():
            flash_model(ids[:, :16], past_key_values=cache)
            logits.append(flash_model(ids[:, 16:], attention_mask=hiding, past_key_values=cache).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("heads", [1, 4])
def test_a_flex_mask_says_what_its_dense_mask_does(heads):
    mask = torch.rand(2, heads, 5, 30, generator=torch.Generator().manual_seed(0)) < 0.5
    flex = flex_mask(mask)
    assert flex.shape[:2] == (2, heads)
    assert torch.equal(create_mask(flex.mask_mod, 2, heads, 5, 30, device="cpu"), mask)
    if heads == 1:
        assert torch.equal(dense_mask(flex, 5, 30), mask)


@pytest.mark.skipif(shutil.which("c++") is None, reason="flex attention is compiled, and there is no C++ compiler")
def test_flex_attention_equals_masking():
    """In a process of its own: what else was imported decides whether torch can compile."""
    ran = subprocess.run([sys.executable, "-m", "tests.flex"], capture_output=True, text=True, check=False)
    if ran.returncode == 3:
        pytest.skip(ran.stdout)
    assert ran.returncode == 0, ran.stdout + ran.stderr

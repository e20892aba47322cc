"""The mask of each layer: every form that transformers has, custom masks, padding, and what can't be masked."""

from __future__ import annotations

import copy
import gc
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import AttentionInterface, DynamicCache, masking_utils
from transformers.integrations import flex_attention
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from knormpress import KnormCache, KnormError, KnormPress
from knormpress.cache.masks import SharedMask, dense_mask, flex_mask, real_tokens
from tests.oracle import assert_equal_to_masking, position_ids, run_masked, run_pruned
from tests.strategies import left_padding, tiny_model, tokens

PRESS = KnormPress(0.5, prune_after=8, skip_layers=(0,), prune_interval=2)
PASSES = [15, 1, 1, 1, 9, 1, 1]
TOTAL = sum(PASSES)


def emulated_flash(module, query, key, value, attention_mask, scaling=None, **_):
    """What flash attention computes from its inputs, without its kernel, which needs CUDA.

    Causal with the queries aligned to the last keys, and a mask (B, keys) that says which keys are no padding. Rows are
    independent, so padding is cut out of each, as the kernel's variable-length form does.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    out = torch.zeros_like(query)
    for row in range(query.shape[0]):
        keep = torch.ones(key.shape[2], dtype=torch.bool) if attention_mask is None else attention_mask[row].bool()
        used = keep[-query.shape[2] :]
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


@pytest.mark.parametrize("left", [(0,), (0, 7, 12)], ids=["whole", "padded"])
def test_two_dimensional_masks_equal_masking(flash_model, left):
    ids = tokens(TOTAL, len(left))
    padding = left_padding(TOTAL, *left) if len(left) > 1 else None
    cache = KnormCache(flash_model, PRESS)
    trace = run_pruned(flash_model, cache, ids, PASSES, padding)
    # The masked pass is computed by sdpa: flash attention takes no mask per head.
    expected = run_masked(tiny_model(), ids, trace.visible, padding)
    real = torch.ones_like(ids, dtype=torch.bool) if padding is None else padding.bool()
    assert (trace.logits - expected)[real].abs().max() < 1e-9
    assert cache.layers[1].holes == (len(left) > 1)


def test_a_flash_mask_that_hides_what_was_seen_is_refused(flash_model):
    """Its columns are those of all heads, which kept different tokens."""
    ids, mask = tokens(20, 2), left_padding(20, 4, 0)
    positions = position_ids(mask)
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
        with pytest.raises(KnormError, match="mask hides tokens"):
            run(cache, 16, 20, hiding)
        assert cache.stats() == before
    assert torch.equal(run(cache, 16, 20, mask), run(other, 16, 20, mask))


def test_a_flash_mask_may_hide_what_was_seen_while_nothing_is_pruned(flash_model):
    ids, hiding = tokens(20), torch.tensor([[1] * 3 + [0] + [1] * 16])
    logits = []
    for cache in (KnormCache(flash_model, KnormPress(1.0)), DynamicCache(config=flash_model.config)):
        with torch.no_grad():
            flash_model(ids[:, :16], past_key_values=cache)
            logits.append(flash_model(ids[:, 16:], attention_mask=hiding, past_key_values=cache).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("is_one_more_hidden", [False, True])
def test_a_mask_of_padding_alone_is_one_for_all_heads(new, is_one_more_hidden):
    """It says what gathering it for each head says; a mask that hides one token more is gathered."""
    seen, since = 30, 24
    real = left_padding(seen, 0, 7, 16).bool()
    mask = torch.ones(new, seen + new, dtype=torch.bool).tril(seen)[None, None].repeat(3, 1, 1, 1)
    mask[..., :seen] &= real[:, None, None]
    # Rows keep 8, 8 and 4 of their tokens before ``since``, other ones in each head.
    kept = torch.zeros(3, 2, 1, 8, dtype=torch.int32)
    for row, (left, count) in enumerate([(0, 8), (7, 8), (16, 4)]):
        for head in range(2):
            kept[row, head, 0, -count:] = 1 + left + torch.randperm(since - left)[:count].sort().values
    if is_one_more_hidden:
        mask[0, ..., kept[0, 0, 0, -1] - 1] = False
    shared = SharedMask.read(mask, seen, new, sdpa=True, real=real)
    assert shared.padded != is_one_more_hidden
    own, gathered = (
        each.of(kept, since=since, groups=2, holes=True) for each in (shared, replace(shared, padded=False, _parts={}))
    )
    assert own.shape[1] == (4 if is_one_more_hidden else 1)
    assert gathered.shape == (3, 4, new, 8 + seen - since + new)
    assert torch.equal(own.expand_as(gathered), gathered)
    assert not own[2, ..., :4].any()


def emulated_flex(query, key, value, *, block_mask, scale, **_):
    """What flex attention computes from its inputs; compiling it takes long, and torch 2.13 can't for some shapes."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    mask = create_mask(block_mask.mask_mod, *query.shape[:3], key.shape[2], device="cpu")
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


@pytest.fixture
def flex_model(monkeypatch):
    def not_compiled(*args, _compile=False, **kwargs):
        return create_block_mask(*args, **kwargs)

    monkeypatch.setattr(masking_utils, "create_block_mask", not_compiled)
    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", emulated_flex)
    return tiny_model(attention="flex_attention")


@pytest.mark.parametrize("skip_layers", [(), (0,)], ids=["one length", "two lengths"])
@pytest.mark.parametrize("left", [(0,), (0, 7, 12)], ids=["whole", "padded"])
def test_flex_masks_equal_masking(flex_model, left, skip_layers):
    press = KnormPress(0.5, prune_after=8, skip_layers=skip_layers, prune_interval=2)
    ids = tokens(TOTAL, len(left))
    padding = left_padding(TOTAL, *left) if len(left) > 1 else None
    trace = run_pruned(flex_model, KnormCache(flex_model, press), ids, PASSES, padding)
    expected = run_masked(tiny_model(), ids, trace.visible, padding)
    real = torch.ones_like(ids, dtype=torch.bool) if padding is None else padding.bool()
    assert (trace.logits - expected)[real].abs().max() < 1e-9


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_flex_mask_says_what_its_dense_mask_does(heads):
    mask = torch.rand(2, heads, 5, 30, generator=torch.Generator().manual_seed(0)) < 0.5
    flex = flex_mask(mask)
    assert flex.shape[:2] == (2, heads)
    assert torch.equal(create_mask(flex.mask_mod, 2, heads, 5, 30, device="cpu"), mask)
    if heads == 1:
        assert torch.equal(dense_mask(flex, 5, 30), mask)


@pytest.mark.skipif(shutil.which("c++") is None, reason="flex attention is compiled, and there is no C++ compiler")
def test_flex_attention_is_compiled_with_such_a_mask():
    ran = subprocess.run([sys.executable, "-m", "tests.flex"], capture_output=True, text=True, check=False)
    if ran.returncode == 3:
        pytest.skip(ran.stdout)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("additive", [False, True])
def test_a_custom_mask_over_all_tokens_is_cut_to_each_layers_own(additive, heads):
    """Past tokens that a query's own mask hides stay hidden after pruning, whether they were kept or not."""
    model, ids, past = tiny_model(), tokens(30), 24
    shown = torch.ones(1, heads, 30, 30, dtype=torch.bool).tril()
    shown[..., past:, :past] = torch.rand(1, heads, 6, past, generator=torch.Generator().manual_seed(4)) < 0.6
    mask = shown[..., past:, :]
    if additive:
        mask = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, -1e30)
    cache = KnormCache(model, PRESS)
    with torch.no_grad():
        model(ids[:, :past], past_key_values=cache)
        kept = [layer.positions.long() for layer in cache.layers]
        ours = model(ids[:, past:], attention_mask=mask, past_key_values=cache).logits
    visible = {}
    for index, positions in enumerate(kept):
        stays = torch.zeros(1, 2, past, dtype=torch.bool).scatter(-1, positions, True).repeat_interleave(2, dim=1)
        visible[index] = shown.expand(-1, 4, -1, -1).clone()
        visible[index][..., past:, :past] &= stays[:, :, None]
    assert (ours - run_masked(model, ids, visible)[:, past:]).abs().max() < 1e-9


def test_a_custom_mask_that_covers_too_little_is_refused():
    model = tiny_model()
    cache = KnormCache(model, PRESS)
    with torch.no_grad():
        model(tokens(24), past_key_values=cache)
        with pytest.raises(KnormError, match=r"15 tokens, .*24 .* 3 .*27 tokens"):
            model(tokens(3), attention_mask=torch.ones(1, 1, 3, 15, dtype=torch.bool), past_key_values=cache)
    assert cache.get_seq_length() == 24


def test_a_mask_given_by_position_is_replaced_too():
    """Some models call their attention modules with positional arguments."""
    model = tiny_model()
    module, mask = model.model.layers[1].self_attn, torch.ones(1, 1, 5, 29, dtype=torch.bool)
    mask[..., 3:9] = False
    found = []
    for positional in (False, True):
        cache = KnormCache(model, PRESS)
        with torch.no_grad():
            model(tokens(24), past_key_values=cache)
            hidden = torch.ones(1, 5, 32, dtype=model.dtype)
            rotation = model.model.rotary_emb(hidden, torch.arange(24, 29)[None])
            if positional:
                found.append(module(hidden, rotation, mask, cache)[0])
            else:
                named = {"position_embeddings": rotation, "attention_mask": mask, "past_key_values": cache}
                found.append(module(hidden_states=hidden, **named)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("hidden", [-1e4, -1e9, torch.finfo(torch.float64).min, -torch.inf])
def test_padding_hidden_by_any_large_number_is_no_token(hidden):
    model = tiny_model()
    total, pad = 24, 8
    allowed = torch.ones(total, total, dtype=torch.bool).tril()
    allowed[:, :pad] = False
    allowed[:pad, total - 1] = True  # padding attends to something, so that its softmax is no 0 / 0
    mask = torch.zeros(1, 1, total, total, dtype=torch.float64).masked_fill(~allowed, hidden)
    cache = KnormCache(model, PRESS)
    with torch.no_grad():
        model(tokens(total), attention_mask=mask, past_key_values=cache)
    assert all(layer.positions.min() >= pad for layer in cache.layers[1:])
    assert [layer.stored for layer in cache.layers] == [24, 8, 8]


def test_a_mask_left_out_after_padding_is_refused():
    model = tiny_model()
    cache = KnormCache(model, PRESS)
    with torch.no_grad():
        model(tokens(24), attention_mask=left_padding(24, 4), past_key_values=cache)
        before = cache.stats()
        with pytest.raises(KnormError, match=r"padding, .*no attention_mask"):
            model(tokens(1), past_key_values=cache)
    assert cache.stats() == before


def test_a_token_is_real_if_one_head_attends_to_it():
    """Head 0 hides token 1 from all, head 1 does not; token 2 is hidden by both."""
    allowed = torch.ones(1, 2, 4, 4, dtype=torch.bool).tril()
    allowed[0, 0, :, 1] = allowed[0, :, :, 2] = False
    assert real_tokens(allowed, 0, 4).tolist() == [[True, True, False, True]]


def test_a_mask_that_shows_padding_shows_no_empty_slot():
    """Padding is never kept, so a later mask over it hides or shows nothing."""
    model, mask = tiny_model(), left_padding(27, 0, 14)
    positions = position_ids(mask)
    shows = torch.cat([torch.ones(2, 1, 3, 24, dtype=torch.bool), torch.ones(2, 1, 3, 3).tril().bool()], dim=-1)
    hides = shows.clone()
    hides[1, ..., :14] = False
    logits = []
    for later in (shows, hides):
        cache = KnormCache(model, KnormPress(0.5, prune_after=8, skip_layers=()))
        with torch.no_grad():
            model(tokens(24, 2), attention_mask=mask[:, :24], position_ids=positions[:, :24], past_key_values=cache)
            own = {"attention_mask": later, "position_ids": positions[:, 24:]}
            logits.append(model(tokens(3, 2), past_key_values=cache, **own).logits)
    assert cache.layers[1].positions[1, :, :7].unique().tolist() == [-1]
    assert torch.equal(*logits)


def test_a_mask_lives_no_longer_than_its_pass():
    model = tiny_model()
    mask = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril()
    alive = weakref.ref(mask)
    cache = KnormCache(model, PRESS)
    with torch.no_grad():
        model(tokens(24), attention_mask=mask, past_key_values=cache)
    del mask
    gc.collect()
    assert alive() is None


def test_a_model_copied_while_a_cache_lives_has_caches_of_its_own():
    model = tiny_model()
    cache = KnormCache(model, PRESS)
    copied = copy.deepcopy(model)
    assert_equal_to_masking(copied, KnormCache(copied, PRESS), tokens(TOTAL), PASSES)
    assert cache.get_seq_length() == 0

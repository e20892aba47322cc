"""A layer of the cache: tokens taken back, pruning put off, and contents that are moved between devices."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knormpress import KnormCache, KnormError, KnormPress
from tests.oracle import greedy, position_ids
from tests.strategies import left_padding, presses, tiny_model, tokens

PRESS = KnormPress(0.5, prune_after=8, skip_layers=(0,), prune_interval=4)
# Decoding alone never reaches this interval, so pruning tells what was taken for a pass of several tokens.
SELDOM = KnormPress(0.5, prune_after=8, prune_interval=64)


def test_crop_takes_back_what_was_not_pruned_yet():
    model, ids = tiny_model(), tokens(30)
    cache, straight = KnormCache(model, PRESS), KnormCache(model, PRESS)
    with torch.no_grad():
        for each in (cache, straight):
            model(ids[:, :20], past_key_values=each)
        model(ids[:, 20:21], past_key_values=cache)
        cache.crop(-1)
        ours, theirs = (model(ids[:, 20:24], past_key_values=each).logits for each in (cache, straight))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("crop", "told"),
    [(-1, r"newest 1 of 24 .* after 24"), (-2, r"newest 2 of 24 .* after 24"), (1, "got 1;"), (3, "got 3;")],
)
def test_a_refused_crop_changes_nothing(crop, told):
    model = tiny_model()
    cache, other = KnormCache(model, PRESS), KnormCache(model, PRESS)
    for each in (cache, other):
        greedy(model, tokens(24), each, 1)
    with pytest.raises(KnormError, match=told):
        cache.crop(crop)
    assert cache.stats() == other.stats()
    assert torch.equal(greedy(model, tokens(1), cache, 9), greedy(model, tokens(1), other, 9))


def test_a_full_window_cant_take_tokens_back_unless_it_records():
    """A sliding-window layer drops its oldest token for each new one, and says so before any layer is changed."""
    model = tiny_model("gemma3")  # a window of 7 tokens
    whole = KnormPress(1.0)
    cache, recording, straight = (KnormCache(model, whole) for _ in range(3))
    recording.activate_past_recording()
    with torch.no_grad():
        for each, count in ((cache, 12), (recording, 12), (straight, 9)):
            model(tokens(12)[:, :count], past_key_values=each)
    before = cache.stats()
    with pytest.raises(KnormError, match=r"sliding-window .* 3 tokens"):
        cache.crop(-3)
    assert cache.stats() == before
    recording.crop(-3)
    assert torch.equal(greedy(model, tokens(1), recording, 5), greedy(model, tokens(1), straight, 5))
    short = KnormCache(model, whole)
    with torch.no_grad():
        model(tokens(6), past_key_values=short)
    short.crop(-2)
    assert [layer.get_seq_length() for layer in short.layers] == [4, 4, 4]


def test_recording_puts_pruning_off_until_crop():
    model = tiny_model()
    cache, other = KnormCache(model, PRESS), KnormCache(model, PRESS)
    cache.activate_past_recording()
    with torch.no_grad():
        model(tokens(24), past_key_values=cache)
        assert [layer.stored for layer in cache.layers] == [24, 24, 24]
        cache.crop(-4)
        assert [layer.stored for layer in cache.layers] == [20, 10, 10]
        model(tokens(24)[:, :20], past_key_values=other)
    assert torch.equal(cache.layers[1].positions, other.layers[1].positions)


def test_recording_ends_with_the_second_pass_that_nothing_is_taken_back_from():
    """generate() never ends it: behind the last assisted step the cache must prune again by itself."""
    model = tiny_model()
    cache = KnormCache(model, PRESS)
    cache.activate_past_recording()
    with torch.no_grad():
        for ids, stored in ((tokens(24), [24, 24, 24]), (tokens(2), [26, 13, 13])):
            model(ids, past_key_values=cache)
            assert [layer.stored for layer in cache.layers] == stored


def test_tokens_taken_back_do_not_pass_for_decoding():
    """After a crop a pass of several tokens still prunes to the budget at once."""
    model, ids = tiny_model(), tokens(44)
    cropped, straight = KnormCache(model, SELDOM), KnormCache(model, SELDOM)
    with torch.no_grad():
        for cache in (cropped, straight):
            model(ids[:, :20], past_key_values=cache)
        for position in range(20, 32):
            model(ids[:, position : position + 1], past_key_values=cropped)
        cropped.crop(-12)
        for cache in (cropped, straight):
            model(ids[:, 32:], past_key_values=cache)
    assert [layer.stored for layer in cropped.layers] == [layer.stored for layer in straight.layers] == [32, 16, 16]


def test_recorded_passes_add_up_to_several_tokens():
    """Two tokens accepted in one recorded pass prune to the budget; one at a time they would wait for the interval."""
    model = tiny_model()
    cache = KnormCache(model, SELDOM)
    with torch.no_grad():
        model(tokens(20), past_key_values=cache)
        cache.activate_past_recording()
        model(tokens(5, seed=1), past_key_values=cache)
        cache.crop(-3)
    assert [layer.stored for layer in cache.layers] == [22, 11, 11]


def test_a_layer_moves_keys_and_values_and_leaves_positions():
    """Offloading itself needs CUDA streams; the moves it makes are here made between host and meta tensors."""
    model = tiny_model()
    cache, other = KnormCache(model, PRESS), KnormCache(model, PRESS)
    for each in (cache, other):
        greedy(model, tokens(24), each, 3)
    for layer, source in zip(cache.layers, other.layers, strict=True):
        layer.offload()
        layer._move("meta")
        assert layer.keys.device.type == layer.values.device.type == "meta"
        assert torch.equal(layer.positions, source.positions)
        tensors, state = copy.deepcopy(source.state())
        layer.restore(tensors, state)
        layer.prefetch()
    assert torch.equal(greedy(model, tokens(1), cache, 8), greedy(model, tokens(1), other, 8))


def test_the_masks_of_a_pass_need_nothing_that_is_away():
    """transformers waits for an offloaded layer in ``update``, after the mask of its attention was made."""
    model = tiny_model()
    cache, other = KnormCache(model, PRESS), KnormCache(model, PRESS)
    mask = left_padding(24, 10, 0)
    for each in (cache, other):
        with torch.no_grad():
            model(tokens(24, 2), attention_mask=mask, position_ids=position_ids(mask), past_key_values=each)
    longer = torch.ones(2, 1, 1, 25, dtype=torch.bool)
    longer[0, ..., :10] = False
    for index, (layer, source) in enumerate(zip(cache.layers, other.layers, strict=True)):
        layer._move("meta")
        module = model.model.layers[index].self_attn
        own, expected = (each.mask_for(module, longer, 2, 1)[0] for each in (cache, other))
        assert own.device.type == "cpu"
        assert torch.equal(own, expected)
        for each in (layer, source):
            each.seen += 1  # what update does next


def test_pruning_put_off_finds_offloaded_keys_and_leaves_them_there():
    model = tiny_model()
    cache = KnormCache(model, PRESS)
    cache.activate_past_recording()
    with torch.no_grad():
        model(tokens(24), past_key_values=cache)
    layer, moves = cache.layers[1], []
    move = layer._move
    layer._move = lambda device: (moves.append((str(device), layer.stored)), move(device))
    layer.crop(-4)
    assert moves == [("cpu", 20), ("cpu", 10)]


@settings(max_examples=10)
@given(presses(), st.integers(0, 30), st.sampled_from([None, (3, 0)]))
def test_in_few_passes_a_cache_keeps_what_it_keeps_token_by_token(press, prompt, padding):
    """From an empty cache or a filled one, and in a batch whose rows prune at different times."""
    model, rows, new = tiny_model(), 1 if padding is None else 2, 16
    ids = tokens(prompt + new, rows)
    mask = left_padding(prompt + new, *padding) if padding and prompt > 3 else torch.ones_like(ids)
    single, few = KnormCache(model, press), KnormCache(model, press)
    logits = ([], [])

    def feed(cache, start, end):
        places = {"attention_mask": mask[:, :end], "position_ids": position_ids(mask)[:, start:end]}
        return model(ids[:, start:end], past_key_values=cache, **places).logits

    with torch.no_grad():
        if prompt:
            feed(single, 0, prompt)
            feed(few, 0, prompt)
        for place in range(prompt, prompt + new):
            logits[0].append(feed(single, place, place + 1))
        place = prompt
        while place < prompt + new:
            with few.as_single_tokens(prompt + new - place) as count:
                logits[1].append(feed(few, place, place + count))
            place += count
    assert torch.allclose(torch.cat(logits[0], dim=1), torch.cat(logits[1], dim=1), atol=1e-9)
    assert all(map(torch.equal, *([layer.positions for layer in cache.layers] for cache in (single, few))))


def test_pruning_is_as_before_behind_tokens_that_were_taken_as_single():
    """However their pass ended."""
    model = tiny_model()
    cache = KnormCache(model, SELDOM)
    with torch.no_grad():
        model(tokens(20), past_key_values=cache)
        with cache.as_single_tokens(10) as count:
            model(tokens(count), past_key_values=cache)
        with pytest.raises(KnormError, match="batch"), cache.as_single_tokens(10):
            model(tokens(10, 2), past_key_values=cache)
        assert [layer.stored for layer in cache.layers] == [30, 20, 20]
        model(tokens(2), past_key_values=cache)
    assert [layer.stored for layer in cache.layers] == [32, 16, 16]


@pytest.mark.parametrize("schedule", ["proportional", "iterative"])
@pytest.mark.parametrize("keep", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("prompt", [3, 20, 100, 400])
def test_no_cache_is_ever_larger_than_the_full_one(prompt, keep, schedule):
    """By more than 2 %, at any token: spare room must not take what pruning saves."""
    model = tiny_model(dtype=torch.float32)
    cache = KnormCache(model, KnormPress(keep, prune_after=64, schedule=schedule))
    ids = tokens(prompt + 90)
    slot = sum(2 * 4 * module.head_dim for module in (layer.self_attn for layer in model.model.layers))
    slot *= model.config.num_key_value_heads
    with torch.no_grad():
        for seen in range(prompt, prompt + 90):
            model(ids[:, :prompt] if seen == prompt else ids[:, seen - 1 : seen], past_key_values=cache)
            assert cache.get_seq_length() == seen
            assert cache.nbytes <= 1.02 * seen * slot

"""The cache in the loops people write, and what it refuses."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from transformers import DynamicCache

from knormpress import KnormCache, KnormError, KnormPress
from tests.oracle import assert_equal_to_masking
from tests.strategies import VOCABULARY, tiny_model

PRESS = KnormPress(0.5, prune_after=8, skip_layers=(0,), prune_interval=4)


def prompt(length: int = 24, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def greedy(model, ids, cache, new):
    """Greedy decoding by hand: the new tokens, (rows, new)."""
    tokens = []
    with torch.no_grad():
        for _ in range(new):
            ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            tokens.append(ids)
    return torch.cat(tokens, dim=1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generate_equals_a_loop_by_hand(attention):
    model = tiny_model(attention=attention)
    generated = model.generate(prompt(), past_key_values=KnormCache(model, PRESS), max_new_tokens=30, do_sample=False)
    assert torch.equal(generated[:, 24:], greedy(model, prompt(), KnormCache(model, PRESS), 30))


def test_keep_everything_is_the_full_cache():
    model = tiny_model()
    cache = KnormCache(model, KnormPress(1.0, prune_after=1))
    full = DynamicCache(config=model.config)
    ids = prompt()
    with torch.no_grad():
        for start, end in [(0, 10), (10, 18), (18, 19), (19, 20), (20, 24)]:
            ours = model(ids[:, start:end], past_key_values=cache).logits
            theirs = model(ids[:, start:end], past_key_values=full).logits
            assert torch.equal(ours, theirs)
    assert [layer.stored for layer in cache.layers] == [24] * 3


def test_the_control_pruning_changes_the_text():
    model = tiny_model()
    pruned = model.generate(
        prompt(), past_key_values=KnormCache(model, KnormPress(0.1, prune_after=8)), max_new_tokens=30, do_sample=False
    )
    assert not torch.equal(pruned, model.generate(prompt(), max_new_tokens=30, do_sample=False))


def test_second_turn_on_a_filled_cache():
    model = tiny_model()
    cache = KnormCache(model, PRESS)
    first = model.generate(prompt(), past_key_values=cache, max_new_tokens=5, do_sample=False)
    turn = torch.cat([first, prompt(9, seed=1)], dim=1)
    second = model.generate(turn, past_key_values=cache, max_new_tokens=5, do_sample=False)
    by_hand = KnormCache(model, PRESS)
    assert torch.equal(greedy(model, prompt(), by_hand, 5), first[:, 24:])
    assert torch.equal(greedy(model, torch.cat([first[:, -1:], prompt(9, seed=1)], dim=1), by_hand, 5), second[:, -5:])


def test_chunked_prefill_of_generate_equals_passes_by_hand():
    model = tiny_model()
    generated = model.generate(
        prompt(30), past_key_values=KnormCache(model, PRESS), max_new_tokens=6, do_sample=False, prefill_chunk_size=7
    )
    cache = KnormCache(model, PRESS)
    with torch.no_grad():
        for chunk in prompt(30).split(7, dim=1)[:-1]:
            model(chunk, past_key_values=cache)
    assert torch.equal(greedy(model, prompt(30).split(7, dim=1)[-1], cache, 6), generated[:, 30:])


def test_stats_positions_and_bytes():
    model = tiny_model()
    cache = KnormCache(model, PRESS)
    greedy(model, prompt(), cache, 1)
    assert [(s.seen, s.stored, s.evicted) for s in cache.stats()] == [(24, 24, 0), (24, 12, 12), (24, 12, 12)]
    keys_and_values = 2 * 2 * 8 * 8  # two tensors, two heads, head size 8, float64
    assert [s.nbytes for s in cache.stats()] == [24 * keys_and_values, *[12 * (keys_and_values + 2 * 4)] * 2]
    assert cache.nbytes == sum(s.nbytes for s in cache.stats())
    for layer in cache.layers:
        assert layer.keys.untyped_storage().nbytes() == layer.keys.numel() * 8
        positions = layer.positions
        assert positions.shape == layer.keys.shape[:3]
        assert (positions.diff(dim=-1) > 0).all()


def test_kept_tokens_are_those_of_the_lowest_norm():
    model = tiny_model()
    full, cache = DynamicCache(config=model.config), KnormCache(model, PRESS)
    with torch.no_grad():
        model(prompt(), past_key_values=full)
        model(prompt(), past_key_values=cache)
    for index in (1, 2):
        norms = full.layers[index].keys.norm(dim=-1)
        expected = norms.topk(12, largest=False).indices.sort().values
        assert torch.equal(cache.layers[index].positions.long(), expected)
        assert torch.equal(
            cache.layers[index].values, full.layers[index].values[:, torch.arange(2)[:, None], expected[0]]
        )


def test_prefill_from_a_full_cache_equals_a_prefill():
    model = tiny_model()
    full = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(), past_key_values=full)
    before = [layer.keys.clone() for layer in full.layers]
    for ratio in (0.2, 0.5, 1.0):
        press = KnormPress(ratio, prune_after=8)
        shared, alone = KnormCache(model, press), KnormCache(model, press)
        shared.prefill_from(full)
        with torch.no_grad():
            model(prompt(), past_key_values=alone)
            ours = model(prompt(6, seed=3), past_key_values=shared).logits
            theirs = model(prompt(6, seed=3), past_key_values=alone).logits
        assert torch.equal(ours, theirs)
        greedy(model, prompt(1), shared, 3)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(full.layers, before, strict=True))


def test_press_as_a_context_gives_each_generation_a_fresh_cache():
    model = tiny_model()
    expected = model.generate(prompt(), past_key_values=KnormCache(model, PRESS), max_new_tokens=12, do_sample=False)
    plain = model.generate(prompt(), max_new_tokens=12, do_sample=False)
    with PRESS(model) as new_cache:
        for _ in range(2):
            result = model.generate(prompt(), max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
            assert torch.equal(result.sequences, expected)
            assert isinstance(result.past_key_values, KnormCache)
        assert new_cache().get_seq_length() == 0
        own = DynamicCache(config=model.config)
        assert torch.equal(model.generate(prompt(), past_key_values=own, max_new_tokens=12, do_sample=False), plain)
        assert torch.equal(model.generate(prompt(), use_cache=False, max_new_tokens=12, do_sample=False), plain)
    assert torch.equal(model.generate(prompt(), max_new_tokens=12, do_sample=False), plain)


def hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_contexts_nest_and_leave_nothing_behind():
    model = tiny_model()
    gc.collect()
    assert hooks(model) == 0
    inner_press = KnormPress(0.2, prune_after=4)
    with PRESS(model):
        with (  # noqa: PT012 - what leaves the contexts is under test
            pytest.raises(RuntimeError, match="inside"),
            inner_press(model),
            PRESS(model),
            inner_press(model),
        ):
            out = model.generate(prompt(), max_new_tokens=1, return_dict_in_generate=True)
            assert out.past_key_values.press is inner_press
            raise RuntimeError("inside")
        out = model.generate(prompt(), max_new_tokens=1, return_dict_in_generate=True)
        assert out.past_key_values.press is PRESS
    assert "generate" not in vars(model)
    assert hooks(model) > 0
    del out
    gc.collect()
    assert hooks(model) == 0


def test_a_copied_cache_goes_on_by_itself():
    model = tiny_model()
    cache = KnormCache(model, PRESS)
    greedy(model, prompt(), cache, 3)
    twin = copy.deepcopy(cache)
    expected = greedy(model, prompt(1, seed=5), cache, 10)
    del cache
    gc.collect()
    assert torch.equal(greedy(model, prompt(1, seed=5), twin, 10), expected)


def test_two_models_in_turn():
    one, two = tiny_model(seed=0), tiny_model(seed=1)
    caches = [KnormCache(one, PRESS), KnormCache(two, PRESS)]
    expected = [greedy(model, prompt(), KnormCache(model, PRESS), 4) for model in (one, two)]
    ids = [prompt(), prompt()]
    for step in range(4):
        for i, model in enumerate((one, two)):
            ids[i] = greedy(model, ids[i], caches[i], 1)
            assert torch.equal(ids[i], expected[i][:, step : step + 1])


def test_reset_forgets_everything():
    model = tiny_model()
    cache = KnormCache(model, PRESS)
    first = greedy(model, prompt(), cache, 20)
    cache.reset()
    assert (cache.nbytes, cache.get_seq_length()) == (0, 0)
    assert torch.equal(greedy(model, prompt(), cache, 20), first)


def test_another_model_is_refused():
    cache = KnormCache(tiny_model(seed=0), PRESS)
    with pytest.raises(KnormError, match="made for one LlamaForCausalLM and is used with another"):
        tiny_model(seed=1)(prompt(), past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_another_batch_size_is_refused_and_nothing_is_lost():
    model = tiny_model()
    cache = KnormCache(model, PRESS)
    greedy(model, prompt(), cache, 2)
    with pytest.raises(KnormError, match="got a batch of 2 rows, but its cache holds 1"):
        model(prompt(3, rows=2), past_key_values=cache)
    other = KnormCache(model, PRESS)
    greedy(model, prompt(), other, 2)
    assert torch.equal(greedy(model, prompt(1), cache, 6), greedy(model, prompt(1), other, 6))


def test_a_pass_that_broke_off_is_told():
    model = tiny_model()
    cache = KnormCache(model, PRESS)

    def fail(*_):
        raise MemoryError

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        model(prompt(), past_key_values=cache)
    handle.remove()
    with pytest.raises(KnormError, match="an earlier forward pass broke off"):
        model(prompt(), past_key_values=cache)
    cache.reset()
    greedy(model, prompt(), cache, 2)


def test_keys_without_a_norm_are_refused_by_layer():
    model = copy.deepcopy(tiny_model())
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight[0, 0] = torch.nan
    with pytest.raises(KnormError, match="layer 2 has keys that are NaN or infinite"):
        model(prompt(), past_key_values=KnormCache(model, PRESS))


def test_a_layer_that_is_not_there():
    with pytest.raises(KnormError, match="skip_layers names layer 3, but the model has 3 layers"):
        KnormCache(tiny_model(), KnormPress(skip_layers=(3,)))


def test_crop_takes_back_what_was_not_pruned_yet():
    model = tiny_model()
    ids = prompt(30)
    cache = KnormCache(model, PRESS)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        model(ids[:, 20:21], past_key_values=cache)
    cache.crop(-1)
    assert_tail = KnormCache(model, PRESS)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=assert_tail)
        expected = model(ids[:, 20:24], past_key_values=assert_tail).logits
        assert torch.equal(model(ids[:, 20:24], past_key_values=cache).logits, expected)
    with pytest.raises(KnormError, match=r"can't take back 2 tokens: it pruned at 24 of 24"):
        cache.crop(-2)


def test_recording_puts_pruning_off_until_crop():
    model = tiny_model()
    cache = KnormCache(model, PRESS)
    cache.activate_past_recording()
    with torch.no_grad():
        model(prompt(24), past_key_values=cache)
    assert [layer.stored for layer in cache.layers] == [24, 24, 24]
    cache.crop(-4)
    assert [layer.stored for layer in cache.layers] == [20, 10, 10]
    other = KnormCache(model, PRESS)
    with torch.no_grad():
        model(prompt(24)[:, :20], past_key_values=other)
    assert torch.equal(cache.layers[1].positions, other.layers[1].positions)


def test_long_decode_stays_exact():
    model = tiny_model()
    ids = prompt(150)
    assert_equal_to_masking(model, KnormCache(model, PRESS), ids, [30, *[1] * 120])


def test_a_layer_moves_keys_and_values_and_leaves_positions():
    """Offloading itself needs CUDA streams; the moves it makes are here made between host and meta tensors."""
    model = tiny_model()
    cache, other = KnormCache(model, PRESS), KnormCache(model, PRESS)
    for each in (cache, other):
        greedy(model, prompt(), each, 3)
    for layer, source in zip(cache.layers, other.layers, strict=True):
        layer.offload()
        layer._move("meta")
        assert layer.keys.device.type == layer.values.device.type == "meta"
        assert torch.equal(layer.positions, source.positions)
        tensors, state = copy.deepcopy(source.state())
        layer.restore(tensors, state)
        layer.prefetch()
    assert torch.equal(greedy(model, prompt(1), cache, 8), greedy(model, prompt(1), other, 8))
    with pytest.raises(KnormError, match="offloading is for models on CUDA, this one is on cpu"):
        KnormCache(model, PRESS, offloading=True)


def test_the_masks_of_a_pass_need_nothing_that_is_away():
    """transformers waits for an offloaded layer in ``update``, after the mask of its attention was made."""
    model = tiny_model()
    cache, other = KnormCache(model, PRESS), KnormCache(model, PRESS)
    mask = torch.tensor([[0] * 10 + [1] * 14, [1] * 24])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for each in (cache, other):
        with torch.no_grad():
            model(prompt(rows=2), attention_mask=mask, position_ids=positions, past_key_values=each)
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
        model(prompt(), past_key_values=cache)
    layer, moves = cache.layers[1], []
    move = layer._move
    layer._move = lambda device: (moves.append((str(device), layer.stored)), move(device))
    layer.crop(-4)
    assert moves == [("cpu", 20), ("cpu", 10)]


def test_compiled_decoding_equals_eager_decoding():
    """torch.compile traces around the cache; the eager backend runs what was traced, without a C++ compiler."""
    model = tiny_model()
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    mask = torch.tensor([[1] * 24, [0] * 9 + [1] * 15])
    results = []
    for runner in (model, compiled):
        cache = KnormCache(getattr(runner, "_orig_mod", runner), PRESS)
        own, ids, logits = mask, prompt(rows=2), []
        with torch.no_grad():
            for _ in range(14):
                positions = (own.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                out = runner(ids, attention_mask=own, position_ids=positions, past_key_values=cache).logits[:, -1:]
                logits.append(out)
                ids, own = out.argmax(-1), torch.cat([own, torch.ones(2, 1, dtype=torch.long)], dim=1)
        results.append((torch.cat(logits, dim=1), [layer.positions for layer in cache.layers]))
    torch._dynamo.reset()
    (eager, kept), (traced, kept_traced) = results
    assert (eager - traced).abs().max() < 1e-9
    assert all(torch.equal(a, b) for a, b in zip(kept, kept_traced, strict=True))


def test_a_refused_crop_changes_nothing():
    model = tiny_model()
    cache, other = KnormCache(model, PRESS), KnormCache(model, PRESS)
    for each in (cache, other):
        greedy(model, prompt(), each, 1)
    with pytest.raises(KnormError, match="can't take back 1 tokens"):
        cache.crop(-1)
    with pytest.raises(KnormError, match="crop got 3; give the number"):
        cache.crop(3)
    assert cache.stats() == other.stats()
    assert torch.equal(greedy(model, prompt(1), cache, 9), greedy(model, prompt(1), other, 9))


def test_pruning_goes_on_after_assisted_decoding():
    model = tiny_model()
    cache = KnormCache(model, PRESS)
    first = model.generate(
        prompt(), past_key_values=cache, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3
    )
    longer = torch.cat([first, prompt(60, seed=2)], dim=1)
    model.generate(longer, past_key_values=cache, max_new_tokens=20, do_sample=False)
    seen = cache.get_seq_length()
    assert seen > 100
    assert all(layer.stored < seen / 2 + 1 + PRESS.prune_interval for layer in cache.layers[1:])


def test_tokens_taken_back_do_not_pass_for_decoding():
    """After a crop a pass of several tokens still prunes to the budget at once."""
    model = tiny_model()
    press = KnormPress(0.5, prune_after=8, prune_interval=64)
    ids = prompt(44)
    cropped, straight = KnormCache(model, press), KnormCache(model, press)
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
    press = KnormPress(0.5, prune_after=8, prune_interval=64)
    cache = KnormCache(model, press)
    with torch.no_grad():
        model(prompt(20), past_key_values=cache)
        cache.activate_past_recording()
        model(prompt(5, seed=1), past_key_values=cache)
        cache.crop(-3)
    assert [layer.stored for layer in cache.layers] == [22, 11, 11]


def test_a_pass_that_broke_off_in_a_sliding_layer_is_told():
    model = tiny_model("gemma3")
    cache = KnormCache(model, PRESS)

    def fail(*_):
        raise MemoryError

    handle = model.model.layers[0].mlp.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        model(prompt(), past_key_values=cache)
    handle.remove()
    with pytest.raises(KnormError, match="layer 0 has seen 48 tokens, others 0: an earlier forward pass broke off"):
        model(prompt(), past_key_values=cache)


def test_prefill_from_keeps_its_source_whatever_comes():
    model = tiny_model()
    full = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(), past_key_values=full)
    before = [layer.keys.clone() for layer in full.layers]
    cache = KnormCache(model, KnormPress(1.0))
    cache.prefill_from(full)
    cache.crop(-3)
    greedy(model, prompt(1), cache, 3)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(full.layers, before, strict=True))


def test_prefill_from_takes_a_whole_cache_into_an_empty_one():
    model = tiny_model()
    full, cache = DynamicCache(config=model.config), KnormCache(model, PRESS)
    assert cache.layers[0].positions.shape == (0, 0, 0)
    with torch.no_grad():
        model(prompt(), past_key_values=full)
    cache.prefill_from(full)
    with pytest.raises(KnormError, match="this cache has seen 24 tokens; prefill_from needs an empty one"):
        cache.prefill_from(full)
    full.layers[0].crop(-2)
    with pytest.raises(KnormError, match="layer 1 of the full cache is no whole full-attention layer of 22 tokens"):
        KnormCache(model, PRESS).prefill_from(full)
    del full.layers[1:]
    with pytest.raises(ValueError, match="shorter than argument 1"):
        KnormCache(model, PRESS).prefill_from(full)


def test_a_copied_model_is_another_model():
    model = tiny_model()
    cache = KnormCache(model, PRESS)
    with pytest.raises(KnormError, match="made for one LlamaForCausalLM and is used with another"):
        copy.deepcopy(model)(prompt(), past_key_values=cache)


def test_a_positional_generation_config_is_heeded():
    model = tiny_model()
    config = copy.deepcopy(model.generation_config)
    config.use_cache, config.max_new_tokens, config.do_sample = False, 4, False
    plain = model.generate(prompt(), config)
    with KnormPress(0.1, prune_after=2)(model):
        assert torch.equal(model.generate(prompt(), config), plain)


def test_stretched_rotations_and_padding_do_not_count_against_the_positions():
    model = copy.deepcopy(tiny_model())
    model.config.max_position_embeddings = 40
    padding = torch.tensor([[0] * 20 + [1] * 30])
    positions = (padding.cumsum(-1) - 1).clamp(min=0)
    cache = KnormCache(model, PRESS)
    with torch.no_grad():
        model(prompt(50)[:, :45], attention_mask=padding[:, :45], position_ids=positions[:, :45], past_key_values=cache)
        model(prompt(50)[:, 45:], attention_mask=padding, position_ids=positions[:, 45:], past_key_values=cache)
        model.config.rope_parameters = {**model.config.rope_parameters, "factor": 4.0}
        model(prompt(100), past_key_values=KnormCache(model, PRESS))
        with pytest.raises(KnormError, match="more than the model's 160 positions"):
            model(prompt(161), past_key_values=KnormCache(model, PRESS))

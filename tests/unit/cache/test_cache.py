"""The cache: what it stores, the states it goes on from, and what it refuses."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from transformers import DynamicCache

from knormpress import KnormCache, KnormError, KnormPress
from tests.oracle import assert_equal_to_masking, greedy, position_ids
from tests.strategies import left_padding, tiny_model, tokens

PRESS = KnormPress(0.5, prune_after=8, skip_layers=(0,), prune_interval=4)


def full_cache(model, ids):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


def test_keep_everything_is_the_full_cache():
    model = tiny_model()
    cache = KnormCache(model, KnormPress(1.0, prune_after=1))
    full = DynamicCache(config=model.config)
    ids = tokens(24)
    with torch.no_grad():
        for start, end in [(0, 10), (10, 18), (18, 19), (19, 20), (20, 24)]:
            ours = model(ids[:, start:end], past_key_values=cache).logits
            theirs = model(ids[:, start:end], past_key_values=full).logits
            assert torch.equal(ours, theirs)
    assert [layer.stored for layer in cache.layers] == [24] * 3


def test_stats_positions_and_bytes():
    model = tiny_model()
    cache = KnormCache(model, PRESS)
    assert cache.layers[0].positions.shape == (0, 0, 0)
    greedy(model, tokens(24), cache, 1)
    assert [(s.seen, s.stored, s.evicted) for s in cache.stats()] == [(24, 24, 0), (24, 12, 12), (24, 12, 12)]
    keys_and_values = 2 * 2 * 8 * 8  # two tensors, two heads, head size 8, float64
    assert [s.nbytes for s in cache.stats()] == [24 * keys_and_values, *[12 * (keys_and_values + 2 * 4)] * 2]
    assert cache.nbytes == sum(s.nbytes for s in cache.stats())
    for layer in cache.layers:
        assert layer.keys.untyped_storage().nbytes() == layer.keys.numel() * 8
        assert layer.positions.shape == layer.keys.shape[:3]
        assert (layer.positions.diff(dim=-1) > 0).all()


def test_kept_tokens_are_those_of_the_lowest_norm():
    model = tiny_model()
    full, cache = full_cache(model, tokens(24)), KnormCache(model, PRESS)
    greedy(model, tokens(24), cache, 1)
    for layer, source in list(zip(cache.layers, full.layers, strict=True))[1:]:
        expected = source.keys.norm(dim=-1).topk(12, largest=False).indices.sort().values
        assert torch.equal(layer.positions.long(), expected)
        assert torch.equal(layer.values, source.values[:, torch.arange(2)[:, None], expected[0]])


@pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0])
def test_prefill_from_a_full_cache_equals_a_prefill_and_leaves_its_source(ratio):
    model, press = tiny_model(), KnormPress(ratio, prune_after=8)
    full = full_cache(model, tokens(24))
    before = [layer.keys.clone() for layer in full.layers]
    shared, alone = KnormCache(model, press), KnormCache(model, press)
    shared.prefill_from(full)
    with torch.no_grad():
        model(tokens(24), past_key_values=alone)
        ours = model(tokens(6, seed=3), past_key_values=shared).logits
        theirs = model(tokens(6, seed=3), past_key_values=alone).logits
    assert torch.equal(ours, theirs)
    if ratio == 1.0:
        shared.crop(-9)
    greedy(model, tokens(1), shared, 3)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(full.layers, before, strict=True))


def test_prefill_from_takes_a_whole_cache_into_an_empty_one():
    model = tiny_model()
    full, cache = full_cache(model, tokens(24)), KnormCache(model, PRESS)
    cache.prefill_from(full)
    with pytest.raises(KnormError, match=r"24 tokens; prefill_from .* empty"):
        cache.prefill_from(full)
    full.layers[0].crop(-2)
    with pytest.raises(KnormError, match=r"layer 1 .* 22 tokens"):
        KnormCache(model, PRESS).prefill_from(full)
    del full.layers[1:]
    with pytest.raises(ValueError, match="shorter"):
        KnormCache(model, PRESS).prefill_from(full)


def test_a_copied_cache_goes_on_by_itself():
    model = tiny_model()
    cache = KnormCache(model, PRESS)
    greedy(model, tokens(24), cache, 3)
    twin = copy.deepcopy(cache)
    expected = greedy(model, tokens(1, seed=5), cache, 10)
    del cache
    gc.collect()
    assert torch.equal(greedy(model, tokens(1, seed=5), twin, 10), expected)


def test_two_models_in_turn():
    models = tiny_model(seed=0), tiny_model(seed=1)
    caches = [KnormCache(model, PRESS) for model in models]
    expected = [greedy(model, tokens(24), KnormCache(model, PRESS), 4) for model in models]
    ids = [tokens(24), tokens(24)]
    for step in range(4):
        for i, model in enumerate(models):
            ids[i] = greedy(model, ids[i], caches[i], 1)
            assert torch.equal(ids[i], expected[i][:, step : step + 1])


def test_reset_forgets_everything():
    model = tiny_model()
    cache = KnormCache(model, PRESS)
    first = greedy(model, tokens(24), cache, 20)
    cache.reset()
    assert (cache.nbytes, cache.get_seq_length()) == (0, 0)
    assert torch.equal(greedy(model, tokens(24), cache, 20), first)


@pytest.mark.parametrize("other", ["another", "a copy"])
def test_another_model_is_refused(other):
    model = tiny_model()
    cache = KnormCache(model, PRESS)
    user = tiny_model(seed=1) if other == "another" else copy.deepcopy(model)
    with pytest.raises(KnormError, match="LlamaForCausalLM and is used with another"):
        user(tokens(24), past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_a_deleted_model_is_told():
    model = copy.deepcopy(tiny_model())
    cache = KnormCache(model, PRESS)
    del model
    gc.collect()
    with pytest.raises(KnormError, match="deleted"):
        _ = cache.model
    with pytest.raises(KnormError, match="deleted"):
        tiny_model()(tokens(24), past_key_values=cache)


def test_another_batch_size_is_refused_and_nothing_is_lost():
    model = tiny_model()
    cache, other = KnormCache(model, PRESS), KnormCache(model, PRESS)
    for each in (cache, other):
        greedy(model, tokens(24), each, 2)
    with pytest.raises(KnormError, match=r"2 rows, .* holds 1"):
        model(tokens(3, rows=2), past_key_values=cache)
    assert torch.equal(greedy(model, tokens(1), cache, 6), greedy(model, tokens(1), other, 6))


@pytest.mark.parametrize(
    ("family", "broken", "told"),
    [("llama", 1, "layer 2 has seen 0 tokens, others 24"), ("gemma3", 0, "layer 0 has seen 48 tokens, others 0")],
)
def test_a_pass_that_broke_off_is_told(family, broken, told):
    model = tiny_model(family)
    cache = KnormCache(model, PRESS)

    def fail(*_):
        raise MemoryError

    handle = model.model.layers[broken].mlp.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        model(tokens(24), past_key_values=cache)
    handle.remove()
    with pytest.raises(KnormError, match=rf"{told}.* broke off; reset\(\)"):
        model(tokens(24), past_key_values=cache)
    cache.reset()
    fresh = KnormCache(model, PRESS)
    assert torch.equal(greedy(model, tokens(24), cache, 2), greedy(model, tokens(24), fresh, 2))


def test_keys_without_a_norm_are_refused_by_layer():
    model = copy.deepcopy(tiny_model())
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight[0, 0] = torch.nan
    with pytest.raises(KnormError, match=r"NaN or infinite .* layer 2"):
        model(tokens(24), past_key_values=KnormCache(model, PRESS))


def test_what_the_model_or_its_device_lacks_is_refused():
    with pytest.raises(KnormError, match="layer 3, but the model has 3"):
        KnormCache(tiny_model(), KnormPress(skip_layers=(3,)))
    with pytest.raises(KnormError, match=r"CUDA, .* on cpu"):
        KnormCache(tiny_model(), PRESS, offloading=True)


def test_learned_positions_that_run_out_are_refused_before_anything_changes():
    model = tiny_model("gpt2")
    cache = KnormCache(model, PRESS)
    with torch.no_grad():
        model(tokens(39), past_key_values=cache)
        before = cache.stats()
        for part in (500, 474):
            # The model's own table of positions ends there, too.
            with pytest.raises((KnormError, IndexError), match=r"512 positions|out of range"):
                model(torch.ones(1, part, dtype=torch.long), past_key_values=cache)
            assert cache.stats() == before
        model(torch.ones(1, 473, dtype=torch.long), past_key_values=cache)
    assert cache.get_seq_length() == 512


def warnings_of(caplog, limit: int) -> int:
    return sum(f"made for {limit} positions" in record.getMessage() for record in caplog.records)


def test_rotary_positions_go_on_and_the_model_says_once_that_they_ran_out(caplog):
    model = copy.deepcopy(tiny_model())
    model.config.max_position_embeddings = 40
    assert_equal_to_masking(model, KnormCache(model, PRESS), tokens(44), [36, 4, 4])
    gc.collect()
    assert_equal_to_masking(model, KnormCache(model, PRESS), tokens(44), [44])
    assert warnings_of(caplog, 40) == 1


def test_the_longest_row_is_the_one_that_runs_out_of_positions(caplog):
    model = copy.deepcopy(tiny_model())
    with torch.no_grad():
        ids, mask = torch.ones(2, 513, dtype=torch.long), left_padding(513, 0, 400)
        model(ids, attention_mask=mask, position_ids=position_ids(mask), past_key_values=KnormCache(model, PRESS))
    assert warnings_of(caplog, 512) == 1


def test_stretched_rotations_and_padding_do_not_count_against_the_positions(caplog):
    model = copy.deepcopy(tiny_model())
    model.config.max_position_embeddings = 40
    padding = left_padding(50, 20)
    positions = position_ids(padding)
    cache = KnormCache(model, PRESS)
    with torch.no_grad():
        for start, end in [(0, 45), (45, 50)]:
            own = {"attention_mask": padding[:, :end], "position_ids": positions[:, start:end]}
            model(tokens(50)[:, start:end], past_key_values=cache, **own)
        model.config.rope_parameters = {**model.config.rope_parameters, "factor": 4.0}
        model(tokens(160), past_key_values=KnormCache(model, PRESS))
        assert not caplog.records
        model(tokens(161), past_key_values=KnormCache(model, PRESS))
    assert warnings_of(caplog, 160) == 1


def test_long_decode_stays_exact():
    model = tiny_model()
    assert_equal_to_masking(model, KnormCache(model, PRESS), tokens(150), [30, *[1] * 120])


def test_compiled_decoding_equals_eager_decoding():
    """torch.compile traces around the cache; the eager backend runs what was traced, without a C++ compiler."""
    model, press = copy.deepcopy(tiny_model()), KnormPress(0.5, prune_after=8, skip_layers=(0,), prune_interval=1)
    # Each layer is traced anew: one that is never pruned and one that is are enough.
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    results = []
    for runner in (model, torch.compile(copy.deepcopy(model), backend="eager")):
        cache = KnormCache(getattr(runner, "_orig_mod", runner), press)
        mask, ids, logits = left_padding(28, 0, 9), tokens(24, rows=2), []
        positions = position_ids(mask)
        with torch.no_grad():
            for end in range(24, 28):
                own = {"attention_mask": mask[:, :end], "position_ids": positions[:, end - ids.shape[1] : end]}
                out = runner(ids, past_key_values=cache, **own).logits[:, -1:]
                logits.append(out)
                ids = out.argmax(-1)
        results.append((torch.cat(logits, dim=1), [layer.positions for layer in cache.layers]))
    torch._dynamo.reset()
    (eager, kept), (traced, kept_traced) = results
    assert (eager - traced).abs().max() < 1e-9
    assert all(torch.equal(a, b) for a, b in zip(kept, kept_traced, strict=True))

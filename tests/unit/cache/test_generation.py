"""Every way transformers generates through a pruned cache, and the contexts that give ``generate`` one."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from knormpress import KnormCache, KnormError, KnormPress
from tests.oracle import greedy
from tests.strategies import VOCABULARY, left_padding, tiny_model, tokens

PRESS = KnormPress(0.5, prune_after=8, skip_layers=(0,), prune_interval=4)
GREEDY = {"max_new_tokens": 16, "do_sample": False}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generate_equals_a_loop_by_hand(attention):
    model = tiny_model(attention=attention)
    generated = model.generate(tokens(24), past_key_values=KnormCache(model, PRESS), **GREEDY)
    assert torch.equal(generated[:, 24:], greedy(model, tokens(24), KnormCache(model, PRESS), 16))


def test_the_control_pruning_changes_the_text():
    model = tiny_model()
    pruned = model.generate(tokens(24), past_key_values=KnormCache(model, KnormPress(0.1, prune_after=8)), **GREEDY)
    assert not torch.equal(pruned, model.generate(tokens(24), **GREEDY))


def test_second_turn_on_a_filled_cache():
    model = tiny_model()
    cache, by_hand = KnormCache(model, PRESS), KnormCache(model, PRESS)
    first = model.generate(tokens(24), past_key_values=cache, **GREEDY)
    turn = tokens(9, seed=1)
    second = model.generate(torch.cat([first, turn], dim=1), past_key_values=cache, **GREEDY)
    assert torch.equal(greedy(model, tokens(24), by_hand, 16), first[:, 24:])
    assert torch.equal(greedy(model, torch.cat([first[:, -1:], turn], dim=1), by_hand, 16), second[:, -16:])


def test_chunked_prefill_of_generate_equals_passes_by_hand():
    model = tiny_model()
    generated = model.generate(tokens(30), past_key_values=KnormCache(model, PRESS), prefill_chunk_size=7, **GREEDY)
    cache = KnormCache(model, PRESS)
    *chunks, last = tokens(30).split(7, dim=1)
    with torch.no_grad():
        for chunk in chunks:
            model(chunk, past_key_values=cache)
    assert torch.equal(greedy(model, last, cache, 16), generated[:, 30:])


def test_a_context_with_chunks_prefills_in_chunks():
    """For each generation inside, padded batches too; what a call says itself counts more."""
    model, ids = tiny_model(), tokens(30, rows=2)
    mask = left_padding(30, 0, 5)
    given = {"attention_mask": mask, **GREEDY}
    by_hand, sent = [], []
    for size in (7, 30):
        by_hand.append(model.generate(ids, past_key_values=KnormCache(model, PRESS), prefill_chunk_size=size, **given))
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: sent.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try:
        with PRESS(model, prefill_chunk=7):
            assert torch.equal(model.generate(ids, **given), by_hand[0])
            assert sent[:5] == [(2, 7)] * 4 + [(2, 2)]
            assert torch.equal(model.generate(ids, prefill_chunk_size=30, **given), by_hand[1])
            sent.clear()
            config = GenerationConfig(prefill_chunk_size=15, **GREEDY)
            model.generate(ids, generation_config=config, attention_mask=mask)
            assert sent[0] == (2, 15)
    finally:
        hook.remove()
    with pytest.raises(KnormError, match="prefill_chunk is 0; wanted"), PRESS(model, prefill_chunk=0):
        pass


LOOPS = {
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 4, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "prefill in chunks": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize("loop", [*LOOPS, "an assistant"])
def test_nothing_pruned_gives_what_transformers_gives(loop):
    model, how = tiny_model(), LOOPS.get(loop) or {"assistant_model": tiny_model(seed=1)}
    ours = model.generate(tokens(24), past_key_values=KnormCache(model, KnormPress(1.0)), **GREEDY, **how)
    assert torch.equal(ours, model.generate(tokens(24), **GREEDY, **how))


def test_beams_carry_their_own_caches():
    """Beam search by full recomputation, on the pruned logits of each beam alone, finds the same beams."""
    model, beams, steps = tiny_model(), 3, 6
    how = {"num_beams": beams, "num_return_sequences": beams, "max_new_tokens": steps, "do_sample": False}
    found = model.generate(tokens(24), past_key_values=KnormCache(model, PRESS), **how)
    best = [(0.0, [])]
    for _ in range(steps):
        grown = []
        for score, chosen in best:
            cache = KnormCache(model, PRESS)
            with torch.no_grad():
                logits = model(tokens(24), past_key_values=cache).logits[0, -1]
                for token in chosen:
                    logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
            scores = logits.log_softmax(-1)
            grown += [(score + scores[t].item(), [*chosen, t]) for t in scores.topk(beams).indices.tolist()]
        best = sorted(grown, reverse=True)[:beams]
    assert found[:, 24:].tolist() == [chosen for _, chosen in best]


def test_sampled_sequences_of_one_prompt_equal_a_batch_of_it():
    model, made = tiny_model(), []
    for rows, sequences in ((1, 3), (3, 1)):
        torch.manual_seed(0)
        how = {"num_return_sequences": sequences, "do_sample": True, "max_new_tokens": 12}
        made.append(model.generate(tokens(24).repeat(rows, 1), past_key_values=KnormCache(model, PRESS), **how))
    assert torch.equal(*made)
    assert len({tuple(row) for row in made[0].tolist()}) > 1


@pytest.mark.parametrize("helper", ["assistant", "prompt lookup", "itself"])
def test_assisted_decoding_takes_back_what_was_not_accepted(helper):
    """The cache ends with exactly the accepted tokens, pruned to their budget."""
    model = tiny_model()
    helpers = {
        "assistant": {"assistant_model": tiny_model(seed=1)},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "itself": {"assistant_model": copy.deepcopy(model)},
    }
    cache = KnormCache(model, PRESS)
    out = model.generate(tokens(24), past_key_values=cache, **GREEDY, **helpers[helper])
    assert out.shape == (1, 40)
    seen = cache.get_seq_length()
    assert seen in (39, 40)
    assert cache.layers[0].positions[0, 0].tolist() == list(range(seen))
    assert all(layer.stored < seen / 2 + 1 + PRESS.prune_interval for layer in cache.layers[1:])
    assert all(layer.positions.max() < seen for layer in cache.layers)


def test_pruning_goes_on_after_assisted_decoding():
    model = tiny_model()
    cache = KnormCache(model, PRESS)
    first = model.generate(tokens(24), past_key_values=cache, prompt_lookup_num_tokens=3, **GREEDY)
    model.generate(torch.cat([first, tokens(60, seed=2)], dim=1), past_key_values=cache, **GREEDY)
    seen = cache.get_seq_length()
    assert seen > 100
    assert all(layer.stored < seen / 2 + 1 + PRESS.prune_interval for layer in cache.layers[1:])


def test_embeddings_as_the_prompt():
    model = tiny_model()
    embedded = model.get_input_embeddings()(tokens(24))
    ours = model.generate(inputs_embeds=embedded, past_key_values=KnormCache(model, PRESS), **GREEDY)
    assert torch.equal(ours, greedy(model, tokens(24), KnormCache(model, PRESS), 16))


def test_press_as_a_context_gives_each_generation_a_fresh_cache():
    model = tiny_model()
    expected = model.generate(tokens(24), past_key_values=KnormCache(model, PRESS), **GREEDY)
    plain = model.generate(tokens(24), **GREEDY)
    assert not torch.equal(expected, plain)
    config = copy.deepcopy(model.generation_config)
    config.update(use_cache=False, **GREEDY)
    with PRESS(model) as new_cache:
        for _ in range(2):
            result = model.generate(tokens(24), return_dict_in_generate=True, **GREEDY)
            assert torch.equal(result.sequences, expected)
            assert isinstance(result.past_key_values, KnormCache)
        assert new_cache().get_seq_length() == 0
        own = DynamicCache(config=model.config)
        assert torch.equal(model.generate(tokens(24), past_key_values=own, **GREEDY), plain)
        assert torch.equal(model.generate(tokens(24), use_cache=False, **GREEDY), plain)
        assert torch.equal(model.generate(tokens(24), config), plain)
        with pytest.raises(ValueError, match="cache_implementation"):
            model.generate(tokens(24), cache_implementation="quantized", **GREEDY)
    assert torch.equal(model.generate(tokens(24), **GREEDY), plain)


def hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_contexts_nest_and_leave_nothing_behind():
    model = copy.deepcopy(tiny_model())
    for module in model.modules():
        module._forward_pre_hooks.clear()  # copies of those that a living cache has on the original
    inner_press = KnormPress(0.2, prune_after=4)
    how = {"max_new_tokens": 1, "return_dict_in_generate": True}
    with PRESS(model):
        with (  # noqa: PT012 - what leaves the contexts is under test
            pytest.raises(RuntimeError, match="inside"),
            inner_press(model),
            PRESS(model),
            inner_press(model),
        ):
            out = model.generate(tokens(24), **how)
            assert out.past_key_values.press is inner_press
            raise RuntimeError("inside")
        out = model.generate(tokens(24), **how)
        assert out.past_key_values.press is PRESS
    assert "generate" not in vars(model)
    assert hooks(model) > 0
    del out
    gc.collect()
    assert hooks(model) == 0


def test_a_pipeline_generates_through_the_pruned_cache():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", unk_token="w1")
    model = tiny_model()
    text = " ".join(f"w{i}" for i in tokens(24)[0].tolist())
    generator = pipeline("text-generation", model=model, tokenizer=fast, device="cpu")
    with PRESS(model):
        said = generator(text, return_full_text=False, **GREEDY)[0]["generated_text"]
    expected = greedy(model, tokens(24), KnormCache(model, PRESS), 16)[0]
    assert said.split() == [f"w{i}" for i in expected.tolist()]

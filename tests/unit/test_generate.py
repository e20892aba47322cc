"""Every way transformers generates, and batches whose rows must be what each row is alone."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from knormpress import KnormCache, KnormError, KnormPress
from knormpress.masks import real_tokens
from tests.oracle import position_ids
from tests.strategies import VOCABULARY, presses, tiny_model

PRESS = KnormPress(0.5, prune_after=8, skip_layers=(0,), prune_interval=4)
WHOLE = KnormPress(1.0)
GREEDY = {"max_new_tokens": 16, "do_sample": False}


def prompt(length: int = 24, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (1, n) of unequal length as one left-padded batch, with its attention mask."""
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - row.shape[1]).long() for row in rows])
    return ids, mask


LOOPS = {
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 4, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "prefill in chunks": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize("loop", LOOPS, ids=str)
def test_nothing_pruned_gives_what_transformers_gives(loop):
    model = tiny_model()
    ours = model.generate(prompt(), past_key_values=KnormCache(model, WHOLE), **GREEDY, **LOOPS[loop])
    assert torch.equal(ours, model.generate(prompt(), **GREEDY, **LOOPS[loop]))


def test_nothing_pruned_assisted_by_another_model():
    model, assistant = tiny_model(), tiny_model(seed=1)
    ours = model.generate(prompt(), past_key_values=KnormCache(model, WHOLE), assistant_model=assistant, **GREEDY)
    assert torch.equal(ours, model.generate(prompt(), **GREEDY))


def test_beams_carry_their_own_caches():
    """Beam search by full recomputation, on the pruned logits of each beam alone, finds the same beams."""
    model, beams, steps = tiny_model(), 3, 6
    found = model.generate(
        prompt(),
        past_key_values=KnormCache(model, PRESS),
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=steps,
        do_sample=False,
    )
    best = [(0.0, [])]
    for _ in range(steps):
        grown = []
        for score, tokens in best:
            cache = KnormCache(model, PRESS)
            with torch.no_grad():
                logits = model(prompt(), past_key_values=cache).logits[0, -1]
                for token in tokens:
                    logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
            scores = logits.log_softmax(-1)
            grown += [(score + scores[t].item(), [*tokens, t]) for t in scores.topk(beams).indices.tolist()]
        best = sorted(grown, reverse=True)[:beams]
    assert found[:, 24:].tolist() == [tokens for _, tokens in best]


def test_sampled_sequences_of_one_prompt_equal_a_batch_of_it():
    model = tiny_model()
    torch.manual_seed(0)
    ours = model.generate(
        prompt(), past_key_values=KnormCache(model, PRESS), num_return_sequences=3, do_sample=True, max_new_tokens=12
    )
    torch.manual_seed(0)
    rows = model.generate(
        prompt().repeat(3, 1), past_key_values=KnormCache(model, PRESS), do_sample=True, max_new_tokens=12
    )
    assert torch.equal(ours, rows)
    assert len({tuple(row) for row in ours.tolist()}) > 1


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
    out = model.generate(prompt(), past_key_values=cache, **GREEDY, **helpers[helper])
    assert out.shape == (1, 40)
    seen = cache.get_seq_length()
    assert seen in (39, 40)
    assert cache.layers[0].positions[0, 0].tolist() == list(range(seen))
    assert all(layer.stored < seen / 2 + 1 + PRESS.prune_interval for layer in cache.layers[1:])
    assert all(layer.positions.max() == layer.positions.max().clamp(max=seen - 1) for layer in cache.layers)


def test_embeddings_as_the_prompt():
    model = tiny_model()
    embedded = model.generate(
        inputs_embeds=model.get_input_embeddings()(prompt()), past_key_values=KnormCache(model, PRESS), **GREEDY
    )
    assert torch.equal(embedded, model.generate(prompt(), past_key_values=KnormCache(model, PRESS), **GREEDY)[:, 24:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_batch_generates_what_each_row_generates_alone(attention):
    # In float64 eager attention itself gives NaN for padding: it takes its softmax in float32.
    model = tiny_model(attention=attention, dtype=torch.float64 if attention == "sdpa" else torch.float32)
    rows = [prompt(24), prompt(7, seed=1), prompt(2, seed=2), prompt(15, seed=3)]
    ids, mask = padded(rows)
    together = model.generate(ids, attention_mask=mask, past_key_values=KnormCache(model, PRESS), **GREEDY)
    for row, out in zip(rows, together, strict=True):
        alone = model.generate(row, past_key_values=KnormCache(model, PRESS), **GREEDY)
        assert torch.equal(alone[0, row.shape[1] :], out[24:])


@given(
    press=presses(),
    lengths=st.lists(st.integers(2, 30), min_size=2, max_size=4),
    decoded=st.integers(0, 12),
)
@settings(max_examples=30, deadline=None)
def test_a_padded_batch_holds_what_each_row_holds_alone(press, lengths, decoded):
    model = tiny_model()
    rows = [prompt(length, seed=length) for length in lengths]
    ids, mask = padded(rows)
    more = prompt(decoded, rows=len(rows), seed=9)
    together = KnormCache(model, press)
    width = ids.shape[1]
    mask = torch.cat([mask, torch.ones_like(more)], dim=1)
    positions = position_ids(mask)
    with torch.no_grad():
        out = [model(ids, attention_mask=mask[:, :width], position_ids=positions[:, :width], past_key_values=together)]
        for step in range(decoded):
            end = width + step + 1
            out.append(
                model(
                    more[:, step : step + 1],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, end - 1 : end],
                    past_key_values=together,
                )
            )
    for index, row in enumerate(rows):
        alone = KnormCache(model, press)
        with torch.no_grad():
            own = [model(row, past_key_values=alone)]
            own += [model(more[index : index + 1, step : step + 1], past_key_values=alone) for step in range(decoded)]
        for ours, theirs in zip(out, own, strict=True):
            assert (ours.logits[index, -1] - theirs.logits[0, -1]).abs().max() < 1e-9
        shift = width - row.shape[1]
        for batch_layer, layer in zip(together.layers, alone.layers, strict=True):
            for head in range(2):
                kept = batch_layer.positions[index, head]
                kept = kept[kept >= shift] - shift
                assert kept.tolist() == layer.positions[0, head].tolist()


def test_right_padding_is_exact_too():
    model = tiny_model()
    short, long = prompt(9, seed=1), prompt(20, seed=2)
    ids = torch.cat([torch.nn.functional.pad(short, (0, 11)), long])
    mask = torch.tensor([[1] * 9 + [0] * 11, [1] * 20])
    more = prompt(5, rows=2, seed=3)
    together, alone = KnormCache(model, PRESS), KnormCache(model, PRESS)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=together)
        positions = torch.stack([torch.arange(9, 14), torch.arange(20, 25)])
        ours = model(
            more,
            attention_mask=torch.cat([mask, torch.ones_like(more)], dim=1),
            position_ids=positions,
            past_key_values=together,
        ).logits[0]
        model(short, past_key_values=alone)
        theirs = model(more[:1], past_key_values=alone).logits[0]
    assert (ours - theirs).abs().max() < 1e-9


@pytest.mark.parametrize("additive", [False, True])
def test_a_custom_mask_over_all_tokens_is_cut_to_each_layers_own(additive):
    """Past tokens that a query's own mask hides stay hidden after pruning, whether they were kept or not."""
    model = tiny_model()
    ids, past, new = prompt(30), 24, 6
    hidden = torch.rand(1, 1, new, past, generator=torch.Generator().manual_seed(4)) < 0.4
    own = torch.ones(new, new, dtype=torch.bool).tril()[None, None]
    mask = torch.cat([~hidden, own], dim=-1)
    given_mask = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, -1e30) if additive else mask
    cache = KnormCache(model, PRESS)
    reference = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :past], past_key_values=cache)
        model(ids[:, :past], past_key_values=reference)
        kept = [layer.positions.clone().long() for layer in cache.layers]
        ours = model(ids[:, past:], attention_mask=given_mask, past_key_values=cache).logits
    handles = []
    for index, layer in enumerate(model.model.layers):
        stays = torch.zeros(1, 2, past, dtype=torch.bool).scatter(-1, kept[index], True)
        allowed = torch.cat(
            [(~hidden) & stays.repeat_interleave(2, dim=1)[:, :, None], own.expand(1, 4, -1, -1)], dim=-1
        )

        def give(module, args, kwargs, allowed=allowed):
            return args, {**kwargs, "attention_mask": allowed}

        handles.append(layer.self_attn.register_forward_pre_hook(give, with_kwargs=True))
    with torch.no_grad():
        theirs = model(ids[:, past:], attention_mask=mask, past_key_values=reference).logits
    for handle in handles:
        handle.remove()
    assert (ours - theirs).abs().max() < 1e-9


def test_a_custom_mask_that_covers_too_little_is_refused():
    model = tiny_model()
    cache = KnormCache(model, PRESS)
    with torch.no_grad():
        model(prompt(), past_key_values=cache)
        with pytest.raises(KnormError, match="mask covers 15 tokens, but 24 were seen and 3 come"):
            model(prompt(3), attention_mask=torch.ones(1, 1, 3, 15, dtype=torch.bool), past_key_values=cache)
    assert cache.get_seq_length() == 24


def test_rows_are_selected_and_repeated():
    model = tiny_model()
    rows = [prompt(24), prompt(10, seed=1), prompt(17, seed=2)]
    ids, mask = padded(rows)
    positions = position_ids(mask)
    caches = [KnormCache(model, PRESS) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    caches[0].batch_select_indices(torch.tensor([2, 1]))
    caches[0].batch_repeat_interleave(2)
    caches[1].reorder_cache(torch.tensor([2, 2, 1, 1]))
    for row in (0, 2):
        alone = KnormCache(model, PRESS)
        source = rows[2] if row == 0 else rows[1]
        more = prompt(1, seed=7)
        with torch.no_grad():
            model(source, past_key_values=alone)
            theirs = model(more, past_key_values=alone).logits[0]
            for cache in caches:
                twin = copy.deepcopy(cache)
                chosen = mask[[2, 2, 1, 1]]
                ours = model(
                    more.repeat(4, 1),
                    attention_mask=torch.cat([chosen, torch.ones(4, 1, dtype=torch.long)], dim=1),
                    position_ids=chosen.sum(1, keepdim=True),
                    past_key_values=twin,
                ).logits[row : row + 2]
                assert (ours - theirs).abs().max() < 1e-9


def test_a_pipeline_generates_through_the_pruned_cache():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", unk_token="w1")
    model = tiny_model()
    text = " ".join(f"w{i}" for i in prompt()[0].tolist())
    generator = pipeline("text-generation", model=model, tokenizer=fast, device="cpu")
    with PRESS(model):
        said = generator(text, max_new_tokens=16, do_sample=False, return_full_text=False)[0]["generated_text"]
    expected = model.generate(prompt(), past_key_values=KnormCache(model, PRESS), **GREEDY)[0, 24:]
    assert said.split() == [f"w{i}" for i in expected.tolist()]


def test_another_cache_implementation_is_not_silently_ignored():
    model = tiny_model()
    with PRESS(model), pytest.raises(ValueError, match="cache_implementation"):
        model.generate(prompt(), cache_implementation="quantized", **GREEDY)


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
        model(prompt(total), attention_mask=mask, past_key_values=cache)
    assert all(layer.positions.min() >= pad for layer in cache.layers[1:])
    assert [layer.stored for layer in cache.layers] == [24, 8, 8]


def test_a_mask_left_out_after_padding_is_refused():
    model = tiny_model()
    cache = KnormCache(model, PRESS)
    mask = torch.tensor([[0] * 4 + [1] * 20])
    with torch.no_grad():
        model(prompt(), attention_mask=mask, past_key_values=cache)
        before = cache.stats()
        with pytest.raises(KnormError, match="an earlier pass had padding, but this one has no attention_mask"):
            model(prompt(1), past_key_values=cache)
    assert cache.stats() == before


def test_a_token_is_real_if_one_head_attends_to_it():
    """Head 0 hides token 1 from all, head 1 does not; token 2 is hidden by both."""
    allowed = torch.ones(1, 2, 4, 4, dtype=torch.bool).tril()
    allowed[0, 0, :, 1] = allowed[0, :, :, 2] = False
    assert real_tokens(allowed, 0, 4).tolist() == [[True, True, False, True]]


def test_empty_slots_are_told_by_minus_one():
    model = tiny_model()
    ids, mask = padded([prompt(24), prompt(10, seed=1)])
    cache = KnormCache(model, PRESS)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=position_ids(mask), past_key_values=cache)
    assert cache.layers[1].positions[1, :, :7].unique().tolist() == [-1]


def test_a_mask_that_shows_padding_shows_no_empty_slot():
    """Padding is never kept, so a later mask over it hides or shows nothing."""
    model = tiny_model()
    ids, mask = padded([prompt(24), prompt(10, seed=1)])
    positions = position_ids(torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], dim=1))
    shows = torch.cat([torch.ones(2, 1, 3, 24, dtype=torch.bool), torch.ones(2, 1, 3, 3).tril().bool()], dim=-1)
    hides = shows.clone()
    hides[1, ..., :14] = False
    logits = []
    for later in (shows, hides):
        cache = KnormCache(model, KnormPress(0.5, prune_after=8, skip_layers=()))
        with torch.no_grad():
            model(ids, attention_mask=mask, position_ids=positions[:, :24], past_key_values=cache)
            own = {"attention_mask": later, "position_ids": positions[:, 24:]}
            logits.append(model(prompt(3, rows=2), past_key_values=cache, **own).logits)
    assert torch.equal(*logits)


def test_a_mask_lives_no_longer_than_its_pass():
    model = tiny_model()
    mask = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril()
    alive = weakref.ref(mask)
    cache = KnormCache(model, PRESS)
    with torch.no_grad():
        model(prompt(), attention_mask=mask, past_key_values=cache)
    del mask
    gc.collect()
    assert alive() is None


def test_the_longest_row_goes_on_alone_and_needs_no_mask():
    model = tiny_model()
    rows = [prompt(24), prompt(10, seed=1)]
    ids, mask = padded(rows)
    cache, alone = KnormCache(model, PRESS), KnormCache(model, PRESS)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=position_ids(mask), past_key_values=cache)
        model(rows[0], past_key_values=alone)
        cache.batch_select_indices(torch.tensor([0]))
        for seed in range(6):
            ours = model(prompt(1, seed=seed), past_key_values=cache).logits
            theirs = model(prompt(1, seed=seed), past_key_values=alone).logits
            assert (ours - theirs).abs().max() < 1e-9

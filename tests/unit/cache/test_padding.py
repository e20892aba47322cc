"""Batches of unequal rows: each row must be what it is alone, whatever becomes of the rows beside it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from knormpress import KnormCache, KnormError, KnormPress
from tests.oracle import position_ids
from tests.strategies import left_padding, presses, tiny_model, tokens

PRESS = KnormPress(0.5, prune_after=8, skip_layers=(0,), prune_interval=4)


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (1, n) of unequal length as one left-padded batch, with its attention mask."""
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    return ids, left_padding(width, *(width - row.shape[1] for row in rows))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_batch_generates_what_each_row_generates_alone(attention):
    # In float64 eager attention itself gives NaN for padding: it takes its softmax in float32.
    model = tiny_model(attention=attention, dtype=torch.float64 if attention == "sdpa" else torch.float32)
    rows, how = [tokens(n, seed=n) for n in (24, 7, 2, 15)], {"max_new_tokens": 16, "do_sample": False}
    ids, mask = padded(rows)
    together = model.generate(ids, attention_mask=mask, past_key_values=KnormCache(model, PRESS), **how)
    for row, out in zip(rows, together, strict=True):
        alone = model.generate(row, past_key_values=KnormCache(model, PRESS), **how)
        assert torch.equal(alone[0, row.shape[1] :], out[24:])


@given(
    press=presses(),
    lengths=st.lists(st.integers(2, 30), min_size=2, max_size=4),
    decoded=st.integers(0, 12),
)
@settings(max_examples=30)
def test_a_padded_batch_holds_what_each_row_holds_alone(press, lengths, decoded):
    model = tiny_model()
    rows = [tokens(length, seed=length) for length in lengths]
    ids, mask = padded(rows)
    more = tokens(decoded, rows=len(rows), seed=9)
    together = KnormCache(model, press)
    width = ids.shape[1]
    mask = torch.cat([mask, torch.ones_like(more)], dim=1)
    positions = position_ids(mask)
    with torch.no_grad():
        out = [model(ids, attention_mask=mask[:, :width], position_ids=positions[:, :width], past_key_values=together)]
        for end in range(width + 1, width + decoded + 1):
            own = {"attention_mask": mask[:, :end], "position_ids": positions[:, end - 1 : end]}
            out.append(model(more[:, end - width - 1 : end - width], past_key_values=together, **own))
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
    short, long = tokens(9, seed=1), tokens(20, seed=2)
    ids = torch.cat([torch.nn.functional.pad(short, (0, 11)), long])
    mask = torch.tensor([[1] * 9 + [0] * 11 + [1] * 5, [1] * 25])
    positions = torch.stack([torch.arange(9, 14), torch.arange(20, 25)])
    more = tokens(5, rows=2, seed=3)
    together, alone = KnormCache(model, PRESS), KnormCache(model, PRESS)
    with torch.no_grad():
        model(ids, attention_mask=mask[:, :20], past_key_values=together)
        ours = model(more, attention_mask=mask, position_ids=positions, past_key_values=together).logits[0]
        model(short, past_key_values=alone)
        theirs = model(more[:1], past_key_values=alone).logits[0]
    assert (ours - theirs).abs().max() < 1e-9


def test_rows_are_selected_and_repeated():
    model = tiny_model()
    rows = [tokens(24), tokens(10, seed=1), tokens(17, seed=2)]
    ids, mask = padded(rows)
    caches = [KnormCache(model, PRESS) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(ids, attention_mask=mask, position_ids=position_ids(mask), past_key_values=cache)
    caches[0].batch_select_indices(torch.tensor([2, 1]))
    caches[0].batch_repeat_interleave(2)
    caches[1].reorder_cache(torch.tensor([2, 2, 1, 1]))
    chosen = mask[[2, 2, 1, 1]]
    own = {
        "attention_mask": torch.cat([chosen, torch.ones(4, 1, dtype=torch.long)], dim=1),
        "position_ids": chosen.sum(1, keepdim=True),
    }
    more = tokens(1, seed=7)
    for place, source in ((0, rows[2]), (2, rows[1])):
        alone = KnormCache(model, PRESS)
        with torch.no_grad():
            model(source, past_key_values=alone)
            theirs = model(more, past_key_values=alone).logits[0]
            for cache in caches:
                ours = model(more.repeat(4, 1), past_key_values=copy.deepcopy(cache), **own).logits
                assert (ours[place : place + 2] - theirs).abs().max() < 1e-9


def test_the_longest_row_goes_on_alone_and_needs_no_mask():
    model = tiny_model()
    rows = [tokens(24), tokens(10, seed=1)]
    ids, mask = padded(rows)
    cache, alone = KnormCache(model, PRESS), KnormCache(model, PRESS)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=position_ids(mask), past_key_values=cache)
        model(rows[0], past_key_values=alone)
        cache.batch_select_indices(torch.tensor([0]))
        for seed in range(6):
            ours = model(tokens(1, seed=seed), past_key_values=cache).logits
            theirs = model(tokens(1, seed=seed), past_key_values=alone).logits
            assert (ours - theirs).abs().max() < 1e-9


@given(
    press=presses(),
    real=st.lists(st.lists(st.booleans(), min_size=14, max_size=14), min_size=2, max_size=3),
    prompt=st.integers(4, 24),
)
@example(KnormPress(0.9, prune_after=8, skip_layers=(), schedule="iterative"), [[True] * 14, [True, False] * 7], 20)
@example(KnormPress(0.5, prune_after=24, skip_layers=(), prune_interval=2), [[False, True] * 7, [True] * 14], 20)
@settings(max_examples=20)
def test_single_tokens_of_which_some_are_padding(press, real, prompt):
    """Which are is on the device, and counted only where a row might be pruned."""
    model, rows, new = tiny_model(), len(real), len(real[0])
    ids = tokens(prompt + new, rows=rows)
    mask = torch.cat([left_padding(prompt, *range(0, 3 * rows, 3)), torch.tensor(real).long()], dim=1)
    positions, cache = position_ids(mask), KnormCache(model, press)
    with torch.no_grad():
        for start, end in [(0, prompt), *((at, at + 1) for at in range(prompt, prompt + new))]:
            own = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
            model(ids[:, start:end], past_key_values=cache, **own)
    for row in range(rows):
        alone, places = KnormCache(model, press), mask[row].nonzero()[:, 0]
        with torch.no_grad():
            for part in (places[places < prompt], *places[places >= prompt].split(1)):
                if len(part):
                    model(ids[row : row + 1, part], past_key_values=alone)
        for layer, other in zip(cache.layers, alone.layers, strict=True):
            for head in range(2):
                kept = [place for place in layer.positions[row, head].tolist() if place >= 0 and mask[row, place]]
                assert kept == places[other.positions[0, head].long()].tolist()


def test_what_is_wrong_with_a_padded_batch_is_said_before_it_is_pruned_again():
    """A decoded token of it waits for nothing, so the scores of one pruning are looked at by the next."""
    model, ids, mask = tiny_model(), tokens(60, rows=2), left_padding(60, 0, 9)
    positions = position_ids(mask)

    def fails_later(held):
        scores = held.keys.norm(dim=-1)
        return scores * float("nan") if held.keys.shape[2] < 20 else scores

    cache, pruned = KnormCache(model, PRESS, fails_later), set()

    def decode():
        for start, end in [(0, 24), *((place, place + 1) for place in range(24, 60))]:
            own = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
            model(ids[:, start:end], past_key_values=cache, **own)
            pruned.add(cache.layers[1].pruned_at)

    with torch.no_grad(), pytest.raises(KnormError, match="fails_later is NaN"):
        decode()
    assert max(pruned) < 40
    assert len(pruned) == 2

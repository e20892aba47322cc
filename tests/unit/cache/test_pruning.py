"""Budgets, selection and gathering, against small independent references."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knormpress.cache.layer import KnormLayer, TokenLog
from knormpress.cache.pruning import budget, gather, select
from knormpress.cache.score import key_norms
from knormpress.policy.policy import Policy
from tests.fake_accelerator import CPU, DEVICE, FakeAccelerator
from tests.strategies import held

# Few distinct values, so that ties are the rule.
tied_scores = st.integers(1, 30).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 4), min_size=n, max_size=n), min_size=1, max_size=3)
)


def reference(row: list[float], kept: int, real: list[bool], recent: int) -> list[int]:
    """The slots to keep, by sorting (score, age) in plain Python."""
    slots = [slot for slot in range(len(row)) if real[slot]]
    forced = slots[len(slots) - recent :] if recent else []
    others = sorted((slot for slot in slots if slot not in forced), key=lambda slot: (row[slot], slot))
    return sorted((forced[-kept:] + others)[:kept]) if kept else []


@pytest.mark.parametrize("device", [CPU, DEVICE], ids=str)
@given(rows=tied_scores, data=st.data())
def test_selects_the_lowest_and_breaks_ties_by_age(device, rows, data):
    """On the CPU, and on an accelerator, where other functions find them; a stand-in for one."""
    scores = torch.tensor(rows, dtype=torch.float32)[:, None]
    n = scores.shape[-1]
    real = [data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for _ in rows]
    for row in real:
        row[data.draw(st.integers(0, n - 1))] = True
    recent = data.draw(st.integers(0, 3))
    budgets = [data.draw(st.integers(min(max(1, recent), sum(row)), sum(row))) for row in real]
    with FakeAccelerator() as there:
        scores, is_real = (
            each if device == CPU else there.place(each) for each in (scores, torch.tensor(real)[:, None])
        )
        slots = select(scores, budgets, real=is_real, keep_recent=recent).cpu()
    assert slots.shape == (len(rows), 1, max(budgets))
    for row, kept, is_real, found in zip(rows, budgets, real, slots[:, 0].tolist(), strict=True):
        assert found[: max(budgets) - kept] == [-1] * (max(budgets) - kept)
        assert found[max(budgets) - kept :] == reference(row, kept, is_real, recent)


def test_heads_choose_for_themselves_and_keep_the_oldest_of_equals():
    assert select(torch.tensor([[[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]]]), [2]).tolist() == [[[1, 2], [0, 1]]]
    assert select(torch.ones(1, 2, 500), [250])[0].tolist() == [list(range(250))] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_keys_made_to_tie_leave_the_older_token(dtype):
    """Signs do not change a norm, nor its rounding: 40 keys of two lengths, every long one older."""
    signs = torch.randint(0, 2, (1, 2, 40, 16), generator=torch.Generator().manual_seed(0)) * 2 - 1
    lengths = torch.linspace(0.1, 2.3, 16) * torch.tensor([3.0] * 20 + [1.0] * 20)[:, None]
    keys = (signs * lengths).to(dtype)
    assert key_norms(held(keys)).unique().numel() == 2
    assert select(key_norms(held(keys)), [25])[0].tolist() == [[*range(5), *range(20, 40)]] * 2
    layer = KnormLayer(0, Policy(0.25, prune_after=1), 0.25, key_norms, TokenLog())
    layer.update(keys, keys)
    assert layer.positions[0].tolist() == [list(range(20, 30))] * 2


def test_gather_takes_new_storage():
    states = torch.randn(2, 3, 10, 4)
    slots = torch.tensor([0, 3, 9]).expand(2, 3, 3)
    kept = gather(states, slots)
    assert torch.equal(kept, states[:, :, [0, 3, 9]])
    assert kept.untyped_storage().nbytes() == kept.numel() * 4
    assert kept.is_contiguous()


@pytest.mark.parametrize(
    "states",
    [
        torch.randn(2, 3, 16, 4)[:, :, :10],
        torch.randn(2, 10, 3, 4).transpose(1, 2),
        torch.randn(2, 3, 4, 10).transpose(2, 3),
        torch.randn(2, 3, 10, 8)[..., :4],
        torch.randn(2, 3, 10, 9)[..., :4],
        torch.randn(3, 2, 3, 10)[1],
        torch.arange(10).expand(2, 3, 10),
    ],
    ids=["spare room", "transposed", "keys by column", "half heads", "odd stride", "no inner", "expanded"],
)
def test_gathers_from_any_layout(states):
    slots = torch.stack([torch.randperm(10)[:6].sort().values for _ in range(6)]).view(2, 3, 6)
    kept = gather(states, slots)
    assert kept.is_contiguous()
    for row in range(2):
        for head in range(3):
            assert torch.equal(kept[row, head], states[row, head][slots[row, head]])


def test_rows_without_a_budget_are_empty():
    assert select(torch.rand(2, 1, 3), [0, 2])[0].tolist() == [[-1, -1]]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_norms_are_wide(dtype, expected):
    keys = torch.full((1, 1, 2, 64), 300.0).to(dtype)
    norms = key_norms(held(keys))
    assert norms.dtype == expected
    assert torch.allclose(norms, keys.to(torch.float64).square().sum(-1).sqrt().to(expected))


def decide(press: Policy, lengths: list[int]) -> list[tuple[int, int]]:
    """(seen, stored) after each pass of ``lengths`` tokens."""
    seen = stored = 0
    states = []
    for new in lengths:
        seen, stored = seen + new, stored + new
        stored = budget(press, press.keep_ratio, seen=seen, stored=stored, new=new)
        states.append((seen, stored))
    return states


def test_proportional_schedule_step_by_step():
    press = Policy(0.5, prune_after=10, prune_interval=3)
    assert decide(press, [9, 1, 1, 1, 1, 1, 1, 4]) == [
        (9, 9),  # below prune_after
        (10, 5),  # the first pass at it prunes at once, though it brought one token
        (11, 6),
        (12, 7),
        (13, 8),
        (14, 9),
        (15, 10),
        (19, 10),  # a pass of several tokens prunes at once
    ]


def test_decoding_prunes_once_the_interval_is_full():
    states = decide(Policy(0.5, prune_after=10, prune_interval=3), [10, *[1] * 40])
    over = [stored - math.ceil(seen / 2) for seen, stored in states]
    assert max(over) < 3
    assert over.count(0) < len(over) / 2


@given(
    ratio=st.integers(1, 100).map(lambda p: p / 100),
    prune_after=st.integers(1, 60),
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=12),
)
def test_iterative_schedule_is_the_papers(ratio, prune_after, lengths):
    expected = 0
    press = Policy(ratio, prune_after=prune_after, schedule="iterative")
    for new, (_, stored) in zip(lengths, decide(press, lengths), strict=True):
        expected += new
        if expected >= prune_after:
            expected = math.ceil(Fraction(str(ratio)) * expected)
        assert stored == expected


@given(ratio=st.integers(1, 100).map(lambda p: p / 100), prune_after=st.integers(1, 60), prompt=st.integers(1, 200))
def test_one_prefill_keeps_the_share_of_the_prompt(ratio, prune_after, prompt):
    stored = budget(Policy(ratio, prune_after=prune_after), ratio, seen=prompt, stored=prompt, new=prompt)
    assert stored == (math.ceil(Fraction(str(ratio)) * prompt) if prompt >= prune_after else prompt)


@pytest.mark.parametrize(("recent", "kept"), [(0, 10), (9, 10), (30, 30), (300, 100)])
def test_keep_recent_is_a_floor(recent, kept):
    press = Policy(0.1, prune_after=1, keep_recent=recent)
    assert budget(press, 0.1, seen=100, stored=100, new=100) == kept


def test_a_row_that_got_no_token_is_left_alone():
    press = Policy(0.5, prune_after=8)
    assert budget(press, 0.5, seen=40, stored=30, new=0) == 30
    assert budget(press, 0.5, seen=40, stored=30, new=2) == 20


@given(
    ratio=st.integers(5, 100).map(lambda p: p / 100),
    prune_after=st.integers(1, 30),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    seed=st.integers(0, 999),
)
def test_iterative_kept_sets_are_the_papers(ratio, prune_after, lengths, seed):
    """Against a plain reference: at len >= prune_after keep the ceil(r * len) stored keys of the lowest norm."""
    press = Policy(ratio, prune_after=prune_after, skip_layers=(), schedule="iterative")
    layer = KnormLayer(0, press, ratio, key_norms, TokenLog())
    keys = torch.randn(1, 1, sum(lengths), 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    norms = keys[0, 0].norm(dim=-1).tolist()
    stored, start = [], 0
    for new in lengths:
        layer.update(keys[:, :, start : start + new], keys[:, :, start : start + new])
        stored += range(start, start + new)
        start += new
        if len(stored) >= prune_after:
            kept = math.ceil(Fraction(str(ratio)) * len(stored))
            stored = sorted(sorted(stored, key=lambda position: norms[position])[:kept])
        assert layer.positions[0, 0].tolist() == stored
        assert torch.equal(layer.keys[0, 0], keys[0, 0, stored])

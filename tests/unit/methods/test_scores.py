"""The scores: finite, one for every head and token, and random where they say so."""

from __future__ import annotations

import pytest
import torch

from knormpress.cache.score import StoredTokens
from knormpress.cache.scores.controls import random_order
from knormpress.cache.scores.keydiff import key_difference, key_difference_in_windows
from knormpress.cache.scores.leverage import leverage
from knormpress.cache.scores.named import SCORES
from knormpress.cache.scores.windows import window_sums


def given(keys: torch.Tensor, positions: torch.Tensor | None = None, layer: int = 0) -> StoredTokens:
    """Stored tokens with ``keys`` (B, H, n, D); in order from 0 unless ``positions`` (1, 1, n) are given."""
    places = torch.arange(keys.shape[2]).view(1, 1, -1) if positions is None else positions
    return StoredTokens(keys, keys, places.expand(keys.shape[:-1]), layer)


@pytest.mark.parametrize("score", SCORES.values())
def test_scores_have_a_value_for_every_head_and_are_finite(score):
    scores = score(given(torch.randn(2, 3, 9, 4)))
    assert scores.shape == (2, 3, 9)
    assert scores.is_floating_point()
    assert scores.isfinite().all()


def test_key_difference_in_windows_compares_with_the_keys_of_the_window():
    """A direction that is common in one window and rare in the next is kept there alone; what is left has no window."""
    common, rare = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    keys = torch.cat([common.expand(128, 2), rare.expand(128 + 50, 2)])
    keys[[7, 150, 300]] = torch.stack([rare, common, common])
    scores = key_difference_in_windows(given(keys[None, None]))[0, 0]
    assert set(scores.argsort()[:3].tolist()) == {7, 150, 300}
    assert key_difference(given(keys[None, None]))[0, 0][7] > scores[7] + 0.5


def test_leverage_is_the_share_of_the_window_in_keys_times_that_in_values():
    """Windows of 16 and 16, and the 7 left over with the second; the sinks come first whatever they hold."""
    keys, values = torch.rand(2, 1, 2, 39, 4, dtype=torch.float64)
    tokens = StoredTokens(keys, values, torch.arange(39).expand(1, 2, -1), 0)
    scores = leverage(tokens)
    assert (scores[..., :4] == -2).all()
    squares = keys.square().sum(-1) * values.square().sum(-1)
    for window in (slice(4, 16), slice(16, 39)):
        whole = slice(0, 16) if window.start == 4 else window
        sums = keys[:, :, whole].square().sum((2, 3)) * values[:, :, whole].square().sum((2, 3))
        torch.testing.assert_close(scores[..., window], -squares[..., window] / sums[..., None])


@pytest.mark.parametrize("size", [1, 4, 16, 100])
def test_window_sums_see_no_padding(size):
    """Rows with holes and padding anywhere get what they get without them."""
    generator = torch.Generator().manual_seed(size)
    amounts = torch.rand(2, 3, 40, 2, dtype=torch.float64, generator=generator)
    real = torch.rand(2, 3, 40, generator=generator) < 0.7
    sums = window_sums(amounts, real, size)
    for row in range(2):
        for head in range(3):
            own = amounts[row, head][real[row, head]][None, None]
            alone = window_sums(own, torch.ones(own.shape[:3], dtype=torch.bool), size)
            assert torch.equal(sums[row, head][real[row, head]], alone[0, 0])
            ends = [*range(size, own.shape[2] - size + 1, size), own.shape[2]]
            torch.testing.assert_close(alone[0, 0, -1], own[0, 0, ends[-2] if len(ends) > 1 else 0 :].sum(0))


def test_key_difference_keeps_the_key_that_points_elsewhere():
    keys = torch.tensor([[1.0, 0.1], [2.0, 0.0], [0.0, 0.5], [3.0, -0.1]])[None, None]
    assert key_difference(given(keys)).argmin() == 2


def test_random_order_depends_on_position_head_and_layer_alone():
    positions = torch.arange(300).view(1, 1, -1)
    scores = random_order(given(torch.randn(2, 3, 300, 8), positions, 1))
    again = random_order(given(torch.zeros(2, 3, 300, 8, dtype=torch.float16), positions.int(), 1))
    assert scores.shape == (2, 3, 300)
    assert torch.equal(scores, again)
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0, 0], scores[0, 1])
    assert not torch.equal(scores, random_order(given(torch.zeros(2, 3, 300, 8), positions, 2)))
    later = random_order(given(torch.zeros(1, 3, 100, 8), positions[..., 200:], 1))
    assert torch.equal(later[0], scores[0, :, 200:])


def test_random_order_is_spread_evenly_over_the_text():
    """The lowest half must not favour the beginning, the end, or even positions, and heads must choose apart."""
    positions = torch.arange(4096).view(1, 1, -1)
    order = random_order(given(torch.zeros(1, 8, 4096, 1), positions, 0))[0]
    assert order.unique().numel() > 0.99 * order.numel()
    kept = order < order.median(dim=-1, keepdim=True).values
    quarters = kept.view(8, 4, 1024).float().mean(dim=-1)
    assert quarters.sub(0.5).abs().max() < 0.08
    assert kept[:, ::2].float().mean(dim=-1).sub(0.5).abs().max() < 0.05
    agreement = (kept[:, None] == kept[None]).float().mean(dim=-1)
    assert agreement.fill_diagonal_(0.5).sub(0.5).abs().max() < 0.05


def test_random_order_spares_no_token():
    """The first token draws much attention: over heads and layers it is kept as often as any other."""
    positions = torch.arange(64).view(1, 1, -1)
    kept = torch.stack([random_order(given(torch.zeros(1, 8, 64, 1), positions, layer))[0] for layer in range(64)])
    share = (kept.argsort(dim=-1).argsort(dim=-1) < 32).float().mean(dim=(0, 1))
    assert share.sub(0.5).abs().max() < 0.1

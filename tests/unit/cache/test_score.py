"""The contract of a score: what it is given, what it must return, and that a row is pruned as it would be alone."""

from __future__ import annotations

import pytest
import torch

from knormpress import KnormCache, KnormError, KnormPress
from knormpress.cache.score import StoredTokens, key_norms
from knormpress.cache.scores.named import SCORES
from knormpress.methods.registry import make_method
from knormpress.methods.scores import ScoredPress
from tests.unit.cache.test_hooks import IDS, make_model

PRESS = KnormPress(0.5, prune_after=8)


def values_and_places(tokens: StoredTokens) -> torch.Tensor:
    """A user's score that uses all that it is given."""
    favour = (tokens.positions < 2).to(tokens.keys.dtype) * 100
    mean = tokens.values.masked_fill(~tokens.real[..., None], 0).sum(2, keepdim=True)
    return (tokens.values - mean).norm(dim=-1) - favour + tokens.layer


METHODS = {
    **{name: make_method(name, PRESS) for name in SCORES},
    "a user's": ScoredPress(PRESS, values_and_places),
}


@pytest.fixture(scope="module")
def model():
    return make_model().double()


@pytest.mark.parametrize("name", METHODS)
def test_a_row_of_a_batch_is_what_it_is_alone(model, name):
    """Left-padded rows of 50, 23 and 37 tokens, a chunk of 4 after pruning, then single tokens."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 100, (length + 6,), generator=generator) for length in (50, 23, 37)]
    most = max(map(len, rows))
    mask = torch.stack([(torch.arange(most) >= most - len(row)).long() for row in rows])
    ids = torch.stack([torch.nn.functional.pad(row, (most - len(row), 0)) for row in rows])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode(), METHODS[name](model) as new_cache:
        batch, alone, logits = new_cache(), [new_cache() for _ in rows], []
        for start, end in ((0, most - 6), (most - 6, most - 2), (most - 2, most - 1), (most - 1, most)):
            part = slice(start, end)
            step = model(
                ids[:, part], attention_mask=mask[:, :end], position_ids=places[:, part], past_key_values=batch
            )
            logits.append(step.logits)
        together = torch.cat(logits[1:], dim=1)
        for row, cache, expected in zip(rows, alone, together, strict=True):
            model(row[None, :-6], past_key_values=cache)
            parts = [model(part[None], past_key_values=cache).logits for part in row[-6:].split([4, 1, 1])]
            torch.testing.assert_close(torch.cat(parts, dim=1)[0], expected)


def test_a_score_gets_everything_that_the_layer_holds(model):
    given: list[StoredTokens] = []

    def watching(tokens: StoredTokens) -> torch.Tensor:
        given.append(tokens)
        return key_norms(tokens)

    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :5] = 0
    with torch.inference_mode():
        cache = KnormCache(model, PRESS, watching)
        model(IDS[:, :20].repeat(2, 1), attention_mask=mask, past_key_values=cache)
    tokens = given[0]
    assert (len(given), tokens.layer) == (2, 1)
    assert tokens.keys.shape == tokens.values.shape == (2, 2, 20, 8)
    assert tokens.positions[0, 0].tolist() == list(range(20))
    assert tokens.positions[1, 1].tolist() == [-1] * 5 + list(range(15))
    assert tokens.real[1, 0].tolist() == [False] * 5 + [True] * 15
    with pytest.raises(AttributeError):
        tokens.layer = 2


def test_a_score_of_three_arguments_is_refused_and_shown_the_new_form(model):
    def old(keys, positions, layer):
        return keys.norm(dim=-1)

    for make in (lambda: KnormCache(model, PRESS, old), lambda: ScoredPress(PRESS, old)):
        with pytest.raises(KnormError, match=r"old takes \(keys, positions, layer\).*def score\(tokens\)") as refused:
            make()
        assert "\n" not in str(refused.value)


def _nan(tokens: StoredTokens) -> torch.Tensor:
    return key_norms(tokens) * float("nan")


def _too_wide(tokens: StoredTokens) -> torch.Tensor:
    return tokens.keys


def _no_tensor(tokens: StoredTokens) -> list[int]:
    return [1]


@pytest.mark.parametrize(
    ("score", "parts"),
    [
        (_nan, ["_nan", "NaN", "layer 1"]),
        (_too_wide, ["_too_wide", "(1, 2, 36, 8)", "(1, 2, 36)"]),
        (_no_tensor, ["_no_tensor", "list", "(1, 2, 36)"]),
    ],
)
def test_what_a_score_returns_is_checked(model, score, parts):
    with torch.inference_mode(), pytest.raises(KnormError) as refused:
        model(IDS, past_key_values=KnormCache(model, PRESS, score))
    assert all(part in str(refused.value) for part in parts)


def test_nan_for_padding_is_nobodys_business(model):
    def nan_for_padding(tokens: StoredTokens) -> torch.Tensor:
        return key_norms(tokens).masked_fill(~tokens.real, float("nan"))

    mask = torch.ones(2, 36, dtype=torch.long)
    mask[1, :5] = 0
    with torch.inference_mode():
        ids = IDS.repeat(2, 1)
        logits = [
            model(ids, attention_mask=mask, past_key_values=KnormCache(model, PRESS, score)).logits
            for score in (nan_for_padding, key_norms)
        ]
    assert torch.equal(logits[0][0], logits[1][0])


def test_what_was_pruned_by_a_wrong_score_stays_refused(model):
    wrong = [True]

    def sometimes(tokens: StoredTokens) -> torch.Tensor:
        return _nan(tokens) if wrong[0] else key_norms(tokens)

    with torch.inference_mode():
        cache = KnormCache(model, PRESS, sometimes)
        for _ in range(2):
            with pytest.raises(KnormError, match="sometimes is NaN"):
                model(IDS, past_key_values=cache)
            wrong[0] = False
        cache.reset()
        ours = model(IDS, past_key_values=cache).logits
        assert torch.equal(ours, model(IDS, past_key_values=KnormCache(model, PRESS)).logits)

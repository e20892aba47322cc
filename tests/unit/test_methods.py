"""The registry: every built-in method keeps what it says, and a wrong name is told of in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from knormpress.cache import KnormCache
from knormpress.errors import KnormError
from knormpress.methods import (
    FullCache,
    ScoredPress,
    highest_norm,
    make_method,
    method_names,
    random_order,
    recent_window,
)
from knormpress.press import KnormPress
from knormpress.pruning import key_norms
from tests.strategies import VOCABULARY, tiny_model

PRESS = KnormPress(keep_ratio=0.5, prune_after=16, skip_layers=())


def prompt(tokens: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(2, VOCABULARY, (1, tokens), generator=generator)


def stored_positions(name: str, layer: int = 1) -> Tensor:
    model = tiny_model()
    with torch.no_grad(), make_method(name, PRESS)(model) as new_cache:
        cache = new_cache()
        model(prompt(), past_key_values=cache)
    positions: Tensor = cache.layers[layer].positions[0]
    return positions


def test_full_is_transformers_own_cache_and_drops_nothing() -> None:
    model = tiny_model()
    with torch.no_grad(), make_method("full", KnormPress(keep_ratio=1.0))(model) as new_cache:
        cache = new_cache()
        assert type(cache) is DynamicCache
        assert new_cache() is not cache
        model(prompt(), past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [40, 40, 40]


def test_full_refuses_to_stand_for_a_ratio_it_does_not_keep() -> None:
    with pytest.raises(KnormError, match=r"keeps every token, but keep_ratio is 0\.5"):
        make_method("full", PRESS)


@pytest.mark.parametrize("name", ["knorm", "random", "highest-norm", "recent-window"])
def test_pruning_methods_keep_the_budget_and_prune_inside_generate(name: str) -> None:
    assert stored_positions(name).shape == (2, 20)
    model = tiny_model()
    with make_method(name, PRESS)(model):
        output = model.generate(prompt(), max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert isinstance(output.past_key_values, KnormCache)
    assert output.past_key_values.stats()[1].evicted > 0


def test_highest_norm_keeps_what_knorm_drops() -> None:
    for head in range(2):
        low = set(stored_positions("knorm")[head].tolist())
        high = set(stored_positions("highest-norm")[head].tolist())
        assert low | high == set(range(40))
        assert not low & high


def test_recent_window_keeps_the_sinks_and_the_newest() -> None:
    assert stored_positions("recent-window")[1].tolist() == [0, 1, 2, 3, *range(24, 40)]


def test_random_order_depends_on_position_head_and_layer_alone() -> None:
    positions = torch.arange(300).view(1, 1, -1)
    scores = random_order(torch.randn(2, 3, 300, 8), positions, 1)
    again = random_order(torch.zeros(2, 3, 300, 8, dtype=torch.float16), positions.int(), 1)
    assert scores.shape == (2, 3, 300)
    assert torch.equal(scores, again)
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0, 0], scores[0, 1])
    assert not torch.equal(scores, random_order(torch.zeros(2, 3, 300, 8), positions, 2))
    later = random_order(torch.zeros(1, 3, 100, 8), positions[..., 200:], 1)
    assert torch.equal(later[0], scores[0, :, 200:])


def test_random_order_is_spread_evenly_over_the_text() -> None:
    """The lowest half must not favour the beginning, the end, or even positions, and heads must choose apart."""
    positions = torch.arange(4096).view(1, 1, -1)
    order = random_order(torch.zeros(1, 8, 4096, 1), positions, 0)[0]
    assert order.unique().numel() > 0.99 * order.numel()
    kept = order < order.median(dim=-1, keepdim=True).values
    quarters = kept.view(8, 4, 1024).float().mean(dim=-1)
    assert quarters.sub(0.5).abs().max() < 0.08
    assert kept[:, ::2].float().mean(dim=-1).sub(0.5).abs().max() < 0.05
    agreement = (kept[:, None] == kept[None]).float().mean(dim=-1)
    assert agreement.fill_diagonal_(0.5).sub(0.5).abs().max() < 0.05


def test_random_order_spares_no_token() -> None:
    """The first token draws much attention: over heads and layers it is kept as often as any other."""
    positions = torch.arange(64).view(1, 1, -1)
    kept = torch.stack([random_order(torch.zeros(1, 8, 64, 1), positions, layer)[0] for layer in range(64)])
    share = (kept.argsort(dim=-1).argsort(dim=-1) < 32).float().mean(dim=(0, 1))
    assert share.sub(0.5).abs().max() < 0.1


@pytest.mark.parametrize("score", [highest_norm, random_order, recent_window, key_norms])
def test_scores_have_a_value_for_every_head_and_are_finite(score: object) -> None:
    assert callable(score)
    scores = score(torch.randn(2, 3, 9, 4), torch.arange(9).view(1, 1, 9), 0)
    assert scores.shape == (2, 3, 9)
    assert scores.is_floating_point()
    assert scores.isfinite().all()


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(KnormError) as caught:
        make_method("knrom", PRESS)
    assert "'knrom'" in str(caught.value)
    assert "full, knorm, random, highest-norm, recent-window" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_method_of_ones_own_by_module_and_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "from knormpress.methods import ScoredPress\n"
        "def oldest(keys, positions, layer):\n"
        "    return positions.float().expand(keys.shape[:-1])\n"
        "def factory(press):\n"
        "    return ScoredPress(press, oldest)\n"
        "def not_a_factory(press):\n"
        "    return None\n"
        "number = 3\n"
    )
    (tmp_path / "my_methods.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert stored_positions("my_methods:factory")[0].tolist() == list(range(20))
    for name in ("my_methods:not_a_factory", "my_methods:number"):
        with pytest.raises(KnormError, match="does not give a method"):
            make_method(name, PRESS)
    for name in ("my_methods:nothing", "no_such_module_at_all:factory", ":factory", "my_methods:"):
        with pytest.raises(KnormError, match="can't be loaded"):
            make_method(name, PRESS)
    sys.modules.pop("my_methods", None)


def test_methods_of_installed_packages_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real distribution on the path, read by importlib.metadata as pip would leave it."""
    (tmp_path / "their_methods.py").write_text(
        "from knormpress.methods import FullCache\ndef theirs(press):\n    return FullCache()\n"
    )
    info = tmp_path / "their_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[knormpress.methods]\ntheirs = their_methods:theirs\nbroken = their_methods:gone\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert method_names()[-2:] == ["broken", "theirs"]
    assert make_method("theirs", PRESS) == FullCache()
    with pytest.raises(KnormError, match="stands for their_methods:gone, which can't be loaded"):
        make_method("broken", PRESS)
    sys.modules.pop("their_methods", None)


def test_methods_are_values() -> None:
    assert make_method("random", PRESS) == ScoredPress(PRESS, random_order)
    assert make_method("knorm", PRESS) is PRESS

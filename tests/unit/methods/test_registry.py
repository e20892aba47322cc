"""The registry: every built-in method keeps what it says, and a wrong name is told of in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from knormpress import KnormCache, KnormError, KnormPress
from knormpress.cache.scores.controls import random_order
from knormpress.methods.registry import make_method, method_names
from knormpress.methods.scores import ScoredPress
from tests.strategies import tiny_model, tokens

PRESS = KnormPress(keep_ratio=0.5, prune_after=16, skip_layers=())


def stored_positions(name: str) -> list[list[int]]:
    """The positions that each head of layer 1 keeps of a prompt of 40 tokens."""
    model = tiny_model()
    with torch.no_grad(), make_method(name, PRESS)(model) as new_cache:
        cache = new_cache()
        model(tokens(40, seed=7), past_key_values=cache)
    positions: list[list[int]] = cache.layers[1].positions[0].tolist()
    return positions


def test_full_is_transformers_own_cache_and_drops_nothing() -> None:
    model = tiny_model()
    with torch.no_grad(), make_method("full", KnormPress(keep_ratio=1.0))(model) as new_cache:
        cache = new_cache()
        assert type(cache) is DynamicCache
        assert new_cache() is not cache
        model(tokens(40), past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [40, 40, 40]


@pytest.mark.parametrize("press", [PRESS, KnormPress(1.0, layer_keep_ratios=(1.0, 1.0))])
def test_full_refuses_to_stand_for_a_ratio_it_does_not_keep(press: KnormPress) -> None:
    with pytest.raises(KnormError, match=f"full.* every token.*{press.keep_ratio}"):
        make_method("full", press)


@pytest.mark.parametrize("name", ["knorm", "random", "highest-norm", "recent-window", "keydiff"])
def test_pruning_methods_keep_the_budget_and_prune_inside_generate(name: str) -> None:
    assert [len(kept) for kept in stored_positions(name)] == [20, 20]
    model = tiny_model()
    with make_method(name, PRESS)(model):
        output = model.generate(tokens(40), max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert isinstance(output.past_key_values, KnormCache)
    assert output.past_key_values.stats()[1].evicted > 0


def test_highest_norm_keeps_what_knorm_drops() -> None:
    for low, high in zip(stored_positions("knorm"), stored_positions("highest-norm"), strict=True):
        assert sorted(low + high) == list(range(40))


def test_recent_window_keeps_the_sinks_and_the_newest() -> None:
    assert stored_positions("recent-window") == [[0, 1, 2, 3, *range(24, 40)]] * 2


def test_methods_are_values() -> None:
    assert make_method("random", PRESS) == ScoredPress(PRESS, random_order)
    assert make_method("knorm", PRESS) is PRESS


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(KnormError) as caught:
        make_method("knrom", PRESS)
    for name in ("'knrom'", *method_names()):
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed distribution with a module of methods, as pip would leave it on the path."""
    (tmp_path / "their_methods.py").write_text(
        "from knormpress.methods.scores import ScoredPress\n"
        "def oldest(tokens):\n"
        "    return tokens.positions.float()\n"
        "def factory(press):\n"
        "    return ScoredPress(press, oldest)\n"
        "def not_a_factory(press):\n"
        "    return None\n"
        "number = 3\n"
    )
    info = tmp_path / "their_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[knormpress.methods]\ntheirs = their_methods:factory\nbroken = their_methods:gone\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    # Set first, so that what is imported from here is taken out again.
    monkeypatch.setitem(sys.modules, "their_methods", None)
    del sys.modules["their_methods"]


@pytest.mark.usefixtures("their_package")
def test_methods_of_others_are_found_by_entry_point_and_by_module() -> None:
    assert method_names()[-2:] == ["broken", "theirs"]
    for name in ("theirs", "their_methods:factory"):
        assert stored_positions(name) == [list(range(20))] * 2


@pytest.mark.usefixtures("their_package")
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("broken", "their_methods:gone, which can't be loaded"),
        ("their_methods:not_a_factory", "does not give a method"),
        ("their_methods:number", "does not give a method"),
        ("their_methods:nothing", "can't be loaded"),
        ("no_such_module_at_all:factory", "can't be loaded"),
        (":factory", "can't be loaded"),
        ("their_methods:", "can't be loaded"),
    ],
)
def test_what_is_no_method_is_refused_by_name(name: str, told: str) -> None:
    with pytest.raises(KnormError, match=told) as caught:
        make_method(name, PRESS)
    assert repr(name) in str(caught.value)

"""A saved cache goes on bit for bit, and nothing but its own model and score takes it."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from knormpress import KnormCache, KnormError, KnormPress
from knormpress.cache.saving import FORMAT, is_score
from knormpress.cache.score import key_norms, name_of
from knormpress.cache.scores.controls import highest_norm
from tests.oracle import position_ids
from tests.strategies import left_padding, tiny_model, tokens

PRESS = KnormPress(0.5, prune_after=8, skip_layers=(0,), prune_interval=4)


def run(model, cache, ids, **kwargs):
    with torch.no_grad():
        return model(ids, past_key_values=cache, **kwargs).logits


def own_score(held):
    return key_norms(held)


@pytest.fixture
def saved(tmp_path):
    """The file of a cache that has seen 20 tokens."""
    cache = KnormCache(tiny_model(), PRESS)
    run(tiny_model(), cache, tokens(20))
    cache.save(tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("length", [0, 5, 30], ids=["empty", "whole", "pruned"])
def test_the_continuation_is_equal_to_the_bit(family, length, tmp_path):
    model = tiny_model(family)
    cache = KnormCache(model, PRESS)
    if length:
        run(model, cache, tokens(length))
        run(model, cache, tokens(1))
    cache.save(tmp_path / "context.safetensors")
    loaded = KnormCache.load(tmp_path / "context.safetensors", model)
    assert [(s.seen, s.stored) for s in loaded.stats()] == [(s.seen, s.stored) for s in cache.stats()]
    for seed in range(12):
        ids = tokens(3 if seed % 4 == 0 else 1, seed=seed)
        assert torch.equal(run(model, loaded, ids), run(model, cache, ids))
    assert loaded.press == cache.press


def test_the_scores_of_a_plan_are_in_the_file(tmp_path):
    """They rank again after loading; a score of one's own is not imported because a file says so."""
    model, path = tiny_model(), tmp_path / "c.safetensors"
    for names in (("knorm", "keydiff", "leverage"), ("knorm", f"{__name__}:own_score", "knorm")):
        press = replace(PRESS, layer_scores=names)
        cache = KnormCache(model, press)
        run(model, cache, tokens(30))
        cache.save(path)
        loaded = KnormCache.load(path, model)
        assert loaded.press == press
        for seed in range(9):
            assert torch.equal(run(model, loaded, tokens(1, seed=seed)), run(model, cache, tokens(1, seed=seed)))
        with pytest.raises(KnormError, match="without a score"):
            KnormCache.load(path, model, score=key_norms)
    values = metadata(path)
    state = values["state"].replace(f"{__name__}:own_score", "antigravity:score")
    save_file(load_file(path), path, values | {"state": state})
    with pytest.raises(KnormError, match="antigravity:score; import its module"):
        KnormCache.load(path, model)
    assert "antigravity" not in sys.modules


def test_a_score_over_a_plan_is_that_of_every_layer(tmp_path):
    """Controls run under a plan's ratios with a score of their own; key norms can be such a score, too."""
    model, path = tiny_model(), tmp_path / "c.safetensors"
    plan = replace(PRESS, layer_scores=("highest-norm",) * 3)
    cache, norms = KnormCache(model, plan, key_norms), KnormCache(model, PRESS)
    logits = [run(model, each, tokens(30)) is not None and run(model, each, tokens(5)) for each in (cache, norms)]
    assert torch.equal(*logits)
    cache.save(path)
    assert torch.equal(run(model, KnormCache.load(path, model), tokens(1)), run(model, cache, tokens(1)))


def test_padding_is_remembered(tmp_path):
    model = tiny_model()
    mask = left_padding(20, 0, 5)
    positions = position_ids(mask)
    cache = KnormCache(model, PRESS)
    run(model, cache, tokens(12, rows=2), attention_mask=mask[:, :12], position_ids=positions[:, :12])
    cache.save(tmp_path / "c.safetensors")
    loaded = KnormCache.load(tmp_path / "c.safetensors", model)
    for end in range(13, 21):
        more = {"attention_mask": mask[:, :end], "position_ids": positions[:, end - 1 : end]}
        ids = tokens(1, rows=2, seed=end)
        assert torch.equal(run(model, loaded, ids, **more), run(model, cache, ids, **more))


def test_another_model_or_type_is_refused(saved):
    for other in (tiny_model(seed=1), tiny_model("qwen2"), tiny_model(dtype=torch.float32)):
        with pytest.raises(KnormError, match="another model"):
            KnormCache.load(saved, other)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_file_cut_short_is_refused(saved, size):
    saved.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(KnormError, match=saved.name):
        KnormCache.load(saved, tiny_model())


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy])
def test_what_would_share_or_lose_its_model_is_refused_in_one_line(duplicate):
    with pytest.raises(KnormError, match=r"cache\.save.*deepcopy") as refused:
        duplicate(KnormCache(tiny_model(), KnormPress(0.5)))
    assert "\n" not in str(refused.value)


def test_arguments_in_another_order_are_told_the_right_one(saved):
    for path, model, got in (
        (tiny_model(), str(saved), r"got LlamaForCausalLM .* and '.*c\.safetensors'"),
        (tiny_model(), saved, r"got LlamaForCausalLM .* and \w*Path\('.*c\.safetensors'\)"),
        (saved, "gpt2", "'gpt2' as the model"),
    ):
        with pytest.raises(KnormError, match=rf"^KnormCache\.load .*{got}.*load\(path, model\)$"):
            KnormCache.load(path, model)


def test_another_format_and_a_missing_file_are_refused(saved):
    assert metadata(saved)["format"] == FORMAT
    save_file(load_file(saved), saved, {"format": "knormpress-cache-0", "model": "", "state": "{}"})
    with pytest.raises(KnormError, match=f"'knormpress-cache-0'.*'{FORMAT}'"):
        KnormCache.load(saved, tiny_model())
    with pytest.raises(KnormError, match=r"none\.safetensors does not exist"):
        KnormCache.load(saved.with_name("none.safetensors"), tiny_model())


@pytest.mark.parametrize("name", ["knormpress.pruning.key_norms", "knormpress.cache.pruning.key_norms"])
def test_a_file_from_before_the_scores_moved_is_loaded(saved, name):
    """Caches are kept for long; in what module a score of this package lives is none of their business."""
    values = metadata(saved)
    assert json.loads(values["state"])["score"] == name_of(key_norms)
    state = json.dumps(json.loads(values["state"]) | {"score": name})
    save_file(load_file(saved), saved, values | {"state": state})
    loaded, straight = KnormCache.load(saved, tiny_model()), KnormCache(tiny_model(), PRESS)
    run(tiny_model(), straight, tokens(20))
    assert torch.equal(run(tiny_model(), loaded, tokens(5)), run(tiny_model(), straight, tokens(5)))
    with pytest.raises(KnormError, match=name):
        KnormCache.load(saved, tiny_model(), score=highest_norm)


@pytest.mark.parametrize(
    ("name", "score", "same"),
    [
        ("knormpress.methods.highest_norm", highest_norm, True),
        ("knormpress.methods.scores.highest_norm", key_norms, False),
        (f"{__name__}.own_score", own_score, True),
        ("tests.moved.own_score", own_score, False),
        ("knormpress.pruning.own_score", own_score, False),
        ("elsewhere.key_norms", key_norms, False),
    ],
)
def test_a_score_of_ones_own_is_named_by_its_module(name, score, same):
    assert is_score(name, score) == same


def test_what_cant_be_saved_or_written_leaves_nothing(tmp_path):
    model = tiny_model("lfm2")
    with pytest.raises(KnormError, match=r"layer 0 .*LinearAttentionLayer"):
        KnormCache(model, PRESS).save(tmp_path / "c.safetensors")
    with pytest.raises(KnormError, match=r"can't be written to .*no"):
        KnormCache(tiny_model(), PRESS).save(tmp_path / "no" / "c.safetensors")
    assert list(tmp_path.iterdir()) == []


def made_score(factor):
    """Every function from here has one and the same name."""

    def score(held):
        return factor * key_norms(held)

    return score


class Scaled:
    def __init__(self, factor):
        self.factor = factor

    def score(self, held):
        return self.factor * key_norms(held)


@pytest.mark.parametrize(
    "score", [lambda held: -key_norms(held), functools.partial(own_score), made_score(1), Scaled(1).score]
)
def test_a_score_without_a_lasting_name_cant_be_saved(score, tmp_path):
    with pytest.raises(KnormError, match="define the score as a function"):
        KnormCache(tiny_model(), PRESS, score).save(tmp_path / "c.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("named", "other"), [(made_score(1), made_score(-1)), (Scaled(1).score, Scaled(-1).score)], ids=name_of
)
def test_another_score_of_the_same_name_is_not_taken_for_the_saved_one(named, other, saved):
    """A file may hold such a name: earlier versions saved them."""
    values = metadata(saved)
    state = json.dumps(json.loads(values["state"]) | {"score": name_of(named)})
    save_file(load_file(saved), saved, values | {"state": state})
    assert name_of(named) == name_of(other)
    with pytest.raises(KnormError, match="define the score as a function"):
        KnormCache.load(saved, tiny_model(), score=other)


def test_the_press_of_a_loaded_cache_makes_caches_again(saved):
    press = KnormPress.of(KnormCache.load(saved, tiny_model()).press)
    assert press == PRESS
    with press(tiny_model()) as new_cache:
        assert new_cache().press is press

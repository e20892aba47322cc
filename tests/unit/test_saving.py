"""A saved cache goes on bit for bit, and nothing but its own model takes it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from knormpress import KnormCache, KnormError, KnormPress
from knormpress.fingerprints import _spread, model_fingerprint
from knormpress.methods import highest_norm
from knormpress.saving import FORMAT
from tests.strategies import VOCABULARY, tiny_model

PRESS = KnormPress(0.5, prune_after=8, skip_layers=(0,), prune_interval=4)


def run(model, cache, ids, **kwargs):
    with torch.no_grad():
        return model(ids, past_key_values=cache, **kwargs).logits


def tokens(length, rows=1, seed=0):
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("length", [5, 30], ids=["whole", "pruned"])
def test_the_continuation_is_equal_to_the_bit(family, length, tmp_path):
    model = tiny_model(family)
    cache = KnormCache(model, PRESS)
    run(model, cache, tokens(length))
    run(model, cache, tokens(1))
    cache.save(tmp_path / "context.safetensors")
    loaded = KnormCache.load(tmp_path / "context.safetensors", model)
    assert [(s.seen, s.stored) for s in loaded.stats()] == [(s.seen, s.stored) for s in cache.stats()]
    for seed in range(12):
        ids = tokens(3 if seed % 4 == 0 else 1, seed=seed)
        assert torch.equal(run(model, loaded, ids), run(model, cache, ids))
    assert loaded.press == cache.press


def test_padding_is_remembered(tmp_path):
    model = tiny_model()
    mask = torch.tensor([[1] * 12, [0] * 5 + [1] * 7])
    cache = KnormCache(model, PRESS)
    run(model, cache, tokens(12, rows=2), attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    cache.save(tmp_path / "c.safetensors")
    loaded = KnormCache.load(tmp_path / "c.safetensors", model)
    for step in range(8):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        more = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
        ids = tokens(1, rows=2, seed=step)
        assert torch.equal(run(model, loaded, ids, **more), run(model, cache, ids, **more))


def saved(tmp_path, model):
    cache = KnormCache(model, PRESS)
    run(model, cache, tokens(20))
    cache.save(tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


def test_another_model_or_type_is_refused(tmp_path):
    path = saved(tmp_path, tiny_model())
    for other in (tiny_model(seed=1), tiny_model("qwen2"), tiny_model(dtype=torch.float32)):
        with pytest.raises(KnormError, match="was saved with another model"):
            KnormCache.load(path, other)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_file_cut_short_is_refused(tmp_path, size):
    path = saved(tmp_path, tiny_model())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(KnormError, match="is cut short or no saved cache"):
        KnormCache.load(path, tiny_model())


def test_another_format_is_refused(tmp_path):
    path = saved(tmp_path, tiny_model())
    save_file(load_file(path), path, {"format": "knormpress-cache-0", "model": "", "state": "{}"})
    with pytest.raises(KnormError, match=f"has format 'knormpress-cache-0'; this version reads '{FORMAT}'"):
        KnormCache.load(path, tiny_model())


def test_a_missing_file_and_another_score_are_refused(tmp_path):
    with pytest.raises(KnormError, match="is not there"):
        KnormCache.load(tmp_path / "none.safetensors", tiny_model())
    with pytest.raises(KnormError, match=r"pruned by knormpress\.pruning\.key_norms"):
        KnormCache.load(saved(tmp_path, tiny_model()), tiny_model(), score=highest_norm)


def test_linear_attention_is_refused(tmp_path):
    model = tiny_model("lfm2")
    cache = KnormCache(model, PRESS)
    with pytest.raises(KnormError, match="layer 0 is a LinearAttentionLayer"):
        cache.save(tmp_path / "c.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_can_not_be_written_leaves_nothing(tmp_path):
    cache = KnormCache(tiny_model(), PRESS)
    run(tiny_model(), cache, tokens(20))
    with pytest.raises(KnormError, match="can't be written"):
        cache.save(tmp_path / "no" / "c.safetensors")


def test_the_fingerprint_sees_weights_and_configuration():
    model = tiny_model()
    assert model_fingerprint(model) == model_fingerprint(tiny_model(attention="eager"))
    assert len({model_fingerprint(m) for m in (model, tiny_model(seed=1), tiny_model("qwen2"))}) == 3


@pytest.mark.parametrize("size", [0, 1, 2, 63, 64, 65, 1000, 28_311_552, 2**31 + 7])
def test_the_fingerprint_samples_from_first_to_last(size):
    places = _spread(size).tolist()
    assert len(places) == min(size, 64)
    assert places == sorted(set(places))
    assert not places or (places[0], places[-1]) == (0, max(size - 1, 0))


def test_the_file_is_plain_safetensors(tmp_path):
    path = saved(tmp_path, tiny_model())
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    assert header["__metadata__"]["format"] == FORMAT


def test_an_empty_cache_is_saved_too(tmp_path):
    model = tiny_model()
    KnormCache(model, PRESS).save(tmp_path / "c.safetensors")
    loaded = KnormCache.load(tmp_path / "c.safetensors", model)
    assert torch.equal(run(model, loaded, tokens(20)), run(model, KnormCache(model, PRESS), tokens(20)))

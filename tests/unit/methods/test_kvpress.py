"""Presses of kvpress as methods: what is left predicts as our own cache with the same tokens does.

Each test runs against a small stand-in with kvpress's interface, and against the real library where it is installed.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from knormpress import KnormError, KnormPress
from knormpress.measure.quality import measure_quality
from knormpress.methods.kvpress import KvpressMethod, PressedCache, is_kvpress
from knormpress.methods.method import describe_method
from knormpress.methods.registry import make_method
from tests.strategies import tiny_model, tokens

HALF = KnormPress(keep_ratio=0.5, prune_after=1, skip_layers=())

# What kvpress 0.5.5 does, in the fewest lines: hooks behind the attention modules that `cache_position` tells of the
# prefill, a class of presses that keep the highest scores, one that wraps another, and one without a ratio to set.
STAND_IN = """
from contextlib import contextmanager
from dataclasses import dataclass
import torch

@dataclass
class BasePress:
    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        raise NotImplementedError

    def forward_hook(self, module, input, kwargs, output):
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        if kwargs["cache_position"][-1] + 1 == kwargs["hidden_states"].shape[1]:
            layer.keys, layer.values = self.compress(
                module, kwargs["hidden_states"], layer.keys, layer.values, output[1], kwargs
            )
        return output

    @contextmanager
    def __call__(self, model):
        handles = [
            layer.self_attn.register_forward_hook(self.forward_hook, with_kwargs=True) for layer in model.model.layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

@dataclass
class ScorerPress(BasePress):
    compression_ratio: float = 0.0

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        if self.compression_ratio == 0:
            return keys, values
        kept = max(1, int(keys.shape[2] * (1 - self.compression_ratio)))
        indices = self.score(keys).topk(kept, dim=-1).indices[..., None].expand(-1, -1, -1, keys.shape[-1])
        return keys.gather(2, indices).contiguous(), values.gather(2, indices).contiguous()

class KnormPress(ScorerPress):
    def score(self, keys):
        return -torch.linalg.vector_norm(keys, dim=-1)

@dataclass
class AdaKVPress(BasePress):
    press: ScorerPress

    @property
    def compression_ratio(self):
        return self.press.compression_ratio

    @compression_ratio.setter
    def compression_ratio(self, value):
        self.press.compression_ratio = value

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        module.masked_key_indices = (0, 0, 0)
        return keys, values

@dataclass
class DecodingPress(BasePress):
    base_press: ScorerPress
    target_size: int = 2048

@dataclass
class KeyRerotationPress(AdaKVPress):
    pass
"""

INSTALLED = importlib.util.find_spec("kvpress") is not None


def write_kvpress(source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a module of ``source`` in the place of kvpress, until ``monkeypatch`` takes it away again."""
    (folder / "kvpress.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    # Set first, so that what is imported here is taken out again.
    monkeypatch.setitem(sys.modules, "kvpress", None)
    del sys.modules["kvpress"]


@functools.cache
def installed() -> tuple[Any, dict[str, Any]]:
    """The real library, and the attention functions that its import replaces in transformers."""
    gc.collect()  # a forgotten KnormCache would have its own function there, which kvpress would keep
    before = dict(ALL_ATTENTION_FUNCTIONS)
    library = importlib.import_module("kvpress")
    return library, {name: own for name, own in ALL_ATTENTION_FUNCTIONS.items() if own is not before[name]}


@contextmanager
def real() -> Iterator[Any]:
    """The real library with all that its import does, of which nothing is left for other tests."""
    library, functions = installed()
    for name, function in functions.items():
        ALL_ATTENTION_FUNCTIONS[name] = function
    yield library
    for name in functions:
        del ALL_ATTENTION_FUNCTIONS[name]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not functions["sdpa"]


@contextmanager
def stand_in(folder: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        write_kvpress(STAND_IN, folder, monkeypatch)
        yield importlib.import_module("kvpress")


@pytest.fixture(scope="module", params=["stand-in", "real"] if INSTALLED else ["stand-in"])
def kvpress(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with real() if request.param == "real" else stand_in(tmp_path_factory.mktemp("kvpress")) as library:
        assert hasattr(library, "ExpectedAttentionPress") == (request.param == "real")
        assert sys.modules["kvpress"] is library
        yield library


def logits_after(model: PreTrainedModel, cache: Cache, passes: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(ids, past_key_values=cache).logits for ids in passes]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("skip_layers", [(), (0,), (1, -1)])
@pytest.mark.parametrize("new", [[7], [1, 1, 1]], ids=["several at once", "one by one"])
@pytest.mark.parametrize("rows", [1, 3])
def test_knorm_of_kvpress_predicts_as_ours(
    kvpress: Any, attention: str, skip_layers: tuple[int, ...], new: list[int], rows: int
) -> None:
    """Ours is proven against a mask on what was dropped, so equal logits mean equal tokens, positions and masks."""
    policy = KnormPress(keep_ratio=0.5, prune_after=1, skip_layers=skip_layers)
    model = tiny_model(attention=attention)
    passes = list(tokens(40 + sum(new), rows).split([40, *new], dim=1))
    found = []
    for name in ("kvpress:KnormPress", "knorm"):
        with make_method(name, policy)(model) as new_cache:
            cache = new_cache()
            found.append(logits_after(model, cache, passes))
        if name != "knorm":  # which prunes again
            kept = [40 if ratio == 1.0 else 20 for ratio in policy.ratios(3)]
            assert [layer.keys.shape[2] for layer in cache.layers] == [count + sum(new) for count in kept]
    # transformers' eager attention takes its softmax in float32, and theirs are summed in another order.
    tolerance = 1e-9 if attention == "sdpa" else 1e-5
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=tolerance)


def test_control_positions_that_start_again_are_seen(kvpress: Any) -> None:
    """What a plain cache does behind kvpress's hooks: the difference that the test above must be able to see."""
    # A model of its own: kvpress leaves the rotary embedding in its layers.
    model, passes = tiny_model.__wrapped__(), list(tokens(47).split([40, 7], dim=1))
    with torch.no_grad(), kvpress.KnormPress(0.5)(model):
        cache = DynamicCache(config=model.config)
        model(passes[0], past_key_values=cache, cache_position=torch.arange(40))
        restarted = model(passes[1], past_key_values=cache, cache_position=torch.arange(40, 47)).logits
    with make_method("kvpress:KnormPress", HALF)(model) as new_cache:
        true = logits_after(model, new_cache(), passes)[1]
    assert (true - restarted).abs().max() > 1e-3


def test_generate_goes_through_a_pruned_cache_of_its_own(kvpress: Any) -> None:
    model, made = tiny_model(), []
    for name in ("kvpress:KnormPress", "knorm"):
        with make_method(name, HALF)(model):
            made.append(model.generate(tokens(40), max_new_tokens=6, do_sample=False, return_dict_in_generate=True))
    assert isinstance(made[0].past_key_values, PressedCache)
    assert made[0].past_key_values.layers[0].keys.shape[2] == 20 + 5
    assert torch.equal(made[0].sequences, made[1].sequences)


def test_quality_is_that_of_ours_in_one_measurement(kvpress: Any) -> None:
    """Ours takes the baseline's prefill here, so nothing of the press before it may be left on the model."""
    methods = [make_method(name, HALF) for name in ("kvpress:KnormPress", "knorm")]
    theirs, ours = measure_quality(tiny_model(), methods, [tokens(61)], context=40)
    assert theirs.candidate_ppl == pytest.approx(ours.candidate_ppl, rel=1e-9)
    assert theirs.kl == pytest.approx(ours.kl, abs=1e-9)
    assert ours.kl > 1e-3


def test_short_prompts_are_left_whole(kvpress: Any) -> None:
    model = tiny_model()
    with make_method("kvpress:KnormPress", KnormPress(0.5, prune_after=41, skip_layers=()))(model) as new_cache:
        cache = new_cache()
        logits_after(model, cache, [tokens(40)])
    assert [layer.keys.shape[2] for layer in cache.layers] == [40, 40, 40]


def test_instances_are_copied_and_follow_the_policy(kvpress: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    instance = kvpress.KnormPress(0.25)
    monkeypatch.setattr(kvpress, "of_mine", instance, raising=False)
    monkeypatch.setattr(kvpress, "made", lambda press: kvpress.KnormPress(1 - press.keep_ratio), raising=False)
    for name in ("kvpress:of_mine", "kvpress:made"):
        model, method = tiny_model(), make_method(name, HALF)
        with method(model) as new_cache:
            cache = new_cache()
            logits_after(model, cache, [tokens(40)])
        assert cache.layers[0].keys.shape[2] == 20
    assert instance.compression_ratio == 0.25


@pytest.mark.parametrize("skip_layers", [(0,), (-1,)])
def test_records_name_it_alike_before_a_measurement_and_after(kvpress: Any, skip_layers: tuple[int, ...]) -> None:
    model, policy = tiny_model(), KnormPress(0.5, prune_after=1, skip_layers=skip_layers)
    method = make_method("kvpress:KnormPress", policy)
    before = describe_method(method)
    with method(model) as new_cache:
        logits_after(model, new_cache(), [tokens(40)])
    assert describe_method(method) == before == describe_method(make_method("kvpress:KnormPress", policy))
    assert "compression_ratio=0.5" in before


def test_nothing_is_left_on_the_model(kvpress: Any) -> None:
    """A key overwritten through indices left behind by a head-wise press would be another method's key."""
    model = tiny_model.__wrapped__()
    attention = [layer.self_attn for layer in model.model.layers]
    before = [(list(each._forward_pre_hooks), list(each._forward_hooks)) for each in attention]
    parts = [name for name, _ in model.named_modules(remove_duplicate=False)]
    with KvpressMethod.of(kvpress.AdaKVPress(kvpress.KnormPress()), HALF)(model) as new_cache:
        logits_after(model, new_cache(), [tokens(40)])
        assert attention[0].masked_key_indices is not None
    assert "generate" not in vars(model)
    assert [(list(each._forward_pre_hooks), list(each._forward_hooks)) for each in attention] == before
    assert not any(hasattr(each, "masked_key_indices") for each in attention)
    assert [name for name, _ in model.named_modules(remove_duplicate=False)] == parts
    assert not any("attn.rotary_emb" in name for name in parts)


def test_cropping_and_resetting_keep_the_count(kvpress: Any) -> None:
    model = tiny_model()
    with make_method("kvpress:KnormPress", HALF)(model) as new_cache:
        cache = new_cache()
        logits_after(model, cache, [tokens(40), tokens(5)])
        cache.crop(-3)
        assert (cache.get_seq_length(), cache.layers[0].keys.shape[2]) == (42, 22)
        cache.reset()
        assert cache.get_seq_length() == 0
        logits_after(model, cache, [tokens(30)])
        assert (cache.get_seq_length(), cache.layers[0].keys.shape[2]) == (30, 15)


def test_padding_is_refused(kvpress: Any) -> None:
    model, mask = tiny_model(), torch.ones(2, 40, dtype=torch.long)
    mask[1, :3] = 0
    method, refused = make_method("kvpress:KnormPress", HALF), pytest.raises(KnormError, match="padding")
    with torch.no_grad(), method(model) as new_cache, refused:
        model(tokens(40, rows=2), attention_mask=mask, past_key_values=new_cache())


@pytest.mark.parametrize(
    ("name", "policy", "reason"),
    [
        ("KnormPress", KnormPress(0.5, keep_recent=4), "KnormPress .*keep_recent 4"),
        ("KnormPress", KnormPress(0.5, schedule="iterative"), "KnormPress .*'iterative'"),
        ("AdaKVPress", HALF, "AdaKVPress .* without arguments"),
    ],
)
def test_what_cant_be_followed_is_refused(kvpress: Any, name: str, policy: KnormPress, reason: str) -> None:
    with pytest.raises(KnormError, match=reason) as caught:
        make_method(f"kvpress:{name}", policy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("DecodingPress", "compression_ratio of .*DecodingPress"), ("KeyRerotationPress", "new positions")],
)
def test_presses_without_a_ratio_and_those_that_move_keys_are_refused(kvpress: Any, name: str, reason: str) -> None:
    wrapped = getattr(kvpress, name)(kvpress.KnormPress())
    with pytest.raises(KnormError, match=reason) as caught:
        KvpressMethod.of(wrapped, HALF)
    assert name in str(caught.value)


def test_only_its_presses_are_taken_for_kvpress(kvpress: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_kvpress(kvpress.KnormPress)
    assert is_kvpress(kvpress.KnormPress())
    assert not is_kvpress(HALF)
    assert not is_kvpress(KnormPress)
    monkeypatch.delitem(sys.modules, "kvpress")
    assert not is_kvpress(HALF)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module_at_all", "No module named 'no_such_module_at_all'"),
        ("raise RuntimeError('two\\nlines')", "two"),
    ],
)
def test_a_kvpress_that_cant_be_imported_is_told_of_in_one_line(
    source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_kvpress(source, tmp_path, monkeypatch)
    with pytest.raises(KnormError) as caught:
        make_method("kvpress:KnormPress", HALF)
    assert "'kvpress:KnormPress'" in str(caught.value)
    assert f": {reason}; install" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not INSTALLED, reason="kvpress is not installed")
@pytest.mark.parametrize("kvpress", ["real"], indirect=True)
@pytest.mark.parametrize(
    "name",
    ["ExpectedAttentionPress", "SnapKVPress", "TOVAPress", "StreamingLLMPress", "PyramidKVPress", "KeyDiffPress"],
)
def test_other_presses_of_the_library_run(kvpress: Any, name: str) -> None:
    """Those that read hidden states and rotations too; PyramidKV gives layers different lengths."""
    model = tiny_model(dtype=torch.float32)
    press = {"SnapKVPress": {"window_size": 8}, "PyramidKVPress": {"window_size": 8}}.get(name, {})
    method = KvpressMethod.of(getattr(kvpress, name)(**press), HALF)
    with method(model) as new_cache:
        cache = new_cache()
        found = logits_after(model, cache, [tokens(64), tokens(5), tokens(1)])
    held = [layer.keys.shape[2] - 6 for layer in cache.layers]
    assert sum(held) == 3 * 32
    assert (len(set(held)) > 1) == (name == "PyramidKVPress")
    assert cache.get_seq_length() == 70
    assert all(logits.isfinite().all() for logits in found)

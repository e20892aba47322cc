"""Bytes of a cache are those of its storages, whatever shape it has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache, EncoderDecoderCache, Qwen3NextConfig, StaticCache

from knormpress.measure.memory import cache_bytes, measure_memory
from knormpress.methods.knorm import KnormPress
from tests.strategies import VOCABULARY, tiny_model

TOKENS = 40
# 3 layers, keys and values, 2 heads of 8, float64
BYTES_PER_TOKEN = 3 * 2 * 2 * 8 * 8


def prompt(tokens: int = TOKENS) -> Tensor:
    return torch.randint(2, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(5))


def filled(cache: Any, tokens: int = TOKENS, model: Any = None) -> Cache:
    with torch.no_grad():
        (model or tiny_model())(prompt(tokens), past_key_values=cache)
    return cache  # type: ignore[no-any-return]


@pytest.mark.parametrize("tokens", [0, TOKENS])
def test_a_full_cache_holds_its_keys_and_values(tokens: int) -> None:
    cache = DynamicCache(config=tiny_model().config)
    assert cache_bytes(filled(cache, tokens) if tokens else cache) == tokens * BYTES_PER_TOKEN


def test_a_view_is_counted_at_the_size_of_what_it_holds_on_to() -> None:
    cache = filled(DynamicCache(config=tiny_model().config))
    cache.crop(-30)
    assert cache.get_seq_length() == 10
    assert cache_bytes(cache) == TOKENS * BYTES_PER_TOKEN


def test_a_storage_that_is_shared_is_counted_once() -> None:
    cache = filled(DynamicCache(config=tiny_model().config))
    for layer in cache.layers:
        layer.values = layer.keys[:, :, :3]
    assert cache_bytes(cache) == TOKENS * BYTES_PER_TOKEN // 2


def test_room_that_is_not_used_yet_is_counted() -> None:
    cache = StaticCache(config=tiny_model().config, max_cache_len=64)
    # Besides keys and values each layer has an 8-byte counter.
    assert cache_bytes(filled(cache)) == 64 * BYTES_PER_TOKEN + 3 * 8


def test_a_pruned_cache_holds_its_tokens_and_their_positions_and_says_so_itself() -> None:
    model = tiny_model()
    with KnormPress(keep_ratio=0.5, prune_after=16, skip_layers=())(model) as new_cache, torch.no_grad():
        cache = filled(new_cache())
        positions = 3 * 2 * 20 * 4
        assert cache_bytes(cache) == 20 * BYTES_PER_TOKEN + positions == cache.nbytes
        for token in prompt(5).split(1, dim=1):
            model(token, past_key_values=cache)
            assert cache_bytes(cache) == cache.nbytes


def test_both_halves_of_an_encoder_decoder_cache_are_counted() -> None:
    own = filled(DynamicCache(config=tiny_model().config))
    cross = filled(DynamicCache(config=tiny_model().config), tokens=10)
    assert cache_bytes(EncoderDecoderCache(own, cross)) == (TOKENS + 10) * BYTES_PER_TOKEN


def test_states_of_linear_attention_are_counted() -> None:
    config = Qwen3NextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    short, long = (cache_bytes(filled(DynamicCache(config=config), n, model)) for n in (16, 32))
    per_token = 2 * 2 * 8 * 4
    assert long - short == 16 * per_token
    assert short > 16 * per_token


def test_quantised_tensors_are_counted_by_their_parts() -> None:
    class Halves(Tensor):
        """A tensor that shows one shape and holds two others, as quantised tensors do."""

        low: Tensor
        scale: Tensor

        @staticmethod
        def __new__(cls, low: Tensor, scale: Tensor) -> Halves:
            halves: Halves = Tensor._make_wrapper_subclass(cls, low.shape, dtype=torch.float32)
            halves.low, halves.scale = low, scale
            return halves

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["low", "scale"], None

        @staticmethod
        def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> Halves:
            return Halves(inner["low"], inner["scale"])

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise NotImplementedError

    cache = DynamicCache(config=tiny_model().config)
    cache.layers[0].keys = Halves(torch.zeros(100, dtype=torch.int8), torch.zeros(4))
    assert cache_bytes(cache) == 100 + 4 * 4


def test_counting_changes_nothing_and_survives_cycles() -> None:
    cache = filled(DynamicCache(config=tiny_model().config))
    before = copy.deepcopy(cache)
    cache.layers[0].owner = cache
    cache.model = tiny_model()
    assert cache_bytes(cache) == TOKENS * BYTES_PER_TOKEN
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, before.layers, strict=True))


@pytest.mark.parametrize("chunk", [None, 16])
def test_the_memory_of_a_prefill_into_the_full_cache_and_into_the_methods(chunk: int | None) -> None:
    fed: list[int] = []
    passes: list[list[int]] = []
    press = KnormPress(keep_ratio=0.5, prune_after=16, skip_layers=())

    def after_run() -> None:
        passes.append(fed.copy())
        fed.clear()

    def look(module: Any, args: Any, kwargs: Any) -> None:
        fed.append(kwargs["input_ids"].shape[1])

    with tiny_model().register_forward_pre_hook(look, with_kwargs=True):
        (found,) = measure_memory(tiny_model(), [press], prompt(), prefill_chunk=chunk, after_run=after_run)
    assert passes == [[40] if chunk is None else [16, 16, 8]] * 2
    assert found.baseline_cache_bytes == TOKENS * BYTES_PER_TOKEN
    assert found.candidate_cache_bytes == 20 * (BYTES_PER_TOKEN + 3 * 2 * 4)
    assert found.baseline_device
    assert len(found.baseline_device) == len(found.candidate_device)
    for reading in (*found.baseline_device, *found.candidate_device):
        assert reading.name
        assert (reading.bytes is None) == (reading.reason is not None)

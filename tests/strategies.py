"""Shared strategies and tiny random models, built in memory."""

from __future__ import annotations

import functools
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from knormpress import KnormPress

VOCABULARY = 97

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def _llama() -> PretrainedConfig:
    return LlamaConfig(**_COMMON)


FAMILIES = {"llama": _llama}


@functools.cache
def tiny_model(
    family: str = "llama", attention: str = "sdpa", dtype: torch.dtype = torch.float64, seed: int = 0
) -> PreTrainedModel:
    """A random model of ``family`` whose attention is far from uniform, so that a wrong mask shows in the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            elif parameter.dim() > 1:
                parameter.mul_(8)
    return model.to(dtype).eval()


ratios = st.one_of(st.sampled_from([0.05, 0.3, 0.5, 0.7, 0.9, 1.0]), st.floats(0.02, 1.0).map(lambda r: round(r, 3)))


@st.composite
def presses(draw: st.DrawFn, layers: int = 3) -> KnormPress:
    """Policies that prune tiny prompts, uniform or with a plan per layer."""
    plan = st.lists(ratios, min_size=layers, max_size=layers).map(tuple)
    skipped = st.lists(st.integers(-layers, layers - 1), max_size=layers - 1).map(tuple)
    return KnormPress(
        keep_ratio=draw(ratios),
        prune_after=draw(st.integers(1, 24)),
        skip_layers=draw(skipped),
        layer_keep_ratios=draw(st.none() | plan),
        keep_recent=draw(st.sampled_from([0, 0, 1, 5])),
        prune_interval=draw(st.sampled_from([1, 2, 5])),
        schedule=draw(st.sampled_from(["proportional", "iterative"])),
    )


@st.composite
def passes(draw: st.DrawFn, most: int = 6) -> list[int]:
    """How many tokens each forward pass brings: prefill chunks, single tokens and second turns mixed."""
    sizes = st.one_of(st.just(1), st.integers(2, 20))
    return draw(st.lists(sizes, min_size=1, max_size=most))

"""Shared strategies and tiny random models, built in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from knormpress import KnormPress
from knormpress.cache.score import StoredTokens
from knormpress.cache.scores.named import SCORES

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


def _config(model_type: str, **changes: Any) -> PretrainedConfig:
    return AutoConfig.for_model(model_type, **{**_COMMON, **changes})


_MIXED = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 24,
}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: _config("llama"),
    "qwen2": lambda: _config("qwen2"),
    "qwen3": lambda: _config("qwen3", head_dim=8),
    "mistral": lambda: _config("mistral", sliding_window=None),
    "ministral-mixed": lambda: _config("ministral", head_dim=8, **_MIXED),
    "gemma2": lambda: _config("gemma2", head_dim=8, **_MIXED),
    "gemma3": lambda: _config("gemma3_text", head_dim=8, **_MIXED),
    "phi3": lambda: _config("phi3"),
    "gpt2": lambda: _config("gpt2", n_embd=32, n_layer=3, n_head=4, n_positions=512, num_key_value_heads=None),
    "gpt-neox": lambda: _config("gpt_neox", num_key_value_heads=None),
    "olmo2": lambda: _config("olmo2"),
    "granite": lambda: _config("granite"),
    "mixtral": lambda: _config("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": lambda: _config("qwen3_moe", head_dim=8, **_EXPERTS),
    "qwen3-next": lambda: _config("qwen3_next", head_dim=8, **_EXPERTS, **_LINEAR),
    "lfm2": lambda: _config("lfm2", layer_types=["conv", "full_attention", "full_attention"]),
}

# transformers gives this family no scaled_dot_product_attention, for its softcap.
EAGER_ONLY = {"gemma2"}


@functools.cache
def tiny_model(
    family: str = "llama", attention: str = "sdpa", dtype: torch.dtype = torch.float64, seed: int = 0
) -> PreTrainedModel:
    """A random model of ``family`` whose attention is far from uniform, so that a wrong mask shows in the logits.

    Norm weights are spread: with those of a fresh model all keys of a family with QK-norm have one and the same norm.
    """
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter)).add_(0.3 * torch.randn_like(parameter))
            elif parameter.dim() > 1:
                parameter.mul_(8)
    return model.to(dtype).eval()


def tokens(count: int, rows: int = 1, seed: int = 0) -> Tensor:
    """Random token ids (rows, count), none of which is the padding token or the beginning of a text."""
    return torch.randint(2, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(seed))


def left_padding(total: int, *lengths: int) -> Tensor:
    """An attention mask (rows, total): row i begins with ``lengths[i]`` padding tokens."""
    return torch.stack([(torch.arange(total) >= length).long() for length in lengths])


def kv_heads(model: PreTrainedModel) -> int:
    """Key-value heads of a layer."""
    config = model.config.get_text_config()
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


ratios = st.one_of(st.sampled_from([0.05, 0.3, 0.5, 0.7, 0.9, 1.0]), st.floats(0.02, 1.0).map(lambda r: round(r, 3)))


@st.composite
def presses(draw: st.DrawFn, layers: int = 3, *, scored: bool = False) -> KnormPress:
    """Policies that prune tiny prompts, uniform or with a plan per layer; where ``scored``, by any built-in scores."""
    names = st.lists(st.sampled_from(sorted(SCORES)), min_size=layers, max_size=layers).map(tuple)
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
        layer_scores=draw(st.none() | names) if scored else None,
    )


@st.composite
def passes(draw: st.DrawFn, most: int = 6) -> list[int]:
    """How many tokens each forward pass brings: prefill chunks, single tokens and second turns mixed."""
    sizes = st.one_of(st.just(1), st.integers(2, 20))
    return draw(st.lists(sizes, min_size=1, max_size=most))


def held(keys: torch.Tensor) -> StoredTokens:
    """What a layer holds that has stored ``keys`` (B, H, n, D) and dropped none; values like the keys."""
    return StoredTokens(keys, keys, torch.arange(keys.shape[2]).expand(keys.shape[:3]), 0)

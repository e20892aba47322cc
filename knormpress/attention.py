"""Attention over a cache's past without a mask, faster than sdpa where every new token attends to all of that past.

Both ways compute parts of one softmax and merge them by their log-sum-exp, which is exact: a single token's past is cut
into pieces so that no thread is idle, and several tokens attend to the past unmasked and causally to themselves.

``enable`` puts them behind transformers' attention interface, under ``sdpa``, while a KnormCache lives. Only a forward
pass that carries ``PLAIN`` takes them: another cache, another attention implementation and whatever is not covered
(masks of other forms, dropout, gradients, narrow types, devices but the CPU) get transformers' own function.

Shapes: B rows, H key-value heads, A attention heads (A = H * groups), q new tokens, n stored ones, D head size.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["PLAIN", "chunk_attention", "disable", "enable", "split_attention"]

PLAIN = "knorm_plain"
"""The keyword that tells ``sdpa``: the mask given, if any, hides nothing but the later ones of the new tokens."""

# Shorter pieces cost more in calls than the idle thread does: at 4,000 tokens in two pieces both are equal.
_PIECE = 2_048

# What an attention module may ask for that the functions below don't compute.
_EXTRAS = frozenset({"softcap", "s_aux", "position_bias", "cache", "sliding_window", "output_attentions"})


def split_attention(query: Tensor, key: Tensor, value: Tensor, pieces: int, scale: float | None = None) -> Tensor:
    """Attention of one token, the past cut into ``pieces`` that are computed side by side.

    Args:
        query: (B, A, 1, D).
        key, value: (B, H, n, D), n >= pieces.
        pieces: at least 1.
        scale: of the scores; 1 / sqrt(D) unless given.

    Returns:
        (B, A, 1, D).
    """
    batch, heads, tokens, size = key.shape
    packed = query.reshape(batch, heads, -1, size)
    length = tokens // pieces
    end = pieces * length

    repeated = packed[:, None].expand(-1, pieces, -1, -1, -1).flatten(0, 1)
    own_key, own_value = (
        states[:, :, :end].unflatten(2, (pieces, length)).transpose(1, 2).flatten(0, 1) for states in (key, value)
    )
    out, lse = _flash(repeated, own_key, own_value, scale, causal=False)
    out, lse = out.unflatten(0, (batch, pieces)), lse.unflatten(0, (batch, pieces))
    if end < tokens:  # what fewer tokens than there are pieces leave over is a piece of its own
        rest, rest_lse = _flash(packed, key[:, :, end:], value[:, :, end:], scale, causal=False)
        out, lse = torch.cat([out, rest[:, None]], dim=1), torch.cat([lse, rest_lse[:, None]], dim=1)
    return (out * lse.softmax(dim=1)[..., None]).sum(dim=1).reshape(query.shape)


def chunk_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Attention of q tokens to all that was there before them, and causally to themselves.

    Args:
        query: (B, A, q, D).
        key, value: (B, H, n + q, D), n >= 1; the last q are the tokens' own.
        scale: of the scores; 1 / sqrt(D) unless given.

    Returns:
        (B, A, q, D).
    """
    batch, heads, tokens, size = key.shape
    new = query.shape[2]
    packed = query.reshape(batch, heads, -1, size)
    past, past_lse = _flash(packed, key[:, :, : tokens - new], value[:, :, : tokens - new], scale, causal=False)
    groups = query.shape[1] // heads
    own_key, own_value = (states[:, :, tokens - new :].repeat_interleave(groups, dim=1) for states in (key, value))
    own, own_lse = _flash(query, own_key, own_value, scale, causal=True)
    share = (past_lse.reshape(own_lse.shape) - own_lse).sigmoid()[..., None]
    return torch.lerp(own, past.reshape(own.shape), share)


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float | None, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention (B, H, q, D), and the log-sum-exp (B, H, q) of its scores."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    return out, lse


def _pieces(batch: int, heads: int, tokens: int) -> int:
    """Into how many pieces to cut ``tokens`` so that heads times pieces keep every thread busy."""
    # Pieces of several rows are no view of their storage, and a copy costs more than it saves.
    if batch > 1:
        return 1
    threads = torch.get_num_threads()
    return min(threads // math.gcd(threads, heads), tokens // _PIECE)


def _covers(query: Tensor, key: Tensor, value: Tensor, dropout: float, extras: dict[str, Any]) -> bool:
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.float64)
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and not dropout
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        and all(extras[name] is None or extras[name] is False for name in _EXTRAS & extras.keys())
    )


def _attend(  # noqa: PLR0917 - the signature of transformers' attention functions
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' ``sdpa``, and the functions above where ``PLAIN`` allows and the shapes pay."""
    if kwargs.pop(PLAIN, False) and _covers(query, key, value, dropout, kwargs):
        new, tokens = query.shape[2], key.shape[2]
        if 1 < new < tokens:
            return chunk_attention(query, key, value, scaling).transpose(1, 2).contiguous(), None
        if new == 1 and (pieces := _pieces(key.shape[0], key.shape[1], tokens)) > 1:
            return split_attention(query, key, value, pieces, scaling).transpose(1, 2).contiguous(), None
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, **kwargs
    )
    return result


_users = 0
_lock = threading.Lock()


def enable() -> None:
    """Put the functions behind ``sdpa``, unless someone has put an attention of their own there."""
    global _users  # noqa: PLW0603
    with _lock:
        _users += 1
        if ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward:
            AttentionInterface.register("sdpa", _attend)


def disable() -> None:
    """Take back one ``enable``; the last leaves transformers as it was found."""
    global _users  # noqa: PLW0603
    with _lock:
        _users -= 1
        if not _users and ALL_ATTENTION_FUNCTIONS["sdpa"] is _attend:
            AttentionInterface.register("sdpa", sdpa_attention_forward)

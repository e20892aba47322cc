"""Attention to cached tokens without a mask; faster than sdpa where every new token attends to all cached tokens.

``split_attention`` cuts the cached tokens of one new token into pieces, so that no thread is idle. With
``chunk_attention``, several new tokens attend to the cached tokens without a mask, and to each other causally. Both
compute parts of one softmax and merge them by their log-sum-exp, which is exact.

``enable`` registers both in transformers' attention interface, under ``sdpa``, while a KnormCache exists. Only a
forward pass with the keyword ``PLAIN`` uses them. All other cases (other caches, attention implementations or masks,
dropout, gradients, narrow types, devices other than the CPU) use transformers' own function.

Shapes: B rows, H key-value heads, A attention heads (A = H * groups), q new tokens, n stored ones, D head size.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["PLAIN", "chunk_attention", "enable", "split_attention", "why_off"]

logger = logging.getLogger(__name__)

PLAIN = "knorm_plain"
"""Keyword argument for ``sdpa``: the mask, if there is one, is causal among the new tokens and hides nothing else."""

# With shorter pieces, the extra calls cost more than an idle thread; at two pieces of 2,000 tokens both cost the same.
_PIECE = 2_048

# Arguments of attention functions that the functions below don't support.
_EXTRAS = frozenset({"softcap", "s_aux", "position_bias", "cache", "sliding_window", "output_attentions"})


def split_attention(query: Tensor, key: Tensor, value: Tensor, pieces: int, scale: float | None = None) -> Tensor:
    """Attention of one token, with the cached tokens cut into ``pieces`` that are computed in parallel.

    Args:
        query: (B, A, 1, D).
        key, value: (B, H, n, D), n >= pieces.
        pieces: at least 1.
        scale: factor of the scores; 1 / sqrt(D) unless given.

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
    if end < tokens:  # the remainder of the division is one more piece
        rest, rest_lse = _flash(packed, key[:, :, end:], value[:, :, end:], scale, causal=False)
        out, lse = torch.cat([out, rest[:, None]], dim=1), torch.cat([lse, rest_lse[:, None]], dim=1)
    return (out * lse.softmax(dim=1)[..., None]).sum(dim=1).reshape(query.shape)


def chunk_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Attention of q new tokens to all tokens before them, and causally to each other.

    Args:
        query: (B, A, q, D).
        key, value: (B, H, n + q, D), n >= 1; the last q belong to the new tokens.
        scale: factor of the scores; 1 / sqrt(D) unless given.

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
    """The attention output (B, H, q, D), and the log-sum-exp (B, H, q) of its scores."""
    operator = _flash_operator()
    assert operator is not None
    out, lse = operator(query, key, value, 0.0, causal, scale=scale)
    return out, lse


def _flash_operator() -> Any:
    """The operator that also returns the log-sum-exp; private in torch, so that a release may lack it."""
    return getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def _pieces(batch: int, heads: int, tokens: int) -> int:
    """How many pieces to cut ``tokens`` into, so that heads * pieces keep every thread busy."""
    # With several rows the pieces can't be a view of the storage, and a copy costs more than it saves.
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
    """transformers' ``sdpa``, or one of the functions above where ``PLAIN`` allows it and the shapes make it faster."""
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


# Who wants the functions above. What is registered follows from this set, so that a finalizer may run at any moment.
_users: set[int] = set()
_numbers = itertools.count()
_lock = threading.RLock()
_warned = False


def enable(user: object) -> None:
    """Register the functions as ``sdpa`` for as long as ``user`` lives, unless another library has registered its own.

    Where they can't be used, transformers' own or the other library's attention is; the results are the same. This is
    logged once.
    """
    number = next(_numbers)
    _users.add(number)
    weakref.finalize(user, _disable, number)
    _settle()


def why_off() -> str | None:
    """Why the functions can't be used in this process; None if they can."""
    if _flash_operator() is None:
        return f"torch {torch.__version__} has no CPU flash attention operator"
    used = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if used in (sdpa_attention_forward, _attend):
        return None
    return f"{getattr(used, '__module__', 'another library')} has replaced transformers' sdpa attention"


def _disable(number: int) -> None:
    _users.discard(number)
    _settle()


def _settle() -> None:
    global _warned  # noqa: PLW0603
    with _lock:
        reason = why_off()
        if reason is None:
            AttentionInterface.register("sdpa", _attend if _users else sdpa_attention_forward)
        elif _users and not _warned:
            _warned = True
            logger.warning("the faster attention is off, results are the same: %s", reason)

"""Attention masks for layers that store different tokens.

transformers builds one mask for all full-attention layers, with a column for every token seen. ``layer_mask`` takes
from it the columns of the tokens that one layer still stores. ``cache.hooks`` passes them to the attention modules.

Shapes: B rows, H key-value heads, A attention heads (A = H * groups), q new tokens, n slots stored before them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

__all__ = [
    "SharedMask",
    "dense_mask",
    "flex_mask",
    "full_past",
    "is_causal",
    "layer_mask",
    "real_tokens",
]


# Additive masks hide with -inf, with the smallest number of the dtype, or with -1e4, which fits in float16.
_HIDDEN = -9_999.0


@dataclass(frozen=True)
class SharedMask:
    """The shared mask of the current forward pass, read once for all layers; the mask itself is not kept alive.

    ``covers`` is the number of tokens that the mask covers; ``plain`` as for ``layer_mask``. ``causal`` is true if
    ``sdpa`` is in use and the mask is causal among the new tokens and hides nothing else.
    """

    mask: Callable[[], Any]
    dense: Callable[[], Tensor | None]
    covers: int
    plain: bool
    causal: bool

    @classmethod
    def none(cls, *, causal: bool) -> SharedMask:
        """The absence of a mask."""
        return cls(lambda: None, lambda: None, 0, True, causal)

    @classmethod
    def read(cls, mask: Any, seen: int, new: int, *, sdpa: bool) -> SharedMask:
        """Read ``mask`` for ``new`` tokens after ``seen`` ones. It may cover too few tokens: check ``covers``."""
        dense = dense_mask(mask, new, seen + new) if isinstance(mask, BlockMask) else mask
        weak_mask = weakref.ref(mask)
        covers = dense.shape[-1]
        plain = covers == seen + new and full_past(dense, seen)
        causal = sdpa and plain and is_causal(dense, seen)
        return cls(weak_mask, weak_mask if dense is mask else lambda: dense, covers, plain, causal)


def real_tokens(mask: Any, seen: int, new: int) -> Tensor | None:
    """Which of the ``new`` tokens are not padding, according to the mask: no query attends to padding.

    Args:
        mask: None; (B, seen + new), as for flash attention; or (B, 1 or A, new, seen + new), boolean (True attends)
            or additive.

    Returns:
        (B, new) boolean, or None if there is no padding.
    """
    if mask is None:
        return None
    if mask.dim() == 2:
        real = mask[:, seen:].bool()
        return None if bool(real.all()) else real
    own = _attends(mask[..., seen:])
    if bool(own.diagonal(dim1=-2, dim2=-1).all()):
        return None
    return own.any(dim=1).any(dim=1)


def dense_mask(mask: BlockMask, new: int, total: int) -> Tensor:
    """A flex-attention mask over ``new`` queries and ``total`` keys as a tensor (B, 1, new, total); True attends."""
    return create_mask(mask.mask_mod, mask.shape[0], None, new, total, device=mask.kv_num_blocks.device.type)


def flex_mask(mask: Tensor) -> BlockMask:
    """The flex-attention mask that is equal to ``mask`` (B, 1 or A, q, n)."""
    batch, heads, queries, keys = mask.shape

    def attends(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[row, head if heads > 1 else 0, query, key]

    return create_block_mask(
        attends, batch, heads if heads > 1 else None, queries, keys, device=mask.device.type, _compile=False
    )


def full_past(mask: Tensor, seen: int) -> bool:
    """Whether every new token attends to all tokens seen before; true without padding and custom masks."""
    past = mask[..., :seen]
    return bool(past.all() if past.dtype == torch.bool else (past == 0).all())


def is_causal(mask: Tensor, seen: int) -> bool:
    """Whether a boolean mask (B, 1 or A, q, seen + q) is causal among the q new tokens; their past is not checked."""
    if mask.dim() != 4 or mask.dtype != torch.bool:
        return False
    own = mask[..., seen:]
    return bool((own == torch.ones_like(own[0, 0]).tril()).all())


def layer_mask(mask: Any, positions: Tensor, *, seen: int, new: int, groups: int, holes: bool, plain: bool) -> Any:
    """The columns of one layer's stored tokens, taken from a mask over all tokens seen.

    Args:
        mask: the shared mask, see ``real_tokens``; None if nothing is masked (rows have empty slots only if there is
            padding, and so a mask).
        positions: (B, H, n), the original positions of the stored tokens; -1 for an empty slot.
        seen: tokens seen before the new ones, with padding.
        new: the number of new tokens, q.
        groups: attention heads per key-value head.
        holes: whether ``positions`` has empty slots.
        plain: whether ``mask`` hides no token of the past (see ``full_past``).

    Returns:
        None if nothing is masked; (B, n + q) for a mask of two dimensions; else (B, 1 or A, q, n + q) in the dtype
        of ``mask``.
    """
    if mask is None:
        return None
    if plain and not holes:
        return mask[..., seen - positions.shape[-1] :]
    if mask.dim() == 2:
        # Empty slots and padding are at the same slots in all heads of a row.
        past = mask[:, :seen].gather(1, positions[:, 0].clamp(min=0).long())
        return torch.cat([past.masked_fill(positions[:, 0] < 0, 0), mask[:, seen:]], dim=-1)
    batch, heads = positions.shape[:2]
    if mask.shape[1] > 1:
        positions, heads, groups = positions.repeat_interleave(groups, dim=1), heads * groups, 1
    mask = mask.expand(batch, heads, new, seen + new)
    columns = positions[:, :, None].expand(-1, -1, new, -1)
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    past = mask[..., :seen].gather(-1, columns.clamp(min=0).long()).masked_fill(columns < 0, hidden)
    return torch.cat([past, mask[..., seen:]], dim=-1).repeat_interleave(groups, dim=1)


def _attends(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > _HIDDEN

"""Attention masks for layers that store different tokens.

transformers builds one mask for all full-attention layers, with a column for every token seen. ``SharedMask`` takes
from it the columns of the tokens that one layer still stores. ``cache.hooks`` passes them to the attention modules.

Shapes: B rows, H key-value heads, A attention heads (A = H * groups), q new tokens, n slots stored before them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from torch.nn.functional import pad

from knormpress.cache.log import is_at_hand

__all__ = ["SharedMask", "dense_mask", "flex_mask", "real_tokens"]


# Additive masks hide with -inf, with the smallest number of the dtype, or with -1e4, which fits in float16.
_HIDDEN = -9_999.0


@dataclass(frozen=True)
class SharedMask:
    """The shared mask of the forward pass under way, read once for all layers; the mask itself is not kept alive.

    ``covers`` is the number of tokens that the mask covers, of which ``seen`` came before this pass. ``real`` (B or 1,
    q) is False for new tokens that are padding; None if none is. ``plain`` is true if the mask hides no token of the
    past; ``causal``, if ``sdpa`` is in use and the mask is causal among the new tokens and hides nothing else;
    ``padded``, if ``sdpa`` is in use and the mask hides of the past all padding and nothing else. All are false where
    nobody looked.
    """

    mask: Callable[[], Any]
    dense: Callable[[], Tensor | None]
    seen: int
    covers: int
    real: Tensor | None
    plain: bool
    causal: bool
    padded: bool
    _parts: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @classmethod
    def none(cls, *, causal: bool) -> SharedMask:
        """The absence of a mask."""
        return cls(lambda: None, lambda: None, 0, 0, None, True, causal, False)

    @classmethod
    def read(cls, mask: Any, seen: int, new: int, *, sdpa: bool, real: Tensor | None) -> SharedMask:
        """Read ``mask`` for ``new`` tokens after ``seen`` ones. It may cover too few tokens: check ``covers``.

        ``real`` (B, seen) says which of those are padding, if any is. Then the host does not wait to learn what the
        mask says.
        """
        dense = dense_mask(mask, new, seen + new) if isinstance(mask, BlockMask) else mask
        weak_mask = weakref.ref(mask)
        found = weak_mask, weak_mask if dense is mask else lambda: dense, seen, dense.shape[-1]
        if dense.shape[-1] != seen + new:
            return cls(*found, None, False, False, False)
        own = _own(dense, seen)
        if real is not None:
            return cls(*found, _real(own), False, False, sdpa and _hides_padding_alone(dense[..., :seen], real))
        can_be_causal = sdpa and dense.dim() == 4 and dense.dtype == torch.bool
        past = dense[..., :seen]
        flags = [past.all() if past.dtype == torch.bool else (past == 0).all(), _is_whole(own)]
        flags += [(own == torch.ones_like(own[0, 0]).tril()).all()] if can_be_causal else []
        plain, whole, *causal = torch.stack(flags).tolist()
        return cls(*found, None if whole else _real(own), plain, plain and causal == [True], False)

    def of(self, kept: Tensor, *, since: int, groups: int, holes: bool) -> Tensor | None:
        """The columns of one layer's stored tokens.

        Args:
            kept: (B, H, 1, m) int32, one more than the position of each token that the last pruning kept; 0 for an
                empty slot, which are the same in all heads of a row. Every later token is stored.
            since: tokens seen up to that pruning.
            groups: attention heads per key-value head.
            holes: whether ``kept`` has empty slots.

        Returns:
            None if nothing is masked (rows have empty slots only if there is padding, and so a mask); (B, n + q) for a
            mask of two dimensions; else (B, 1 or A, q, n + q) in the dtype of the shared mask.
        """
        mask = self.dense()
        if mask is None:
            return None
        if self.plain and not holes:
            return mask[..., since - kept.shape[-1] :]
        if self.padded:
            # Padding is never kept, so that heads differ in nothing that a mask could show.
            if (since,) not in self._parts:
                self._parts[since,] = mask[..., since:].expand(len(kept), -1, -1, -1)
            visible = (kept[:, :1] > 0).expand(-1, -1, mask.shape[2], -1)
            return torch.cat([visible, self._parts[since,]], dim=-1)
        if mask.dim() == 2:
            # Padding and empty slots are at the same slots in all heads of a row.
            past, newer = self._behind_hidden(mask, since, tuple(mask.shape[:1]))
            return torch.cat([past.gather(1, kept[:, 0, 0].long()), newer], dim=-1)
        if mask.shape[1] > 1:
            kept, groups = kept.repeat_interleave(groups, dim=1), 1
        batch, heads, queries = *kept.shape[:2], mask.shape[2]
        # The heads of a group share a mask. One query is read once for each of them, which saves a copy.
        lines = groups if queries == 1 else queries
        past, newer = self._behind_hidden(mask, since, (batch, heads, lines))
        own = torch.cat([past.gather(-1, kept.long().expand(-1, -1, lines, -1)), newer], dim=-1)
        return own.view(batch, heads * groups, 1, -1) if queries == 1 else own.repeat_interleave(groups, dim=1)

    def _behind_hidden(self, mask: Tensor, since: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The mask with a hidden column before its first, and its columns from ``since`` on; each made once."""
        parts, key = self._parts, (*shape, since)
        if () not in parts:
            hidden = torch.finfo(mask.dtype).min if mask.dtype.is_floating_point else 0
            parts[()] = pad(mask, (1, 0), value=hidden)
        if shape not in parts:
            parts[shape] = parts[()].expand(*shape, -1)
        if key not in parts:
            parts[key] = parts[shape][..., 1 + since :]
        return parts[shape], parts[key]


def real_tokens(mask: Any, seen: int, new: int) -> Tensor | None:
    """Which of the ``new`` tokens are not padding, according to the mask: no query attends to padding.

    Args:
        mask: None; (B, seen + new), as for flash attention; or (B, 1 or A, new, seen + new), boolean (True attends)
            or additive.

    Returns:
        (B, new) boolean, or None if there is no padding.
    """
    own = None if mask is None else _own(mask, seen)
    return None if own is None or bool(_is_whole(own)) else _real(own)


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


def _hides_padding_alone(past: Tensor, real: Tensor) -> bool:
    """Whether a mask (B, 1 or A, q, seen) hides what is not ``real`` (B, seen), and nothing else.

    False if the host would have to wait for it.
    """
    if not is_at_hand(past) or past.dtype != torch.bool or past.dim() != 4 or past.shape[1] > 1:
        return False
    # It is in the host's memory. Read by `item` it would be counted as a wait that no device has: there it ends above.
    answer = np.empty((), np.bool_)
    torch.from_numpy(answer).copy_((past == real[:, None, None]).all())
    return bool(answer)


def _own(mask: Tensor, seen: int) -> Tensor:
    """Which new tokens attend to which (B, 1 or A, q, q); of a mask of two dimensions, which are real (B, q)."""
    own = mask[..., seen:]
    if own.dim() == 2:
        return own.bool()
    return own if own.dtype == torch.bool else own > _HIDDEN


def _is_whole(own: Tensor) -> Tensor:
    return (own if own.dim() == 2 else own.diagonal(dim1=-2, dim2=-1)).all()


def _real(own: Tensor) -> Tensor:
    return own if own.dim() == 2 else own.any(dim=(1, 2))

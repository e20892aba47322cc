"""Attention masks for layers that store different tokens.

transformers builds one mask for all full-attention layers, with a column for every token seen. ``layer_mask`` takes
from it the columns of the tokens that one layer still stores. ``MaskHooks`` passes each attention module its own mask;
the hooks do nothing while another cache is in use.

Shapes: B rows, H key-value heads, A attention heads (A = H * groups), q new tokens, n slots stored before them.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from transformers import Cache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from knormpress.cache import attention

__all__ = [
    "MaskHooks",
    "MaskedCache",
    "SharedMask",
    "dense_mask",
    "flex_mask",
    "full_past",
    "is_attention",
    "is_causal",
    "layer_mask",
    "real_tokens",
]


# Additive masks hide with -inf, with the smallest number of the dtype, or with -1e4, which fits in float16.
_HIDDEN = -9_999.0


class MaskedCache(Cache):
    """A cache whose layers need their own masks; it works only with the model that ``hooks`` are installed on."""

    hooks: MaskHooks

    def mask_for(self, module: nn.Module, mask: Any, batch: int, new: int) -> tuple[Any, bool]:
        """The mask of ``module`` over its stored tokens and the ``new`` tokens of each row.

        Returned with it: whether this mask is causal among the new tokens and hides nothing else.
        """
        raise NotImplementedError


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


class MaskHooks:
    """Pre-hooks that pass each attention module of a model its own mask; removed with the last cache that uses them.

    All caches of a model share one set of hooks; so does a copy of a cache.
    """

    _installed: ClassVar[weakref.WeakKeyDictionary[PreTrainedModel, weakref.ref[MaskHooks]]] = (
        weakref.WeakKeyDictionary()
    )

    @classmethod
    def on(cls, model: PreTrainedModel) -> MaskHooks:
        """The hooks of ``model``; installed now if no cache of this model exists."""
        known = cls._installed.get(model)
        hooks = known() if known is not None else None
        if hooks is None:
            hooks = cls(model)
            cls._installed[model] = weakref.ref(hooks)
        return hooks

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = weakref.ref(model)
        modules = [module for module in model.modules() if is_attention(module)]
        self.layers = {module.layer_idx for module in modules}
        self._modules = weakref.WeakSet(modules)
        handles = [module.register_forward_pre_hook(_Hook(module), with_kwargs=True) for module in modules]
        for handle in handles:
            weakref.finalize(self, handle.remove)
        attention.enable()
        weakref.finalize(self, attention.disable)

    def owns(self, module: nn.Module) -> bool:
        """Whether ``module`` belongs to this model, and not to a copy of it: a copy has copies of the hooks."""
        return module in self._modules

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskHooks:
        return self


class _Hook:
    """The pre-hook of one attention module."""

    def __init__(self, module: nn.Module) -> None:
        # accelerate replaces `forward` of the instance; the class keeps the real signature.
        parameters = inspect.signature(type(module).forward).parameters
        self.mask_index = list(parameters)[1:].index("attention_mask")
        used = vars(sys.modules[type(module).__module__]).get("ALL_ATTENTION_FUNCTIONS")
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self.takes_plain = takes_any and used is ALL_ATTENTION_FUNCTIONS

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = next((v for v in (*kwargs.values(), *args) if isinstance(v, MaskedCache)), None)
        if cache is None or not cache.hooks.owns(module):
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        by_position = len(args) > self.mask_index
        mask = args[self.mask_index] if by_position else kwargs.get("attention_mask")
        own, plain = cache.mask_for(module, mask, *hidden.shape[:2])
        if plain and self.takes_plain:
            kwargs = {**kwargs, attention.PLAIN: True}
        if by_position:
            return (*args[: self.mask_index], own, *args[self.mask_index + 1 :]), kwargs
        return args, {**kwargs, "attention_mask": own}


def is_attention(module: nn.Module) -> bool:
    """Whether ``module`` is the attention of a layer with an index, and takes a mask."""
    if not isinstance(getattr(module, "layer_idx", None), int) or "Attention" not in type(module).__name__:
        return False
    return "attention_mask" in inspect.signature(type(module).forward).parameters

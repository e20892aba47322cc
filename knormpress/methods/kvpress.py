"""Presses of the kvpress library as methods: they prune with hooks, and leave positions and masks to the caller.

kvpress (https://github.com/NVIDIA/kvpress, as of 0.5.5) prunes in a hook after each attention module, in the first
pass only. It writes the shorter keys into the cache, whose length is then taken for the next position. It also reads
``cache_position``, which transformers no longer passes to the layers. ``PressedCache`` counts the tokens seen, and
``KvpressMethod`` passes each attention module the missing arguments.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from knormpress.cache.generation import generation_through
from knormpress.cache.hooks import is_attention
from knormpress.cache.masks import real_tokens
from knormpress.errors import KnormError
from knormpress.policy.policy import Policy

__all__ = ["KvpressMethod", "PressedCache", "PressedLayer", "is_kvpress"]

# These presses rotate the kept keys to new positions, so that tokens lose their original positions.
_REROTATES = {"FinchPress", "KeyRerotationPress", "RestoreKVPress"}


class PressedLayer(DynamicLayer):
    """A full-attention layer that kvpress shortens, and that still reports the true position of the next token."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = 0

    @property
    def stored(self) -> int:
        """Tokens that the layer holds now."""
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        """Tokens seen, which is the position of the next token; transformers derives positions from it."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns of the mask, position of the first): the stored tokens count as right before the new ones."""
        return self.stored + query_length, self.seen - self.stored

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new tokens: ``key_states`` and ``value_states`` (B, H, new, D)."""
        self.seen += key_states.shape[-2]
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` tokens."""
        before = self.stored
        super().crop(tokens_to_remove)
        self.seen -= before - self.stored

    def reset(self) -> None:
        """Remove all tokens."""
        super().reset()
        self.seen = 0


class PressedCache(DynamicCache):
    """transformers' own cache for ``model``, with full-attention layers that count the tokens seen."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(config=model.config)
        self.layers = [PressedLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]


def is_kvpress(value: object) -> bool:
    """Whether ``value`` is a press of kvpress or a press class. Does not import kvpress."""
    base = getattr(sys.modules.get("kvpress"), "BasePress", None)
    return base is not None and (isinstance(value, base) or (isinstance(value, type) and issubclass(value, base)))


@dataclass(frozen=True)
class KvpressMethod:
    """A method that prunes with a press of kvpress.

    It follows ``keep_ratio``, ``skip_layers``, ``layer_keep_ratios`` and ``prune_after`` of the policy, by setting the
    press's ``compression_ratio`` before each layer. Like kvpress, it prunes in the first pass only: later chunks of a
    prompt and decoded tokens are kept, and ``prune_interval`` has no effect.

    Args:
        press: the press of kvpress; its ``compression_ratio`` is overwritten.
        policy: what to keep, and when to prune.
    """

    press: Any
    policy: Policy

    @classmethod
    def of(cls, press: Any, policy: Policy) -> KvpressMethod:
        """The method of ``press``, which is a press of kvpress or a press class.

        Raises:
            KnormError: the press has no ratio to set, rotates keys to new positions, or can't follow ``policy``.
        """
        name = press.__name__ if isinstance(press, type) else type(press).__name__
        if policy.keep_recent or policy.schedule != "proportional":
            raise KnormError(
                f"kvpress's {name} can't follow keep_recent {policy.keep_recent} and schedule {policy.schedule!r}; "
                'use keep_recent 0 and schedule "proportional"'
            )
        try:
            own = press() if isinstance(press, type) else copy.deepcopy(press)
        except TypeError as error:
            raise KnormError(
                f"kvpress's {name} can't be made without arguments ({error}); make one in your own module, and "
                "give the method as module:object"
            ) from error
        if _REROTATES.intersection(type(each).__name__ for each in _parts(own)):
            raise KnormError(f"kvpress's {name} turns kept keys to new positions, which is not supported; use another")
        try:
            if "compression_ratio" not in dir(own):
                raise AttributeError("the press has none")
            own.compression_ratio = 1.0 - policy.keep_ratio
        except AttributeError as error:
            raise KnormError(
                f"the compression_ratio of kvpress's {name} can't be set: {error}; use another press"
            ) from error
        return cls(own, policy)

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[Callable[[], PressedCache]]:
        """Prune every forward pass of ``model`` into a fresh ``PressedCache``; each ``generate()`` gets its own.

        Raises:
            KnormError: the policy names layers that the model doesn't have, or a forward pass has padding.
        """
        attention = [module for module in model.modules() if is_attention(module)]
        ratios = self.policy.ratios(model.config.get_text_config(decoder=True).num_hidden_layers)

        def prepare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            cache, index = kwargs.get("past_key_values"), cast(int, module.layer_idx)
            layer = cache.layers[index] if isinstance(cache, PressedCache) else None
            if not isinstance(layer, PressedLayer):
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            end = layer.seen + hidden.shape[1]
            self.press.compression_ratio = 1.0 - ratios[index] if end >= self.policy.prune_after else 0.0
            positions = torch.arange(layer.seen, end, device=hidden.device)
            mask = _mask_of(layer, kwargs.get("attention_mask"), hidden.shape[1])
            return args, {**kwargs, "cache_position": positions, "attention_mask": mask}

        handles = [module.register_forward_pre_hook(prepare, with_kwargs=True) for module in attention]
        # kvpress puts the model's rotary embedding into every layer and leaves it there, in copies of the model too.
        without = [module for module in attention if not hasattr(module, "rotary_emb")]
        try:
            with self.press(model), generation_through(model, lambda: PressedCache(model)):
                yield lambda: PressedCache(model)
        finally:
            for handle in handles:
                handle.remove()
            # Records identify a method by its values, so a measurement must not change them.
            self.press.compression_ratio = 1.0 - self.policy.keep_ratio
            for module in without:
                module._modules.pop("rotary_emb", None)
            for module in attention:
                # kvpress does not remove these, and its patched attention would use them on the keys of other caches.
                vars(module).pop("masked_key_indices", None)


def _mask_of(layer: PressedLayer, mask: Any, new: int) -> Any:
    """The mask of ``layer``, made from a mask with the size of the first layer."""
    if not layer.seen and isinstance(mask, Tensor) and real_tokens(mask, 0, new) is not None:
        raise KnormError("kvpress prunes padding like any token; use prompts without padding, one at a time")
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] == layer.stored + new:
        return mask
    visible = True if mask.dtype == torch.bool else 0.0
    return nn.functional.pad(mask[..., mask.shape[-1] - new :], (layer.stored, 0), value=visible)


def _parts(press: Any) -> Iterator[Any]:
    """``press``, and the presses that it consists of."""
    yield press
    for value in vars(press).values():
        for part in value if isinstance(value, (list, tuple)) else (value,):
            if is_kvpress(part) and not isinstance(part, type):
                yield from _parts(part)

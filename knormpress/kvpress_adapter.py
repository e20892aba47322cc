"""Presses of the kvpress library as methods: theirs drop by hooks, and leave positions and masks to their caller.

kvpress (https://github.com/NVIDIA/kvpress, read at 0.5.5) prunes in a hook after each attention module, in the first
pass only. It writes the shortened keys into the cache, whose length then stands for the next position, and it reads
``cache_position``, which transformers no longer hands to the layers. ``PressedCache`` knows what it has seen, and
``KvpressMethod`` hands each attention module what is missing.
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

from knormpress.cache import generation_through
from knormpress.errors import KnormError
from knormpress.masks import is_attention, real_tokens
from knormpress.press import KnormPress

__all__ = ["KvpressMethod", "PressedCache", "PressedLayer", "is_kvpress"]

# They turn the kept keys to new positions, so that none of the tokens has its own any more.
_REROTATES = {"FinchPress", "KeyRerotationPress", "RestoreKVPress"}


class PressedLayer(DynamicLayer):
    """A full-attention layer that somebody else shortens, and that still tells the next token's true position."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = 0

    @property
    def stored(self) -> int:
        """Tokens held now."""
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        """Tokens seen: the position of the next token, from which transformers derives its positions."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns of the mask, position of the first): what is stored stands right before the new tokens."""
        return self.stored + query_length, self.seen - self.stored

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new tokens: ``key_states`` and ``value_states`` (B, H, new, D)."""
        self.seen += key_states.shape[-2]
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest ``-tokens_to_remove`` tokens."""
        before = self.stored
        super().crop(tokens_to_remove)
        self.seen -= before - self.stored

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self.seen = 0


class PressedCache(DynamicCache):
    """transformers' own cache for ``model``, with full-attention layers that count what they have seen."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(config=model.config)
        self.layers = [PressedLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]


def is_kvpress(value: object) -> bool:
    """Whether ``value`` is a press of kvpress or a class of them; kvpress is not imported for that."""
    base = getattr(sys.modules.get("kvpress"), "BasePress", None)
    return base is not None and (isinstance(value, base) or (isinstance(value, type) and issubclass(value, base)))


@dataclass(frozen=True)
class KvpressMethod:
    """A method that prunes by a press of kvpress.

    Of the policy it follows ``keep_ratio``, ``skip_layers``, ``layer_keep_ratios`` and ``prune_after``, by setting the
    press's ``compression_ratio`` before each layer. As kvpress does, it prunes in the first pass and never again: later
    chunks of a prompt and decoded tokens are kept, and so ``prune_interval`` has no meaning.

    Args:
        press: the press of kvpress; its ``compression_ratio`` is overwritten.
        policy: what to keep, and when.
    """

    press: Any
    policy: KnormPress

    @classmethod
    def of(cls, press: Any, policy: KnormPress) -> KvpressMethod:
        """The method of ``press``, a press of kvpress or a class of them.

        Raises:
            KnormError: the press has no ratio to set, turns keys to new positions, or can't follow ``policy``.
        """
        name = press.__name__ if isinstance(press, type) else type(press).__name__
        if policy.keep_recent or policy.schedule != "proportional":
            raise KnormError(
                f"kvpress's {name} knows neither keep_recent ({policy.keep_recent}) nor a schedule "
                f'({policy.schedule!r}); use 0 and "proportional"'
            )
        try:
            own = press() if isinstance(press, type) else copy.deepcopy(press)
        except TypeError as error:
            raise KnormError(
                f"kvpress's {name} can't be made without arguments ({error}); make one in a module of your own, and "
                "give the method as module:object"
            ) from error
        if _REROTATES.intersection(type(each).__name__ for each in _parts(own)):
            raise KnormError(f"kvpress's {name} turns kept keys to new positions, which is not supported; use another")
        try:
            if "compression_ratio" not in dir(own):
                raise AttributeError("it has none")
            own.compression_ratio = 1.0 - policy.keep_ratio
        except AttributeError as error:
            raise KnormError(f"the compression_ratio of kvpress's {name} can't be set: {error}") from error
        return cls(own, policy)

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[Callable[[], PressedCache]]:
        """Prune in every forward pass of ``model`` into a fresh ``PressedCache``; ``generate()`` gets one of its own.

        Raises:
            KnormError: the policy names layers that the model doesn't have; or, in a forward pass, there is padding.
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
        try:
            with self.press(model), generation_through(model, lambda: PressedCache(model)):
                yield lambda: PressedCache(model)
        finally:
            for handle in handles:
                handle.remove()
            # Records name a method by its values, which a measurement may not change.
            self.press.compression_ratio = 1.0 - self.policy.keep_ratio
            for module in attention:
                # kvpress leaves these behind, and its patched attention would overwrite other caches' keys with them.
                vars(module).pop("masked_key_indices", None)


def _mask_of(layer: PressedLayer, mask: Any, new: int) -> Any:
    """The mask of ``layer``, out of one that was sized for the first layer."""
    if not layer.seen and isinstance(mask, Tensor) and real_tokens(mask, 0, new) is not None:
        raise KnormError("kvpress prunes padding like any token; give it prompts without padding, one at a time")
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] == layer.stored + new:
        return mask
    visible = True if mask.dtype == torch.bool else 0.0
    return nn.functional.pad(mask[..., mask.shape[-1] - new :], (layer.stored, 0), value=visible)


def _parts(press: Any) -> Iterator[Any]:
    """``press``, and the presses that it is made of."""
    yield press
    for value in vars(press).values():
        for part in value if isinstance(value, (list, tuple)) else (value,):
            if is_kvpress(part) and not isinstance(part, type):
                yield from _parts(part)

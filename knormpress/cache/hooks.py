"""Hooks that pass each attention module its own mask; they do nothing while another cache is in use.

An attention module has at most one hook, whoever asks for it: a model, and a part of it that is used by itself. A copy
of a model, made with ``copy.deepcopy`` or by pickling, carries copies of the hooks, which do nothing.
"""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Callable, MutableMapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from knormpress.cache import attention

__all__ = ["MaskHooks", "MaskedCache", "device_of", "is_attention"]

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

# Finalizers run in the middle of anything, in the thread that holds the lock too.
_lock = threading.RLock()


class MaskedCache(Cache):
    """A cache whose layers need their own masks; it works only with the model that ``hooks`` are installed on."""

    hooks: MaskHooks

    def mask_for(self, module: nn.Module, mask: Any, batch: int, new: int) -> tuple[Any, bool]:
        """The mask of ``module`` over its stored tokens and the ``new`` tokens of each row.

        Returned with it: whether this mask is causal among the new tokens and hides nothing else.
        """
        raise NotImplementedError


class MaskHooks:
    """The hooks on the attention modules of a model; each is removed with the last cache that uses it.

    All caches of a model share one set of hooks; so does a copy of a cache.
    """

    _installed: ClassVar[weakref.WeakKeyDictionary[PreTrainedModel, weakref.ref[MaskHooks]]] = (
        weakref.WeakKeyDictionary()
    )

    @classmethod
    def on(cls, model: PreTrainedModel) -> MaskHooks:
        """The hooks of ``model``; installed now if no cache of this model exists."""
        with _lock:
            return _shared(cls._installed, model, cls)

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = weakref.ref(model)
        modules = [module for module in model.modules() if is_attention(module)]
        self.layers = {module.layer_idx for module in modules}
        self._modules = weakref.WeakSet(modules)
        self._hooks = [_Installed.on(module) for module in modules]
        attention.enable(self)

    @property
    def devices(self) -> dict[int, torch.device]:
        """The device that each layer computes on; with accelerate's offloading its weights may be elsewhere."""
        return {int(module.layer_idx): device_of(module) for module in self._modules}  # type: ignore[arg-type]

    def owns(self, module: nn.Module) -> bool:
        """Whether ``module`` belongs to this model."""
        return module in self._modules

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskHooks:
        return self


class _Installed:
    """The hook on one attention module, for as long as anybody holds on to this."""

    _on_modules: ClassVar[weakref.WeakKeyDictionary[nn.Module, weakref.ref[_Installed]]] = weakref.WeakKeyDictionary()

    @classmethod
    def on(cls, module: nn.Module) -> _Installed:
        return _shared(cls._on_modules, module, cls)

    def __init__(self, module: nn.Module) -> None:
        handle = module.register_forward_pre_hook(_Hook(module), with_kwargs=True)
        weakref.finalize(self, handle.remove)


class _Hook:
    """The pre-hook of one attention module; None makes one that does nothing."""

    def __init__(self, module: nn.Module | None) -> None:
        self._module = weakref.ref(module) if module is not None else None
        if module is None:
            return
        # accelerate replaces `forward` of the instance; the class keeps the real signature.
        parameters = inspect.signature(type(module).forward).parameters
        self.mask_index = list(parameters)[1:].index("attention_mask")
        used = vars(sys.modules[type(module).__module__]).get("ALL_ATTENTION_FUNCTIONS")
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self.takes_plain = takes_any and used is ALL_ATTENTION_FUNCTIONS

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = next((v for v in (*kwargs.values(), *args) if isinstance(v, MaskedCache)), None)
        if cache is None or self._module is None or self._module() is not module or not cache.hooks.owns(module):
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

    def __reduce__(self) -> Any:
        return _Hook, (None,)


def _shared(alive: MutableMapping[_Key, weakref.ref[_Value]], key: _Key, make: Callable[[_Key], _Value]) -> _Value:
    """The living value of ``key``, made now if nobody holds one."""
    known = alive.get(key)
    value = known() if known is not None else None
    if value is None:
        value = make(key)
        alive[key] = weakref.ref(value)
    return value


def device_of(module: nn.Module) -> torch.device:
    """The device that a module with weights computes on; with accelerate's offloading its weights may be elsewhere."""
    # accelerate keeps where a module computes in its hook, and its offloaded weights on the device "meta".
    execution = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    weight = next(module.parameters())
    if execution is None or weight.device.type != "meta":
        return weight.device
    return torch.device(execution)


def is_attention(module: nn.Module) -> bool:
    """Whether ``module`` is the attention of a layer with an index, and takes a mask."""
    if not isinstance(getattr(module, "layer_idx", None), int) or "Attention" not in type(module).__name__:
        return False
    return "attention_mask" in inspect.signature(type(module).forward).parameters

"""An accelerator that isn't there: tensors that say they are on ``cuda:1``, computed on the CPU, and a queue of work.

Whatever is asked of such a tensor is put in the queue, and ``torch.cuda.synchronize`` of that very device empties it:
a clock that is read while the queue holds something times the queue and not the work. It stands before torch's own
dispatch, so that no driver is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

DEVICE = torch.device("cuda:1")
CPU = torch.device("cpu")


class AcceleratorTensor(Tensor):
    """A tensor on the accelerator; ``held`` is its data."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> AcceleratorTensor:
        made = torch.Tensor._make_subclass(cls, held)
        made.held = held
        return made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} was asked of the accelerator while it was not there")


class FakeAccelerator(TorchFunctionMode):
    """Does the work of ``AcceleratorTensor``s while it is entered.

    ``queued`` counts what was asked since the last synchronise. ``faults`` gives functions that compute wrong on this
    device: from the true function to one that is called in its place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queued = 0
        self.faults: dict[Any, Callable[..., Any]] = {}

    def synchronize(self, device: torch.device) -> None:
        """Stand in for ``torch.cuda.synchronize``; another device's queue is not this one's."""
        if device == DEVICE:
            self.queued = 0

    def place(self, value: Tensor) -> Tensor:
        """``value`` on the accelerator."""
        return AcceleratorTensor(value)

    def place_model(self, model: PreTrainedModel) -> PreTrainedModel:
        """A copy of ``model`` on the accelerator."""
        placed = copy.deepcopy(model)
        for module in placed.modules():
            for store in (module._parameters, module._buffers):
                store.update({name: self.place(t.detach()) for name, t in store.items() if t is not None})
        return placed

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        here: dict[int, AcceleratorTensor] = {}
        targets: list[torch.device] = []

        def held(value: Any) -> Any:
            if isinstance(value, AcceleratorTensor):
                here[id(value.held)] = value
                return value.held
            if isinstance(value, torch.device) or (isinstance(value, str) and value in ("cpu", str(DEVICE))):
                targets.append(torch.device(value))
                return CPU
            return value

        plain_args, plain_kwargs = tree_map(held, args), tree_map(held, kwargs)
        if function == Tensor.device.__get__ and here:
            return DEVICE
        if not here and DEVICE not in targets:
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        found = self.faults.get(function, function)(*plain_args, **plain_kwargs)
        if name != "__get__":
            self.queued += 1
        if name == "cpu" or CPU in targets:
            return found

        def placed(value: Any) -> Any:
            if id(value) in here:
                return here[id(value)]
            return self.place(value) if isinstance(value, Tensor) else value

        return tree_map(placed, found)


class TwoDevices(FakeAccelerator):
    """Refuses to compute with tensors of both devices at once, as torch does."""

    PEAK = 4_096

    def __init__(self) -> None:
        super().__init__()
        self.reset = False

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        """Stand in for the function of ``torch.cuda``."""
        assert device == DEVICE
        self.reset = True

    def max_memory_allocated(self, device: torch.device) -> int:
        """Stand in for the function of ``torch.cuda``."""
        assert device == DEVICE
        assert self.queued == 0
        return self.PEAK

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        # A number on the CPU may meet any device.
        here = {isinstance(t, AcceleratorTensor) for t in tensors if isinstance(t, AcceleratorTensor) or t.dim()}
        name = getattr(function, "__name__", "")
        assert len(here) < 2 or name in ("copy_", "to", "__getitem__", "__setitem__", "__get__", "__set__"), name
        return super().__torch_function__(function, types, args, kwargs)

    def split(self, model: nn.Module) -> Any:
        """A copy of ``model`` whose layers from the second on are here; inputs are moved as accelerate moves them."""
        split: Any = copy.deepcopy(model)
        first, *others = split.model.layers
        for layer in others:
            for module in layer.modules():
                for store in (module._parameters, module._buffers):
                    store.update({name: self.place(t.detach()) for name, t in store.items() if t is not None})
        for module in (first, *others, split.model.norm):
            is_here = module in others

            def move(_: nn.Module, args: Any, kwargs: Any, is_here: bool = is_here) -> Any:
                def moved(value: Any) -> Any:
                    if isinstance(value, Tensor) and isinstance(value, AcceleratorTensor) != is_here:
                        return self.place(value) if is_here else value.cpu()
                    return value

                return tree_map(moved, args), {name: tree_map(moved, value) for name, value in kwargs.items()}

            module.register_forward_pre_hook(move, with_kwargs=True)
        return split

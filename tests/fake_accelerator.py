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
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
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

"""Forward passes that begin at a decoder layer, with what the layers below it gave in an earlier pass.

A pass through a cache that differs from another only from layer l on gives the same below l. Replaying
that saves the search for a plan half of its time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from knormpress.masks import is_attention

__all__ = ["Outputs", "Replay", "decoder_layers", "replayed"]

Outputs = dict[int, Any]
"""What each decoder layer gave, by its number."""


class Replay:
    """Made by ``replayed``; while that lasts, ``record`` and ``above`` steer the model's passes."""

    def __init__(self) -> None:
        self._outputs: Outputs | None = None
        self._from: int | None = None

    @contextmanager
    def record(self) -> Iterator[Outputs]:
        """Passes in this context leave the outputs of their layers in what it yields."""
        self._outputs, self._from = {}, None
        try:
            yield self._outputs
        finally:
            self._outputs = None

    @contextmanager
    def above(self, outputs: Outputs, layer: int) -> Iterator[None]:
        """Layers below ``layer`` are not computed in this context but give what ``outputs`` has of them."""
        self._outputs, self._from = outputs, layer
        try:
            yield
        finally:
            self._outputs = None

    def wrap(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward function of layer ``index``, steered."""

        def steered(*args: Any, **kwargs: Any) -> Any:
            outputs, begin = self._outputs, self._from
            if outputs is not None and begin is not None and index < begin:
                return outputs[index]
            output = forward(*args, **kwargs)
            if outputs is not None and begin is None:
                outputs[index] = output
            return output

        return steered


@contextmanager
def replayed(model: PreTrainedModel) -> Iterator[Replay]:
    """Make the passes of ``model`` steerable as long as the context lasts.

    Where a model's layers are of an unknown form, nothing is ever replayed and every pass is computed whole.
    """
    replay = Replay()
    layers: dict[int, Any] = dict(decoder_layers(model))
    before = {index: vars(layer).get("forward") for index, layer in layers.items()}
    for index, layer in layers.items():
        layer.forward = replay.wrap(index, layer.forward)
    try:
        yield replay
    finally:
        for index, layer in layers.items():
            if before[index] is None:
                del layer.forward
            else:
                layer.forward = before[index]


def decoder_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The decoder layers by number: what stands numbered in a list of modules and holds that layer's attention."""
    found = {}
    for name, module in model.named_modules():
        place = re.match(r"(.*\.\d+)\.", name)
        if place and is_attention(module):
            found[module.layer_idx] = model.get_submodule(place[1])
    return found if sorted(found) == list(range(len(found))) else {}

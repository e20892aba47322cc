"""Forward passes that start at a decoder layer, with the outputs of lower layers from an earlier pass.

If two caches differ only from layer l on, the outputs below l are the same in both passes. Using them again halves the
time of the search for a plan.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from knormpress.cache.hooks import is_attention

__all__ = ["Outputs", "Replay", "decoder_layers", "replayed"]

Outputs = dict[int, Any]
"""The output of each decoder layer, by its index."""


class Replay:
    """Made by ``replayed``. Inside that context, ``record`` and ``above`` control the model's passes."""

    def __init__(self) -> None:
        self._outputs: Outputs | None = None
        self._from: int | None = None

    @contextmanager
    def record(self) -> Iterator[Outputs]:
        """Yield a dict that gets the layers' outputs of the passes in this context."""
        self._outputs, self._from = {}, None
        try:
            yield self._outputs
        finally:
            self._outputs = None

    @contextmanager
    def above(self, outputs: Outputs, layer: int) -> Iterator[None]:
        """In this context, layers below ``layer`` are not computed: they return their values in ``outputs``."""
        self._outputs, self._from = outputs, layer
        try:
            yield
        finally:
            self._outputs = None

    def wrap(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the forward function of layer ``index``."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            outputs, start = self._outputs, self._from
            if outputs is not None and start is not None and index < start:
                return outputs[index]
            output = forward(*args, **kwargs)
            if outputs is not None and start is None:
                outputs[index] = output
            return output

        return wrapped


@contextmanager
def replayed(model: PreTrainedModel) -> Iterator[Replay]:
    """Wrap the layers of ``model`` inside the context, so that ``Replay`` controls its passes.

    If ``decoder_layers`` can't identify the layers, every pass is computed in full.
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
    """The decoder layers by index: modules in a numbered list that contain the attention of that index."""
    layers: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        numbered = re.match(r"(.*\.\d+)\.", name)
        if numbered and is_attention(module):
            layers[module.layer_idx] = model.get_submodule(numbered[1])
    return layers if sorted(layers) == list(range(len(layers))) else {}

"""Which models can be pruned, and the layers that transformers' own cache would have for them."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from knormpress.errors import KnormError

__all__ = ["layers_for"]


def layers_for(model: PreTrainedModel) -> list[Any]:
    """The layers of an empty ``DynamicCache`` for ``model``; those that are a ``DynamicLayer`` can be pruned.

    Raises:
        KnormError: the model has no layer to prune, is an encoder-decoder, shares keys between layers, or biases
            attention by key position.
    """
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise KnormError(f"{type(model).__name__} is an encoder-decoder; KnormPress prunes decoder-only models")
    # transformers 5.19 has no kv_sharing_modes yet.
    if getattr(config, "kv_sharing_modes", None) is not None or getattr(config, "num_kv_shared_layers", None):
        raise KnormError(f"{type(model).__name__} shares keys between layers, which KnormPress can't prune")
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        raise KnormError(
            f"{type(model).__name__} adds a bias by key position (ALiBi), which KnormPress can't prune; "
            "use a model with rotary or learned positions"
        )
    layers = DynamicCache(config=config).layers
    if not any(type(layer) is DynamicLayer for layer in layers):
        raise KnormError(
            f"{type(model).__name__} has no full-attention layer, so there is nothing to prune; "
            "use a model with some full-attention layers"
        )
    return layers

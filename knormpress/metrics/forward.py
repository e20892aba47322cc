"""What every measurement begins with: a method, and the prompt's way into its cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeAlias

from torch import Tensor
from transformers import Cache, PreTrainedModel

from knormpress.errors import KnormError

__all__ = ["Method", "prefill"]

Method: TypeAlias = Callable[[PreTrainedModel], AbstractContextManager[Callable[[], Cache]]]


def prefill(model: PreTrainedModel, prompt: Tensor, cache: Cache, *, chunk: int | None = None) -> Tensor:
    """Send ``prompt`` through ``model`` into ``cache``, whole or in chunks.

    Args:
        model: any causal language model of transformers.
        prompt: (B, n) token ids on the model's device, n >= 1.
        cache: takes the prompt behind whatever it holds already.
        chunk: tokens a forward pass takes at most; None sends the prompt whole.

    Returns:
        (B, V) logits after the last token of the prompt.

    Raises:
        KnormError: ``chunk`` is below 1.
    """
    if chunk is not None and chunk < 1:
        raise KnormError(f"prefill_chunk is {chunk}; wanted at least 1 token a chunk, or none to send the prompt whole")
    for part in prompt.split(chunk or prompt.shape[-1], dim=-1):
        logits: Tensor = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1]

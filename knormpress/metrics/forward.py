"""What every measurement begins with: a method, and the prompt's way into its cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from knormpress.errors import KnormError

__all__ = ["Method", "filled_cache", "prefill"]

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


@contextmanager
def filled_cache(
    model: PreTrainedModel, method: Method, prompt: Tensor, full: Cache, *, chunk: int | None = None
) -> Iterator[Cache]:
    """A cache of ``method`` that holds ``prompt``, in the method's context.

    Taken from ``full``, which holds the same prompt, where the method's cache can and the result is that of a prefill
    of its own; else the prompt is sent through the model.

    Args:
        model, prompt, chunk: as for ``prefill``.
        method: makes the cache.
        full: a full cache that ends with the prompt; it is not changed.
    """
    whole = chunk is None and all(type(layer) is DynamicLayer for layer in full.layers)
    with method(model) as new_cache:
        cache = new_cache()
        prefill_from = getattr(cache, "prefill_from", None)
        if whole and prefill_from is not None:
            prefill_from(full)
        else:
            prefill(model, prompt, cache, chunk=chunk)
        yield cache

"""The oracle: pruning must equal masking.

``run_pruned`` feeds tokens through a pruned cache pass by pass and notes what each layer stored before each pass.
``run_masked`` computes the same logits in one forward pass without any cache, each layer getting an additive mask that
hides from every token what its layer had dropped by then. It shares no code with the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from knormpress.cache.cache import KnormCache
from knormpress.cache.layer import KnormLayer
from tests.strategies import kv_heads


@dataclass
class Trace:
    """Logits (B, T, V) and, per pruned layer, which token each token could attend to: (B, kv_heads, T, T)."""

    logits: Tensor
    visible: dict[int, Tensor]


def position_ids(attention_mask: Tensor) -> Tensor:
    """The positions that ``generate`` gives the tokens of a padded batch."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def run_pruned(
    model: PreTrainedModel, cache: KnormCache, ids: Tensor, sizes: Sequence[int], padding: Tensor | None = None
) -> Trace:
    """Feed ``ids`` (B, T) through ``cache`` in passes of ``sizes`` tokens; ``padding`` (B, T) is 0 for padding."""
    batch, total = ids.shape
    visible: dict[int, Tensor] = {}
    logits = []
    start = 0
    for size in sizes:
        end = start + size
        for index, layer in enumerate(cache.layers):
            if not isinstance(layer, KnormLayer):
                continue
            heads = kv_heads(model)
            table = visible.setdefault(index, torch.zeros(batch, heads, total, total, dtype=torch.bool))
            if start:
                for b in range(batch):
                    for h in range(heads):
                        kept = layer.positions[b, h].long()
                        table[b, h, start:end, kept[kept >= 0]] = True
            table[:, :, start:end, start:end] = torch.ones(size, size, dtype=torch.bool).tril()
        kwargs = {}
        if padding is not None:
            kwargs = {"attention_mask": padding[:, :end], "position_ids": position_ids(padding)[:, start:end]}
        with torch.no_grad():
            logits.append(model(ids[:, start:end], past_key_values=cache, **kwargs).logits)
        start = end
    return Trace(torch.cat(logits, dim=1), visible)


def run_masked(
    model: PreTrainedModel, ids: Tensor, visible: dict[int, Tensor], padding: Tensor | None = None
) -> Tensor:
    """The logits (B, T, V) of one forward pass without a cache in which each layer sees what ``visible`` says."""
    handles = []
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if index not in visible or "Attention" not in type(module).__name__:
            continue
        table = visible[index]
        heads = module.config.num_attention_heads
        allowed = table.repeat_interleave(heads // table.shape[1], dim=1)
        if padding is not None:
            allowed = allowed & padding[:, None, None].bool()
        hidden = torch.finfo(model.dtype).min
        additive = torch.zeros(allowed.shape, dtype=model.dtype).masked_fill(~allowed, hidden)

        def give_mask(module, args, kwargs, additive=additive):  # type: ignore[no-untyped-def]
            return args, {**kwargs, "attention_mask": additive}

        handles.append(module.register_forward_pre_hook(give_mask, with_kwargs=True))
    kwargs = {} if padding is None else {"attention_mask": padding, "position_ids": position_ids(padding)}
    try:
        with torch.no_grad():
            return model(ids, use_cache=False, **kwargs).logits
    finally:
        for handle in handles:
            handle.remove()


def assert_equal_to_masking(
    model: PreTrainedModel,
    cache: KnormCache,
    ids: Tensor,
    sizes: Sequence[int],
    padding: Tensor | None = None,
    tolerance: float = 1e-9,
) -> Trace:
    """Run both and compare the logits of all tokens that are no padding."""
    trace = run_pruned(model, cache, ids, sizes, padding)
    expected = run_masked(model, ids, trace.visible, padding)
    real = torch.ones_like(ids, dtype=torch.bool) if padding is None else padding.bool()
    worst = (trace.logits - expected)[real].abs().max()
    assert worst <= tolerance, f"logits differ by {worst:.3g}; passes of {list(sizes)} tokens, {cache.press}"
    return trace


def greedy(model: PreTrainedModel, ids: Tensor, cache: Cache, new: int) -> Tensor:
    """Decode greedily by hand, in a loop without ``generate``: the new tokens (B, new)."""
    tokens = []
    with torch.no_grad():
        for _ in range(new):
            ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            tokens.append(ids)
    return torch.cat(tokens, dim=1)

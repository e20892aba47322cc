"""Choose which stored tokens to keep: pure functions on tensors and counts, without state.

Shapes: B rows of a batch, H key-value heads, n stored slots, D head size. Slots are in position order. A slot may be
empty or hold padding; such slots are never kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from knormpress.policy.policy import Policy, share

__all__ = ["budget", "gather", "select"]


def budget(press: Policy, ratio: float, *, seen: int, stored: int, new: int) -> int:
    """How many tokens one row of a layer keeps after a forward pass.

    Args:
        press: the policy.
        ratio: the layer's keep ratio, used in place of ``press.keep_ratio``.
        seen: tokens of the row that have passed through the layer, with the new ones.
        stored: tokens of the row that the layer holds now, with the new ones.
        new: tokens that the pass added to the row.

    Returns:
        At most ``stored``; exactly ``stored`` if nothing is dropped yet.
    """
    if ratio == 1.0 or new == 0:
        return stored
    if press.schedule == "iterative":
        if stored < press.prune_after:
            return stored
        wanted = share(ratio, stored)
    else:
        if seen < press.prune_after:
            return stored
        wanted = share(ratio, seen)
        decoding = new == 1 and seen > press.prune_after
        if decoding and stored - wanted < press.prune_interval:
            return stored
    return min(stored, max(wanted, press.keep_recent))


def select(scores: Tensor, budgets: Sequence[int], *, real: Tensor | None = None, keep_recent: int = 0) -> Tensor:
    """The slots to keep: in each row and head the ``budgets[row]`` lowest scores, ties going to the older token.

    Args:
        scores: (B, H, n), finite.
        budgets: one number per row, at most the number of real tokens in that row.
        real: (B, H or 1, n), False where a slot is empty or holds padding; None if all slots are real.
        keep_recent: number of newest real tokens of each row to keep, whatever their score.

    Returns:
        (B, H, max(budgets)) int64: slot numbers, ascending; rows with a smaller budget begin with -1.
    """
    n = scores.shape[-1]
    slots = torch.arange(n, device=scores.device)
    if keep_recent:
        newer = n - 1 - slots if real is None else real.flip(-1).cumsum(-1).flip(-1) - 1
        scores = scores.masked_fill(newer < keep_recent, -torch.inf)
    if real is not None:
        scores = scores.masked_fill(~real, torch.inf)
    last = torch.stack([_smallest(row, max(count, 1)) for row, count in zip(scores, budgets, strict=True)])
    below, ties = scores < last, scores == last
    limits = torch.tensor(budgets, device=scores.device).view(-1, 1, 1)
    kept = below | ties & (ties.cumsum(-1) <= limits - below.sum(dim=-1, keepdim=True))
    heads, most = kept.shape[1], max(budgets)
    # One call for all rows, since each call waits for the device.
    rows = kept.nonzero()[:, 2].split([heads * count for count in budgets])
    return torch.stack(
        [pad(row.view(heads, count), (most - count, 0), value=-1) for row, count in zip(rows, budgets, strict=True)]
    )


def _smallest(scores: Tensor, count: int) -> Tensor:
    """The ``count``-th lowest score of each head: (H, n) to (H, 1)."""
    if scores.device.type == "cpu" and scores.is_floating_point():
        # Twice as fast as kthvalue and topk, ten times as fast as a sort. numpy has no bfloat16, so it is converted.
        exact = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
        return torch.from_numpy(np.partition(exact.numpy(), count - 1)[:, count - 1 : count])
    return scores.sort(dim=-1).values[:, count - 1 : count]


def gather(states: Tensor, slots: Tensor) -> Tensor:
    """Copy the states at ``slots`` into new storage; a view would not free memory.

    Args:
        states: (B, H, n, ...).
        slots: (B, H, m) from ``select``; the content of an empty slot (-1) is arbitrary and must be masked.

    Returns:
        (B, H, m, ...), contiguous.
    """
    inner = states.shape[3:]
    size = math.prod(inner)
    # Index the storage as flat rows: three times faster than by row, head and slot.
    if any(step % size for step in states.stride()[:3]) or not states[0, 0, 0].is_contiguous():
        states = states.contiguous()
    steps = [step // size for step in states.stride()[:3]]
    extent = 1 + sum(step * (count - 1) for step, count in zip(steps, states.shape[:3], strict=True))
    rows = torch.arange(states.shape[0], device=states.device).view(-1, 1, 1) * steps[0]
    heads = torch.arange(states.shape[1], device=states.device).view(1, -1, 1) * steps[1]
    index = torch.add(rows + heads, slots.clamp(min=0), alpha=steps[2])
    storage = states.as_strided((extent, *inner), (size, *states.stride()[3:]))
    gathered: Tensor = storage.index_select(0, index.flatten()).unflatten(0, slots.shape)
    return gathered

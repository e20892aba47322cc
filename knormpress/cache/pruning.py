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

from knormpress.cache.log import is_at_hand
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
    if keep_recent:
        counted = torch.ones_like(scores, dtype=torch.bool) if real is None else real
        newer = counted.flip(-1).cumsum(-1).flip(-1) - 1
        scores = scores.masked_fill(newer < keep_recent, -torch.inf)
    if real is not None:
        scores = scores.masked_fill(~real, torch.inf)
    if is_at_hand(scores) and scores.is_floating_point():
        return _select_by_numpy(scores, budgets)
    return _select_without_waiting(scores, budgets)


def _select_by_numpy(scores: Tensor, budgets: Sequence[int]) -> Tensor:
    """``select`` on a CPU: the threshold takes half of what kthvalue and topk take, and a tenth of a sort."""
    exact = np.empty(scores.shape, np.float64 if scores.dtype == torch.float64 else np.float32)
    torch.from_numpy(exact).copy_(scores)
    slots = np.full((*exact.shape[:2], max(budgets)), _unfilled(budgets), np.int64)
    for row, row_slots, count in zip(exact, slots, budgets, strict=True):
        place = max(count, 1) - 1
        for head, found in zip(row, row_slots, strict=True):
            last = np.partition(head, place)[place]
            lowest = np.flatnonzero(head <= last)
            if len(lowest) > count:
                ties = np.flatnonzero(head[lowest] == last)
                lowest = np.delete(lowest, ties[count - len(lowest) :])
            found[len(found) - len(lowest) :] = lowest
    return torch.from_numpy(slots)


def _select_without_waiting(scores: Tensor, budgets: Sequence[int]) -> Tensor:
    """``select`` on any device, where the host must not wait for a number."""
    slots = torch.arange(scores.shape[-1], device=scores.device)
    most, limits = max(budgets), _per_row(budgets, scores.device)
    ranked, rank = scores.sort(dim=-1).values, _per_row([max(count, 1) - 1 for count in budgets], scores.device)
    if isinstance(rank, int):
        last = ranked[..., rank : rank + 1]
    else:
        last = ranked.gather(-1, rank.expand(-1, scores.shape[1], -1))
    below, ties = scores < last, scores == last
    kept = below | ties & (ties.cumsum(-1) <= limits - below.sum(dim=-1, keepdim=True))
    # Each kept slot writes its number to the place of its rank; the others, to a place that is cut off. Unlike with
    # nonzero, the shape is known, and nothing is waited for.
    ranks = kept.cumsum(-1)
    ranks = (ranks if isinstance(limits, int) else ranks + (most - limits)) * kept
    places = slots.new_full((*scores.shape[:2], 1 + most), _unfilled(budgets))
    return places.scatter_(-1, ranks, slots.expand_as(ranks))[..., 1:]


def _unfilled(budgets: Sequence[int]) -> int:
    """What stands where no slot was chosen.

    With equal budgets that is where a score is NaN, and must still be a slot, until somebody asks.
    """
    return 0 if min(budgets) == max(budgets) else -1


def _per_row(budgets: Sequence[int], device: torch.device) -> Tensor | int:
    """The budgets as they are compared with (B, H, n): one number if they are equal."""
    if min(budgets) == max(budgets):
        return budgets[0]
    return torch.tensor(budgets).view(-1, 1, 1).to(device, non_blocking=True)


def gather(states: Tensor, slots: Tensor, rows: dict[tuple[int, ...], Tensor] | None = None) -> Tensor:
    """Copy the states at ``slots`` into new storage; a view would not free memory.

    Args:
        states: (B, H, n) or (B, H, n, D).
        slots: (B, H, m), at least 0.
        rows: filled by the first of several calls with the same slots, used by those with states of the same layout.

    Returns:
        (B, H, m) or (B, H, m, D), contiguous.
    """
    inner = states.shape[3:]
    size = math.prod(inner)
    # Index the storage as flat rows: three times faster than by row, head and slot.
    if any(step % size for step in states.stride()[:3]) or states.stride()[3:] not in ((), (1,)):
        states = states.contiguous()
    steps = tuple(step // size for step in states.stride()[:3])
    extent = 1 + sum(step * (count - 1) for step, count in zip(steps, states.shape[:3], strict=True))
    rows = {} if rows is None else rows
    if steps not in rows:
        batch, heads = (range(count) for count in states.shape[:2])
        first = torch.tensor([[[row * steps[0] + head * steps[1]] for head in heads] for row in batch])
        rows[steps] = torch.add(first.to(states.device, non_blocking=True), slots, alpha=steps[2]).flatten()
    storage = states.as_strided((extent, *inner), (size, *states.stride()[3:]))
    return storage.index_select(0, rows[steps]).view(*slots.shape, *inner)

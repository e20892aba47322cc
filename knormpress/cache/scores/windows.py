"""Sums over windows of neighbouring tokens, for scores that compare a token with those around it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["window_sums"]


def window_sums(amounts: Tensor, real: Tensor, size: int) -> Tensor:
    """For each slot the sum of ``amounts`` over its window: ``size`` real tokens of its row, counted from the first.

    The tokens left at the end belong to the window before them. A row's sums are those that it has alone, and they are
    added in the same order on every device.

    Args:
        amounts: (B, H, n, D).
        real: (B, H, n), False for padding and empty slots; these are in no sum, and what they get has no meaning.
        size: tokens of a window.
    """
    n, most = amounts.shape[2], amounts.shape[2] // size + 1
    order = (real.cumsum(dim=-1) - 1).clamp(min=0)
    # What is not real goes to one place behind all windows.
    place = order.masked_fill(~real, most * size)[..., None].expand_as(amounts)
    laid = amounts.new_zeros(*amounts.shape[:2], most * size + 1, amounts.shape[3]).scatter(2, place, amounts)
    parts = laid[:, :, :-1].unflatten(2, (most, size)).sum(dim=3)
    last = (real.sum(dim=-1, keepdim=True).div(size, rounding_mode="floor") - 1).clamp(min=0)
    left = torch.cat([parts[:, :, 1:], torch.zeros_like(parts[:, :, :1])], dim=2)
    at_last = torch.arange(most, device=real.device) == last
    sums = parts + left.masked_fill(~at_last[..., None], 0)
    window = order.div(size, rounding_mode="floor").minimum(last)
    own: Tensor = sums.gather(2, window[..., None].expand(-1, -1, n, amounts.shape[3]))
    return own

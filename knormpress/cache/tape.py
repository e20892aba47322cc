"""A tensor that grows along its third dimension without copying its contents."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Tape"]


class Tape:
    """A tensor (B, H, length, ...) to which single slots are appended in place.

    ``torch.cat`` would copy the whole cache for every decoded token. When single slots are appended, a tape reserves
    spare room: 64 slots, or 1/64 of its length if that is more, within what the caller allows. Until then it has none.
    """

    def __init__(self) -> None:
        self._store: Tensor | None = None
        self._is_ours = False
        self.length = 0

    @property
    def view(self) -> Tensor:
        """The slots in use: (B, H, length, ...), a view of the storage."""
        assert self._store is not None
        return self._store.narrow(2, 0, self.length)

    @property
    def nbytes(self) -> int:
        """Bytes of storage, including spare room."""
        return 0 if self._store is None else self._store.untyped_storage().nbytes()

    def replace(self, states: Tensor) -> Tensor:
        """Replace the contents with ``states``, copied only if they are part of a larger storage. Returns the view.

        If not copied, the storage may be shared with the caller, and is never written to.
        """
        if states.untyped_storage().nbytes() > states.numel() * states.element_size():
            states = states.contiguous() if not states.is_contiguous() else states.clone()
        self._store, self.length, self._is_ours = states, states.shape[2], False
        return self.view

    def append(self, states: Tensor, most_spare: float = math.inf) -> Tensor:
        """Add the slots of ``states`` (B, H, new, ...) at the end. Returns the view of all slots.

        Args:
            states: the new slots.
            most_spare: reserve no more spare room than this many slots.
        """
        if self._store is None:
            return self.replace(states)
        length, new = self.length, states.shape[2]
        # Writing in place would change values that a backward pass still needs.
        if new > 1 or torch.is_grad_enabled():
            return self.replace(torch.cat([self.view, states], dim=2))
        if length + new > self._store.shape[2] or not self._is_ours or self._is_read_only():
            self._grow(length + new + int(min(max(64, length // 64), most_spare)))
        self.length = length + new
        self._store.narrow(2, length, new).copy_(states)
        return self.view

    def truncate(self, length: int) -> Tensor:
        """Remove the slots from ``length`` on; their room becomes spare room. Returns the view."""
        self.length = length
        return self.view

    def select_rows(self, rows: Tensor) -> Tensor:
        """Replace row i by the old row ``rows[i]``. Returns the view."""
        assert self._store is not None
        self._store, self._is_ours = self._store.index_select(0, rows.to(self._store.device)), True
        return self.view

    def to(self, device: torch.device | str) -> Tensor:
        """Move the storage to ``device``. Returns the view."""
        assert self._store is not None
        self._store = self._store.to(device, non_blocking=True)
        return self.view

    def _grow(self, capacity: int) -> None:
        view = self.view
        # Storage made in inference mode can't be written to outside of it.
        with torch.inference_mode(False):
            self._store = torch.empty(
                (*view.shape[:2], capacity, *view.shape[3:]), dtype=view.dtype, device=view.device
            )
        self.view.copy_(view)
        self._is_ours = True

    def _is_read_only(self) -> bool:
        return self._store is not None and self._store.is_inference() and not torch.is_inference_mode_enabled()

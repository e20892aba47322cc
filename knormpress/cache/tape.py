"""A tensor that grows along its third dimension without copying its contents."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["Tape", "spare_room"]


class Tape:
    """A tensor (B, H, length, ...) to which single slots are appended in place.

    ``torch.cat`` would copy the whole cache for every decoded token. When single slots are appended, a tape reserves
    spare room: 64 slots, or 1/64 of its length if that is more, within what the caller allows. Until then it has none,
    unless its contents came with room (``hold``).
    """

    def __init__(self) -> None:
        self._store: Tensor | None = None
        self._is_ours = False
        self.length = 0
        # Views of the spare slots, the last first, once they are needed.
        self._slots: list[Tensor] = []

    @property
    def view(self) -> Tensor:
        """The slots in use: (B, H, length, ...), a view of the storage."""
        assert self._store is not None
        return self._store if self._store.shape[2] == self.length else self._store.narrow(2, 0, self.length)

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
        return self._adopt(states, states.shape[2], is_ours=False)

    def hold(self, store: Tensor, length: int) -> Tensor:
        """Replace the contents with the first ``length`` slots of ``store``, which must be nobody else's.

        The other slots are spare room. Returns the view.
        """
        self._adopt(store, length, is_ours=store.shape[2] > length)
        return self._divide() if self._is_ours else store

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
        if not self._is_ours or length == self._store.shape[2] or self._is_read_only():
            room = spare_room(length, most_spare)
            return self._grow(states, room) if room else self.replace(torch.cat([self.view, states], dim=2))
        if not self._slots:
            self._divide()
        self._slots.pop().copy_(states)
        self.length = length + new
        return self.view

    def truncate(self, length: int) -> Tensor:
        """Remove the slots from ``length`` on; their room becomes spare room. Returns the view."""
        self.length = length
        self._slots = []
        return self.view

    def select_rows(self, rows: Tensor) -> Tensor:
        """Replace row i by the old row ``rows[i]``. Returns the view."""
        assert self._store is not None
        return self._adopt(self._store.index_select(0, rows.to(self._store.device)), self.length, is_ours=True)

    def to(self, device: torch.device | str) -> Tensor:
        """Move the storage to ``device``. Returns the view."""
        assert self._store is not None
        return self._adopt(self._store.to(device, non_blocking=True), self.length, is_ours=self._is_ours)

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes views of its own.
        return {**vars(self), "_slots": []}

    def _adopt(self, store: Tensor, length: int, *, is_ours: bool) -> Tensor:
        self._store, self.length, self._is_ours, self._slots = store, length, is_ours, []
        return self.view

    def _grow(self, states: Tensor, room: int) -> Tensor:
        # Storage made in inference mode can't be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            spare = states.expand(*states.shape[:2], room, *states.shape[3:])
            self._store = torch.cat([self.view, states, spare], dim=2)
        self.length, self._is_ours = self.length + 1, True
        return self._divide()

    def _divide(self) -> Tensor:
        """Make the views of the spare slots, all at once: a view for each token would take as long as a small copy."""
        assert self._store is not None
        spare = self._store.shape[2] - self.length
        view: Tensor
        view, *slots = self._store.split([self.length, *[1] * spare], dim=2)
        self._slots = slots[::-1]
        return view

    def _is_read_only(self) -> bool:
        return self._store is not None and self._store.is_inference() and not torch.is_inference_mode_enabled()


def spare_room(length: int, most: float) -> int:
    """How much room to reserve behind ``length`` slots, at most ``most``; none where nothing may be written to it."""
    room = 0 if torch.is_grad_enabled() else int(min(max(64, length // 64), most))
    # With one slot, every second token would still be copied for.
    return room if room > 1 else 0

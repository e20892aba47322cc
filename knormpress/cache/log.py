"""What all layers of a cache know of the tokens they have seen, and when the host waits to learn it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from knormpress.errors import KnormError

__all__ = ["TokenLog", "is_at_hand"]


def is_at_hand(tensor: Tensor) -> bool:
    """Whether the host can read ``tensor`` without waiting for a device."""
    return tensor.device.type == "cpu"


class TokenLog:
    """How many tokens a model has seen, and which are padding; shared by all layers of a cache.

    Which are padding is known on the device alone until somebody counts: on a GPU each reading is a stall. So is the
    question whether scores are finite, which is asked for all layers at once.

    While ``one_by_one`` is true, layers prune after a pass of several tokens as after the last of as many passes of
    one token, see ``KnormCache.as_single_tokens``.
    """

    def __init__(self) -> None:
        self.seen = 0
        self.real: Tensor | None = None
        self.one_by_one = False
        self._unchecked: list[tuple[Tensor, str]] = []
        # Each beside the ``real`` that it was taken from.
        self._on_host: tuple[Tensor, np.ndarray] | None = None
        self._places: tuple[Tensor, Tensor] | None = None

    def extend(self, batch: int, new: int, real: Tensor | None) -> None:
        """Add ``new`` tokens to each row. ``real`` (batch or 1, new) is False for padding; None if there is none."""
        if real is not None and self.real is None:
            self.real = real.new_ones(batch, self.seen)
        if self.real is not None:
            added = self.real.new_ones(batch, new) if real is None else real
            self.real = torch.cat([self.real, added if len(added) == batch else added.expand(batch, -1)], dim=1)
        self.seen += new

    def counts(self, batch: int, start: int, end: int) -> list[int]:
        """The number of tokens from position ``start`` to ``end`` that are not padding, for each row."""
        if self.real is None:
            return [end - start] * batch
        if self._on_host is None or self._on_host[0] is not self.real:
            self._read()
        assert self._on_host is not None
        counts: list[int] = self._on_host[1][:, start:end].sum(axis=1).tolist()
        return counts

    def places(self, device: torch.device) -> Tensor:
        """The place of each token among its row's own: (batch, 1 + seen) int32, and -1 for padding.

        Column 0 is an empty slot, -1 too; token i has column 1 + i.
        """
        assert self.real is not None
        if self._places is None or self._places[0] is not self.real:
            places = self.real.cumsum(-1, dtype=torch.int32) * self.real - 1
            self._places = self.real, pad(places, (1, 0), value=-1)
        return self._places[1].to(device)

    def expect(self, zero: Tensor, otherwise: str) -> None:
        """Have ``check`` raise KnormError(``otherwise``) unless ``zero``, a number without dimensions, is 0."""
        self._unchecked.append((zero, otherwise))

    def check(self) -> None:
        """Raise the first error that ``expect`` was told of.

        Raises:
            KnormError: a score was not finite.
        """
        if self._unchecked:
            self._read()

    def truncate(self, seen: int) -> None:
        """Remove the tokens from position ``seen`` on."""
        self.seen = seen
        self.real = self.real[:, :seen] if self.real is not None and seen else None
        if not seen:
            self._unchecked.clear()

    def select_rows(self, rows: Tensor) -> None:
        """Replace row i by the old row ``rows[i]``."""
        if self.real is not None:
            self.real = self.real.index_select(0, rows.to(self.real.device))

    def _read(self) -> None:
        """Learn, in one wait, all that stands on the device."""
        checks = self._unchecked
        parts = [] if self.real is None else [self.real.flatten()]
        if checks:
            device = checks[0][0].device
            parts.append(torch.stack([zero.to(device) for zero, _ in checks]) == 0)
        read = torch.cat([part.to(parts[0].device) for part in parts]).cpu().numpy()
        if self.real is not None:
            self._on_host = self.real, read[: self.real.numel()].reshape(self.real.shape)
        for finite, (_, otherwise) in zip(read[len(read) - len(checks) :], checks, strict=True):
            if not finite:
                raise KnormError(otherwise)
        # Not before: what was pruned by a wrong score stays refused until it is removed.
        self._unchecked = []

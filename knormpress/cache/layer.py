"""One layer of a ``KnormCache``: its storage and its pruning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from knormpress.cache.pruning import budget, gather, select
from knormpress.cache.score import Score, StoredTokens, scores_of
from knormpress.cache.tape import Tape
from knormpress.errors import KnormError
from knormpress.policy.policy import Policy

__all__ = ["KnormLayer", "LayerStats", "TokenLog", "layer_stats"]


# Of what a full cache holds; beyond it, spare room would cost the memory that pruning saves.
_MOST_SPARE = 0.02


@dataclass(frozen=True)
class LayerStats:
    """Counts of one layer: tokens seen, slots stored, tokens evicted (seen - stored), and bytes of storage."""

    seen: int
    stored: int
    evicted: int
    nbytes: int


class TokenLog:
    """How many tokens a model has seen, and which are padding; shared by all layers of a cache.

    While ``one_by_one`` is true, layers prune after a pass of several tokens as after the last of as many passes of
    one token, see ``KnormCache.as_single_tokens``.
    """

    def __init__(self) -> None:
        self.seen = 0
        self.real: Tensor | None = None
        self.one_by_one = False

    def extend(self, batch: int, new: int, real: Tensor | None) -> None:
        """Add ``new`` tokens to each row. ``real`` (batch, new) is False for padding; None if there is none."""
        if real is not None and self.real is None:
            self.real = real.new_ones(batch, self.seen)
        if self.real is not None:
            added = self.real.new_ones(batch, new) if real is None else real.expand(batch, -1)
            self.real = torch.cat([self.real, added], dim=1)
        self.seen += new

    def counts(self, batch: int, start: int, end: int) -> list[int]:
        """The number of tokens from position ``start`` to ``end`` that are not padding, for each row."""
        if self.real is None:
            return [end - start] * batch
        return [int(count) for count in self.real[:, start:end].sum(dim=1).tolist()]

    def truncate(self, seen: int) -> None:
        """Remove the tokens from position ``seen`` on."""
        self.seen = seen
        self.real = self.real[:, :seen] if self.real is not None and seen else None

    def select_rows(self, rows: Tensor) -> None:
        """Replace row i by the old row ``rows[i]``."""
        if self.real is not None:
            self.real = self.real.index_select(0, rows.to(self.real.device))


class KnormLayer(CacheLayerMixin):
    """One full-attention layer of a ``KnormCache``.

    Args:
        index: the layer's index in the model.
        press: the policy; ``ratio``, the layer's own, is used in place of its ratios.
        score: ranks the tokens; the lowest are kept.
        log: the tokens that the model has seen, shared by all layers of a cache.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, index: int, press: Policy, ratio: float, score: Score, log: TokenLog) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index, self.press, self.ratio, self.score, self.log = index, press, ratio, score, log
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Remove all tokens."""
        self._tapes = (Tape(), Tape())
        self._kept: Tensor | None = None
        self.keys = self.values = None
        self.is_initialized = False
        self.seen = 0
        self.pruned_at = 0
        self.holes = False
        self.record_past = False
        self._uncropped = False
        self._row_stored: list[int] = []
        self._row_new: list[int] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch size, device and dtype from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._row_stored = [0] * key_states.shape[0]
        self._row_new = [0] * key_states.shape[0]
        self.is_initialized = True

    @property
    def stored(self) -> int:
        """Slots held now, with empty ones: a batch has those if its rows have different budgets."""
        return self._tapes[0].length

    @property
    def positions(self) -> Tensor:
        """The original position of each stored token (batch, kv_heads, stored), ascending; -1 for an empty slot."""
        if self.keys is None:
            return torch.empty(0, 0, 0, dtype=torch.int32)
        newer = torch.arange(self.pruned_at, self.seen, dtype=torch.int32, device=self.device)
        newer = newer.expand(*self.keys.shape[:2], -1)
        return newer if self._kept is None else torch.cat([self._kept, newer], dim=2)

    @property
    def nbytes(self) -> int:
        """Bytes of storage, including positions and spare room."""
        kept = 0 if self._kept is None else self._kept.untyped_storage().nbytes()
        return kept + sum(tape.nbytes for tape in self._tapes)

    def get_seq_length(self) -> int:
        """Tokens seen, which is the position of the next token; transformers derives positions from it."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens that a shared mask must cover, offset of the first): every token seen, stored or not."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: the layer has no maximum."""
        return -1

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new tokens, then prune.

        Args:
            key_states, value_states: (batch, kv_heads, new, head_dim).

        Returns:
            The keys and values (batch, kv_heads, stored before + new, head_dim) that this pass attends to.

        Raises:
            KnormError: the batch size changed, or keys are not finite.
        """
        batch, _, new, _ = key_states.shape
        self.expect(batch)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        spare = self._most_spare(key_states, value_states)
        self.keys, self.values = (
            tape.append(states, spare) for tape, states in zip(self._tapes, (key_states, value_states), strict=True)
        )
        keys, values = self.keys, self.values
        if self.log.seen < self.seen + new:
            self.log.extend(batch, self.seen + new - self.log.seen, None)
        self._count(self.log.counts(batch, self.seen, self.seen + new))
        self.seen += new
        # Assisted decoding crops after every pass. When it ends, recording stays on, but no crop follows.
        if self.record_past and self._uncropped:
            self.record_past = False
        self._uncropped = self.record_past
        if not self.record_past:
            self._prune()
        return keys, values

    def expect(self, batch: int) -> None:
        """Check that the layer can take ``batch`` rows.

        Raises:
            KnormError: the layer holds a different number of rows.
        """
        if self.is_initialized and batch != len(self._row_stored):
            raise KnormError(
                f"layer {self.index} got a batch of {batch} rows, but its cache holds {len(self._row_stored)}; "
                "use a fresh cache, or batch_select_indices / batch_repeat_interleave first"
            )

    def until_pruning(self, most: int) -> int:
        """How many tokens the layer takes up to its next pruning, if they come one by one; at most ``most``.

        The last of them is the one after which it prunes. None of them may be padding.
        """
        rows = list(zip(self._row_seen(), self._row_stored, strict=True)) or [(0, 0)]
        for count in range(1, most):
            for seen, stored in rows:
                left = budget(self.press, self.ratio, seen=seen + count, stored=stored + count, new=1)
                if left < stored + count:
                    return count
        return most

    def activate_past_recording(self) -> None:
        """Delay pruning until ``crop``, so that the newest tokens can be removed (assisted decoding).

        Ends with the second pass in a row without a ``crop`` after it.
        """
        self.record_past, self._uncropped = True, False

    def expect_crop(self, removed: int) -> None:
        """Check that the newest ``removed`` tokens can be removed.

        Raises:
            KnormError: some of them came before the last pruning, which has ranked them already.
        """
        if self.seen - removed < self.pruned_at:
            raise KnormError(
                f"layer {self.index} can't remove the newest {removed} of {self.seen} tokens, as it was pruned after "
                f"{self.pruned_at}; "
                "call activate_past_recording() before the forward pass"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` tokens, then do the delayed pruning.

        Raises:
            KnormError: see ``expect_crop``.
        """
        removed = abs(tokens_to_remove)
        if not self.is_initialized:
            return
        self._uncropped = False
        if removed:
            self.expect_crop(removed)
            counts = self.log.counts(len(self._row_stored), self.seen - removed, self.seen)
            self._count([-count for count in counts])
            self.seen -= removed
            self.keys, self.values = (tape.truncate(tape.length - removed) for tape in self._tapes)
        if self.record_past:
            device = self._tapes[0].view.device
            self.prefetch()
            self._prune()
            self._move(device)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row i by the old row ``beam_idx[i]``."""
        if not self.is_initialized:
            return
        self.keys, self.values = (tape.select_rows(beam_idx) for tape in self._tapes)
        if self._kept is not None:
            self._kept = self._kept.index_select(0, beam_idx.to(self._kept.device))
        rows = beam_idx.tolist()
        self._row_stored = [self._row_stored[row] for row in rows]
        self._row_new = [self._row_new[row] for row in rows]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        self.reorder_cache(torch.arange(len(self._row_stored)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows ``indices``."""
        self.reorder_cache(torch.arange(len(self._row_stored))[indices.cpu()])

    def offload(self) -> None:
        """Move keys and values to the CPU, see ``transformers.Cache`` on offloading.

        Positions stay: the mask of a pass needs them before transformers waits for the layer to return.
        """
        self._move("cpu")

    def prefetch(self) -> None:
        """Move keys and values back to the device of the layer."""
        self._move(self.device)

    def stats(self) -> LayerStats:
        """The counts of this layer."""
        return LayerStats(self.seen, self.stored, self.seen - self.stored, self.nbytes)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-ready values, from which ``restore`` rebuilds this layer."""
        tensors = {}
        if self.keys is not None and self.values is not None:
            tensors = {"keys": self.keys, "values": self.values}
        if self._kept is not None:
            tensors["positions"] = self.positions
        names = ("seen", "pruned_at", "holes", "_row_stored", "_row_new")
        return tensors, {name: getattr(self, name) for name in names}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take over the layer that ``state`` returned."""
        if not tensors:
            return
        self.lazy_initialization(tensors["keys"], tensors["values"])
        self.keys, self.values = self._tapes[0].replace(tensors["keys"]), self._tapes[1].replace(tensors["values"])
        vars(self).update(state)
        if "positions" in tensors:
            self._kept = tensors["positions"][:, :, : self.stored - (self.seen - self.pruned_at)].clone()

    def _most_spare(self, keys: Tensor, values: Tensor) -> int:
        """How many slots of spare room keep this layer within 1.02 times what a full cache holds at this moment.

        A short cache may have none: it is copied for each token, which costs nothing at that length.
        """
        seen, stored = self.seen + keys.shape[2], self.stored + keys.shape[2]
        slot = keys.shape[-1] * keys.element_size() + values.shape[-1] * values.element_size()
        positions = 0 if self._kept is None else self._kept.shape[-1] * self._kept.element_size()
        room = (1 + _MOST_SPARE) * seen * slot - stored * slot - positions
        return max(0, min(int(room // slot), int(_MOST_SPARE * seen)))

    def _move(self, device: torch.device | str) -> None:
        if self.is_initialized:
            self.keys, self.values = (tape.to(device) for tape in self._tapes)

    def _count(self, new: Sequence[int]) -> None:
        self._row_stored = [stored + count for stored, count in zip(self._row_stored, new, strict=True)]
        # A crop can remove more tokens than are new since the last pruning decision.
        self._row_new = [max(0, before + count) for before, count in zip(self._row_new, new, strict=True)]

    def _row_seen(self) -> list[int]:
        return self.log.counts(len(self._row_stored), 0, self.seen)

    def _prune(self) -> None:
        new = [min(count, 1) for count in self._row_new] if self.log.one_by_one else self._row_new
        rows = zip(self._row_seen(), self._row_stored, new, strict=True)
        budgets = [budget(self.press, self.ratio, seen=s, stored=k, new=n) for s, k, n in rows]
        self._row_new = [0] * len(self._row_stored)
        if budgets == self._row_stored:
            return
        assert self.keys is not None
        assert self.values is not None
        positions = self.positions
        real = self._real(positions)
        tokens = StoredTokens(self.keys, self.values, self._own_positions(positions, real), self.index)
        scores = scores_of(self.score, tokens, real)
        slots = select(scores, budgets, real=real, keep_recent=self.press.keep_recent)
        self.holes = min(budgets) < max(budgets)
        # Until tokens have been dropped, a slot's number is its position.
        kept = slots if self._kept is None else gather(positions, slots).masked_fill(slots < 0, -1)
        self._kept = kept.to(torch.int32)
        self.keys, self.values = (tape.replace(gather(tape.view, slots)) for tape in self._tapes)
        self._row_stored = budgets
        self.pruned_at = self.seen

    def _real(self, positions: Tensor) -> Tensor | None:
        if self.log.real is None:
            return positions >= 0 if self.holes else None
        real = self.log.real.to(positions.device)[:, None, : self.seen].expand(-1, positions.shape[1], -1)
        return real.gather(-1, positions.clamp(min=0).long()) & (positions >= 0)

    def _own_positions(self, positions: Tensor, real: Tensor | None) -> Tensor:
        """``positions`` counted in each row's own tokens, without padding; -1 where a slot is not real."""
        if real is None or self.log.real is None:
            return positions
        own = self.log.real.to(positions.device)[:, None, : self.seen].cumsum(-1) - 1
        own = own.expand(-1, positions.shape[1], -1).gather(-1, positions.clamp(min=0).long())
        return own.masked_fill(~real, -1).to(positions.dtype)


def layer_stats(layer: Any) -> LayerStats:
    """The counts of ``layer``, which is a KnormLayer or one of transformers' own layers."""
    if isinstance(layer, KnormLayer):
        return layer.stats()
    seen = layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else 0
    stored = layer.keys.shape[2] if seen and layer.keys is not None else 0
    tensors = [tensor for tensor in _tensors(vars(layer)) if tensor.numel() > 1]
    nbytes = sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())
    return LayerStats(seen, stored, seen - stored, nbytes)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)

"""One layer of a ``KnormCache``: its storage and its pruning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import CacheLayerMixin

from knormpress.cache.log import TokenLog
from knormpress.cache.pruning import budget, gather, select
from knormpress.cache.score import Score, StoredTokens, scores_of
from knormpress.cache.tape import Tape, spare_room
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
        # (batch, kv_heads, 1, kept) int32: one more than the position of each token that the last pruning kept, and 0
        # for an empty slot. These are columns of a mask with a hidden one before the first.
        self.kept: Tensor | None = None
        self.keys = self.values = None
        self.is_initialized = False
        self.seen = 0
        self.pruned_at = 0
        self.holes = False
        self.record_past = False
        self._uncropped = False
        # Tokens of each row among the first ``_counted`` ones, without padding. Later ones are counted when it matters.
        self._counted = 0
        self._row_seen: list[int] = []
        self._row_stored: list[int] = []
        # Tokens seen when it was last decided whether to prune.
        self._decided = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch size, device and dtype from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._row_seen = [0] * key_states.shape[0]
        self._row_stored = [0] * key_states.shape[0]
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
        return self._columns() - 1

    @property
    def nbytes(self) -> int:
        """Bytes of storage, including positions and spare room."""
        kept = 0 if self.kept is None else self.kept.untyped_storage().nbytes()
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
            KnormError: the batch size changed. Whether scores are finite, the log is told to check.
        """
        batch, _, new, _ = key_states.shape
        self.expect(batch)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        spare = self._most_spare(self.seen + new, self.stored + new, key_states, value_states)
        self.keys, self.values = (
            tape.append(states, spare) for tape, states in zip(self._tapes, (key_states, value_states), strict=True)
        )
        keys, values = self.keys, self.values
        if self.log.seen < self.seen + new:
            self.log.extend(batch, self.seen + new - self.log.seen, None)
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
        self._count(self.seen)
        rows = list(zip(self._row_seen, self._row_stored, strict=True)) or [(0, 0)]
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
            self._count(self.seen - removed)
            self.seen -= removed
            self._decided = min(self._decided, self.seen)
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
        if self.kept is not None:
            self.kept = self.kept.index_select(0, beam_idx.to(self.kept.device))
        rows = [0] * len(beam_idx) if self.log.real is None else beam_idx.tolist()
        self._row_seen = [self._row_seen[row] for row in rows]
        self._row_stored = [self._row_stored[row] for row in rows]

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
        if self.kept is not None:
            tensors["positions"] = self.positions
        self._count(self.seen)
        new = self.log.counts(len(self._row_stored), self._decided, self.seen)
        names = ("seen", "pruned_at", "holes", "_row_stored")
        return tensors, {**{name: getattr(self, name) for name in names}, "_row_new": new}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take over the layer that ``state`` returned."""
        if not tensors:
            return
        self.lazy_initialization(tensors["keys"], tensors["values"])
        self.keys, self.values = self._tapes[0].replace(tensors["keys"]), self._tapes[1].replace(tensors["values"])
        counts = dict(state)
        new = counts.pop("_row_new")
        vars(self).update(counts)
        self._counted, rows = self.seen, len(new)
        self._row_seen = self.log.counts(rows, 0, self.seen)
        places = range(self.seen - max(new), -1, -1)
        self._decided = next((at for at in places if self.log.counts(rows, at, self.seen) == new), self.seen)
        if "positions" in tensors:
            kept = self.stored - (self.seen - self.pruned_at)
            self.kept = tensors["positions"][:, :, None, :kept] + 1

    def _most_spare(self, seen: int, stored: int, keys: Tensor, values: Tensor) -> int:
        """How many slots of spare room keep this layer within 1.02 times what a full cache holds at this moment.

        A short cache may have none: it is copied for each token, which costs nothing at that length.
        """
        slot = keys.shape[-1] * keys.element_size() + values.shape[-1] * values.element_size()
        positions = 0 if self.kept is None else self.kept.shape[-1] * self.kept.element_size()
        room = (1 + _MOST_SPARE) * seen * slot - stored * slot - positions
        return max(0, min(int(room // slot), int(_MOST_SPARE * seen)))

    def _move(self, device: torch.device | str) -> None:
        if self.is_initialized:
            self.keys, self.values = (tape.to(device) for tape in self._tapes)

    def _count(self, seen: int) -> None:
        """Count the tokens of each row among the first ``seen`` ones."""
        start, end = sorted((self._counted, seen))
        counts = self.log.counts(len(self._row_seen), start, end)
        more = counts if seen > self._counted else [-count for count in counts]
        self._row_seen = [before + count for before, count in zip(self._row_seen, more, strict=True)]
        self._row_stored = [before + count for before, count in zip(self._row_stored, more, strict=True)]
        self._counted = seen

    def _budgets(self, new: Sequence[int]) -> list[int]:
        """What each row keeps, if the pass added ``new`` tokens to it and what is not counted yet holds no padding."""
        late = self.seen - self._counted
        rows = zip(self._row_seen, self._row_stored, new, strict=True)
        return [
            budget(self.press, self.ratio, seen=s + late, stored=k + late, new=min(n, 1) if self.log.one_by_one else n)
            for s, k, n in rows
        ]

    def _prune(self) -> None:
        rows, new, late = len(self._row_stored), self.seen - self._decided, self.seen - self._counted
        # Padding only puts a pruning off. So where nothing would be dropped without it, there is nothing to count.
        if self._budgets([new] * rows) != [stored + late for stored in self._row_stored]:
            self._count(self.seen)
            budgets = self._budgets(self.log.counts(rows, self._decided, self.seen))
            if budgets != self._row_stored:
                self._keep(budgets)
        self._decided = self.seen

    def _keep(self, budgets: list[int]) -> None:
        assert self.keys is not None
        assert self.values is not None
        columns = self._columns()
        places, real = self._places(columns)
        tokens = StoredTokens(self.keys, self.values, places, self.index)
        scores, zero, otherwise = scores_of(self.score, tokens, real)
        self.log.expect(zero, otherwise)
        slots = select(scores, budgets, real=real, keep_recent=self.press.keep_recent)
        self.holes = min(budgets) < max(budgets)
        filled = slots.clamp(min=0) if self.holes else slots
        kept = columns.gather(-1, filled)
        self.kept = (kept.masked_fill(slots < 0, 0) if self.holes else kept)[:, :, None]
        stored = slots.shape[-1]
        spare = spare_room(stored, self._most_spare(self.seen, stored, self.keys, self.values))
        wanted = pad(filled, (0, spare)) if spare else filled
        rows: dict[tuple[int, ...], Tensor] = {}
        self.keys, self.values = (
            tape.hold(gather(states, wanted, rows), stored)
            for tape, states in zip(self._tapes, (self.keys, self.values), strict=True)
        )
        self._row_stored = budgets
        self.pruned_at = self.seen

    def _columns(self) -> Tensor:
        """One more than the position of each stored token (batch, kv_heads, stored) int32; 0 for an empty slot."""
        assert self.keys is not None
        newer = torch.arange(self.pruned_at + 1, self.seen + 1, dtype=torch.int32, device=self.device)
        newer = newer.expand(*self.keys.shape[:2], -1)
        return newer if self.kept is None else torch.cat([self.kept[:, :, 0], newer], dim=2)

    def _places(self, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        """The place of each stored token among its row's own, -1 where a slot is not real; which are, None if all."""
        if self.log.real is None:
            return columns - 1, columns > 0 if self.holes else None
        places = self.log.places(columns.device)[:, None].expand(-1, columns.shape[1], -1).gather(-1, columns.long())
        return places, places >= 0


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

"""``KnormCache``: a transformers cache that prunes itself and stays exact.

After every forward pass, each full-attention layer drops tokens as its policy says. Kept tokens keep the rotation of
their original position, new tokens get their true position, and every layer has its own attention mask. So the logits
are those of the full cache with the dropped positions masked.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from knormpress.cache.fitness import layers_for
from knormpress.cache.hooks import MaskedCache, MaskHooks
from knormpress.cache.layer import KnormLayer, LayerStats, TokenLog, layer_stats
from knormpress.cache.masks import SharedMask, flex_mask
from knormpress.cache.saving import expect_lasting_name, is_score, read_state, write_state
from knormpress.cache.score import Score, expect_score, key_norms, name_of
from knormpress.cache.scores.named import SCORES, score_named
from knormpress.errors import KnormError
from knormpress.policy.policy import Policy

__all__ = ["KnormCache", "KnormLayer", "LayerStats", "Score"]


logger = logging.getLogger(__name__)

# The models that have been warned about, since every generate() may make a cache of its own.
_beyond_positions: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


class KnormCache(MaskedCache):
    """A cache for ``model`` whose full-attention layers keep the tokens that ``press`` says.

    Sliding-window and linear-attention layers are transformers' own. Pass the cache to ``generate()`` or to a forward
    pass as ``past_key_values``; a filled cache can be used again for the next turn. It works with one model: hooks on
    that model's attention modules pass each layer its mask. The hooks do nothing while another cache is in use, and
    are removed with the model's last KnormCache.

    Args:
        model: a decoder with at least one full-attention layer.
        press: the policy.
        score: ranks the tokens of every layer, of which the lowest are kept; as ``press`` says unless given.
        offloading: move layers to the CPU while they are not computed, as transformers' offloaded cache does (CUDA).

    Raises:
        KnormError: the model has no layer to prune, is an encoder-decoder, shares keys between layers, or biases
            attention by key position; or ``press`` names layers that the model doesn't have.
    """

    def __init__(
        self, model: PreTrainedModel, press: Policy, score: Score | None = None, *, offloading: bool = False
    ) -> None:
        if not isinstance(model, nn.Module) or not isinstance(press, Policy):
            raise KnormError(
                f"KnormCache got {_short(model)} as the model and {_short(press)} as the press; wanted a loaded model "
                "and a KnormPress, in this order"
            )
        config = model.config.get_text_config(decoder=True)
        layers = layers_for(model)
        prunable = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
        ratios = press.ratios(len(layers))
        if score is not None:
            expect_score(score)
        scores = [score or score_named(name) for name in press.scores(len(layers))]
        self.hooks = MaskHooks.on(model)
        if not self.hooks.layers.issuperset(prunable):
            raise KnormError(
                f"{type(model).__name__} has attention modules that can't get their own masks; "
                "use a model whose attention modules have a layer_idx and take an attention_mask"
            )
        self.log = TokenLog()
        for index in prunable:
            layers[index] = KnormLayer(index, press, ratios[index], scores[index], self.log)
        if offloading and model.device.type != "cuda":
            raise KnormError(f"offloading is for models on CUDA, this one is on {model.device}; use offloading=False")
        super().__init__(layers=layers, offloading=offloading)
        self._last = prunable[-1]
        self.press = press
        self.score = score
        self._config = config
        self._announced: int | None = None
        # The shared mask of the pass under way, on each device that it was moved to.
        self._passes: dict[torch.device | None, SharedMask] = {}

    # Pruning reads numbers back to the host, which torch.compile can't trace.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Pass new states to layer ``layer_idx``, see ``KnormLayer.update``.

        Raises:
            KnormError: the caller is not the model that the cache was made for.
        """
        if isinstance(self.layers[layer_idx], KnormLayer) and self._announced != layer_idx:
            model = self.hooks.model()
            name = "a deleted model" if model is None else f"one {type(model).__name__}"
            raise KnormError(
                f"this cache was made for {name} and is used with another; make a KnormCache for each model"
            )
        self._announced = None
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        # A single token of a padded batch does not wait: before the next pruning all that is unknown is read at once.
        if layer_idx == self._last:
            self._passes.clear()
            if self.log.real is None or key_states.shape[2] > 1:
                self.log.check()
        return states

    def mask_for(self, module: nn.Module, mask: Any, batch: int, new: int) -> tuple[Any, bool]:
        """The mask of ``module`` over its stored tokens and the ``new`` ones, see ``MaskedCache``.

        Raises:
            KnormError: the batch size changed, the model has no position for the new tokens, an earlier pass broke
                off, or a custom mask does not cover the tokens seen. The cache is unchanged.
        """
        index = cast(int, module.layer_idx)
        layer = self.layers[index]
        if not isinstance(layer, KnormLayer):
            return mask, False
        layer.expect(batch)
        if self.log.seen not in (layer.seen, layer.seen + new):
            raise KnormError(
                f"layer {index} has seen {layer.seen} tokens, others {self.log.seen}: an earlier forward pass broke "
                "off; reset() the cache and start again"
            )
        is_first = self.log.seen == layer.seen
        if is_first:
            self._passes.clear()
        device = getattr(mask, "device", None)
        shared = self._passes.get(device)
        if shared is None or shared.mask() is not mask:
            shared = self._passes[device] = self._new_pass(mask, layer.seen, new)
        if is_first:
            self._check_seen(index, new)
            self._check_positions(batch, new, shared.real)
            self.log.extend(batch, new, shared.real)
        self._announced = index
        plain = shared.causal and not layer.holes
        if mask is None or layer.kept is None:
            return mask, plain
        groups = self._config.num_attention_heads // layer.kept.shape[1]
        own_mask = shared.of(layer.kept, since=layer.pruned_at, groups=groups, holes=layer.holes)
        is_flex = isinstance(mask, BlockMask) or self._config._attn_implementation == "flex_attention"
        return (flex_mask(own_mask) if is_flex and own_mask is not None else own_mask), plain

    def _check_seen(self, index: int, new: int) -> None:
        """At the first KnormLayer of a pass, check that every layer has seen the right number of tokens."""
        for other, layer in enumerate(self.layers):
            if not isinstance(layer, CacheLayerMixin):
                continue
            added = new if other < index and not isinstance(layer, KnormLayer) else 0
            if layer.get_seq_length() != self.log.seen + added:
                raise KnormError(
                    f"layer {other} has seen {layer.get_seq_length()} tokens, others {self.log.seen}: an earlier "
                    "forward pass broke off; reset() the cache and start again"
                )

    def _new_pass(self, mask: Any, seen: int, new: int) -> SharedMask:
        sdpa = self._config._attn_implementation == "sdpa"
        if mask is None:
            if self.log.real is not None and not bool(self.log.real.all()):
                raise KnormError(
                    "an earlier pass had padding, but this one has no attention_mask; give one over all tokens seen"
                )
            self.log.real = None  # only rows without padding are left
            return SharedMask.none(causal=sdpa and new == 1)
        shared = SharedMask.read(mask, seen, new, sdpa=sdpa, real=self.log.real)
        if shared.covers != seen + new:
            raise KnormError(
                f"the attention mask covers {shared.covers} tokens, but {seen} were seen and {new} come; "
                f"give a mask over all {seen + new} tokens, as without pruning"
            )
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self._check_nothing_hidden(mask[:, :seen].bool())
        return shared

    def _check_nothing_hidden(self, past: Tensor) -> None:
        """Check that a mask of two dimensions hides only padding: it can't differ between heads."""
        hidden = ~past if self.log.real is None else self.log.real[:, : past.shape[1]].to(past.device) & ~past
        if any(isinstance(layer, KnormLayer) and layer.pruned_at for layer in self.layers) and bool(hidden.any()):
            raise KnormError(
                "the attention mask hides tokens that earlier passes attended to, which flash attention can't do per "
                "head; leave these tokens visible, or load the model with attn_implementation='sdpa'"
            )

    def _check_positions(self, batch: int, new: int, real: Tensor | None) -> None:
        """Check that the model has positions for the new tokens; padding needs none."""
        limit = getattr(self._config, "max_position_embeddings", None)
        if limit is None:
            return
        rotation = getattr(self._config, "rope_parameters", None) or {}
        limit = int(limit * max(1.0, rotation.get("factor") or 1.0))
        if self.log.seen + new <= limit or (rotation and self.model in _beyond_positions):
            return
        coming = [new] * batch if real is None else real.expand(batch, -1).sum(dim=1).tolist()
        seen = self.log.counts(batch, 0, self.log.seen)
        if max(map(sum, zip(seen, coming, strict=True))) <= limit:
            return
        if rotation:  # they go on beyond, as with any other cache
            _beyond_positions.add(self.model)
            logger.warning("the model was made for %d positions; beyond them its answers get worse", limit)
        else:
            raise KnormError(
                f"{self.log.seen} tokens seen and {new} new ones are more than the model's {limit} positions; "
                "shorten the prompt or ask for fewer new tokens"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of storage of all layers, including spare room and positions; views are not counted."""
        return sum(stats.nbytes for stats in self.stats())

    def stats(self) -> list[LayerStats]:
        """The counts of each layer; sliding-window and linear layers drop tokens by their own rules."""
        return [layer_stats(layer) for layer in self.layers]

    def prefill_from(self, full: Cache) -> None:
        """Take the tokens of ``full``, a filled and unpruned cache of the same model.

        The result equals a prefill of this cache with the same tokens in one pass, since such a pass attends to all
        tokens before any is dropped. ``full`` is not changed, and must not hold padding.

        Raises:
            KnormError: this cache is not empty, or a layer of ``full`` does not hold every token.
        """
        if self.log.seen:
            raise KnormError(f"this cache has seen {self.log.seen} tokens; prefill_from needs an empty one")
        seen = full.get_seq_length()
        for index, (layer, source) in enumerate(zip(self.layers, full.layers, strict=True)):
            keys, values = getattr(source, "keys", None), getattr(source, "values", None)
            if not isinstance(layer, KnormLayer) or keys is None or values is None or keys.shape[2] != seen:
                raise KnormError(
                    f"layer {index} of the full cache is not a full-attention layer with all {seen} tokens; "
                    "prefill this cache with the model instead"
                )
            layer.update(keys, values)
        self.log.check()

    @contextmanager
    def as_single_tokens(self, most: int) -> Iterator[int]:
        """Let one pass prune as if its tokens came one by one, each in a pass of its own.

        When decoding prunes depends on counts only, so known tokens can be decoded in few passes, each up to the next
        pruning: inside ``with cache.as_single_tokens(most) as count`` feed the next ``count`` tokens in one pass, none
        of which may be padding.

        Args:
            most: how many tokens are still to be fed, at least 1.

        Yields:
            how many of them the pass may bring: those up to the first one after which a layer prunes, with that one.
        """
        count = min(layer.until_pruning(most) for layer in self.layers if isinstance(layer, KnormLayer))
        self.log.one_by_one = True
        try:
            yield count
        finally:
            self.log.one_by_one = False

    def save(self, path: str | Path) -> None:
        """Write the cache to a safetensors file; after ``load`` its results are bit-identical.

        Raises:
            KnormError: a layer's state can't be saved (such as linear attention), the score has no name of its own
                (a lambda), or the file can't be written.
        """
        by = None if self.score is None and self.press.layer_scores else self.score or key_norms
        if by is not None:
            expect_lasting_name(by)
        self._settle()
        self.log.check()
        tensors: dict[str, Tensor] = {}
        layers: list[dict[str, Any]] = []
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, KnormLayer | DynamicSlidingWindowLayer):
                raise KnormError(
                    f"layer {index} is a {type(layer).__name__}, whose state can't be saved; use another model"
                )
            contents, state = layer.state() if isinstance(layer, KnormLayer) else _sliding_state(layer)
            tensors |= {f"{index}.{name}": tensor for name, tensor in contents.items()}
            layers.append(state)
        if self.log.real is not None:
            tensors["real"] = self.log.real
        state = {
            "press": self.press.as_dict(),
            "score": None if by is None else name_of(by),
            "seen": self.log.seen,
            "layers": layers,
        }
        write_state(Path(path), self.model, tensors, state)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel, score: Score | None = None) -> KnormCache:
        """Load the cache that ``save`` wrote, ready for the next question.

        The file knows the policy, but not the object that it came from: ``press`` of the loaded cache is a ``Policy``
        that equals the press given before. ``KnormPress.of(cache.press)`` can be called with a model again.

        Args:
            path: the file.
            model: the model that filled the cache, in the same dtype.
            score: the score that the saved cache was made with, if one was given. It is known by its module and name
                alone: whether its code is as it was is not checked.

        Raises:
            KnormError: the file is missing or incomplete, or is for another model, format version or score; or the
                arguments are in another order.
        """
        if not isinstance(path, str | os.PathLike) or not isinstance(model, nn.Module):
            raise KnormError(
                f"KnormCache.load got {_short(path)} as the path and {_short(model)} as the model; wanted a path and a "
                "loaded model: load(path, model)"
            )
        if score is not None:
            expect_lasting_name(score)
        tensors, state = read_state(Path(path), model)
        press, by = Policy(**state["press"]), state["score"]
        if not (score is None if by is None else is_score(by, score or key_norms)):
            wanted = f"by {by}; load it with that score" if by else "as its press says; load it without a score"
            raise KnormError(f"{path} holds a cache pruned {wanted}")
        for name in press.layer_scores or ():
            # A file must not decide what code is imported.
            if name not in SCORES and name.partition(":")[0] not in sys.modules:
                raise KnormError(f"{path} holds a cache pruned by {name}; import its module, then load it")
        cache = cls(model, press, None if by is None else score or key_norms)
        cache.log.seen, cache.log.real = state["seen"], tensors.pop("real", None)
        devices = cache.hooks.devices
        if cache.log.real is not None:
            cache.log.real = cache.log.real.to(devices[min(devices)])
        for index, (layer, counts) in enumerate(zip(cache.layers, state["layers"], strict=True)):
            own = {name.partition(".")[2]: t for name, t in tensors.items() if name.partition(".")[0] == str(index)}
            own = {name: tensor.to(devices.get(index, model.device)) for name, tensor in own.items()}
            if isinstance(layer, KnormLayer):
                layer.restore(own, counts)
            elif own and isinstance(layer, DynamicSlidingWindowLayer):
                layer.lazy_initialization(own["keys"], own["values"])
                layer.keys, layer.values, layer.cumulative_length = own["keys"], own["values"], counts["seen"]
        return cache

    @property
    def model(self) -> PreTrainedModel:
        """The model that the cache was made for."""
        model = self.hooks.model()
        if model is None:
            raise KnormError("the model of this cache was deleted; keep a reference to the model")
        return model

    def reset(self) -> None:
        """Remove all tokens; the cache is like a new one."""
        for layer in self.layers:
            layer.reset()
        self.log.truncate(0)
        self._announced = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` tokens, see ``KnormLayer.crop``.

        Raises:
            KnormError: a layer can't remove them, or the number is positive; then no layer is changed.
        """
        if tokens_to_remove > 0:
            raise KnormError(f"crop got {tokens_to_remove}; give the number of tokens to remove as a negative number")
        for layer in self.layers:
            if isinstance(layer, KnormLayer):
                layer.expect_crop(-tokens_to_remove)
            elif isinstance(layer, DynamicSlidingWindowLayer) and tokens_to_remove and not layer.record_past:
                _check_sliding_crop(layer, -tokens_to_remove)
        self._settle()
        super().crop(tokens_to_remove)
        self.log.truncate(self.log.seen - abs(tokens_to_remove))
        self.log.check()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row i by the old row ``beam_idx[i]``."""
        self._settle()
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.log.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        self._settle()
        super().batch_repeat_interleave(repeats)
        if self.log.real is not None:
            self.log.real = self.log.real.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows ``indices``."""
        self._settle()
        super().batch_select_indices(indices)
        if self.log.real is not None:
            self.log.real = self.log.real[indices]

    def __deepcopy__(self, memo: dict[int, Any]) -> KnormCache:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise KnormError(
            "a KnormCache can't be pickled, nor copied by copy.copy; use cache.save(path) and "
            "KnormCache.load(path, model), or copy.deepcopy"
        )

    def _settle(self) -> None:
        """Wait until offloading has moved its layers; only a forward pass does this by itself."""
        if self.offloading:
            torch.cuda.synchronize(self.model.device)


def _check_sliding_crop(layer: DynamicSlidingWindowLayer, removed: int) -> None:
    """Check that a sliding-window layer can remove its newest ``removed`` tokens."""
    if layer.get_seq_length() >= layer.sliding_window:
        raise KnormError(
            f"a sliding-window layer can't remove its newest {removed} tokens; "
            "call activate_past_recording() before the forward pass"
        )


def _sliding_state(layer: DynamicSlidingWindowLayer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    keys, values = layer.keys, layer.values
    tensors = {} if keys is None or values is None else {"keys": keys, "values": values}
    return tensors, {"seen": layer.cumulative_length}


def _short(value: object) -> str:
    return repr(value) if isinstance(value, str | os.PathLike) else type(value).__name__

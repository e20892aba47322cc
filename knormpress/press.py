"""The pruning policy: what to keep, and from when on. Holds no tensor and needs no torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from knormpress.errors import KnormError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from knormpress.cache import KnormCache

__all__ = ["KnormPress", "Schedule", "share"]

Schedule = Literal["proportional", "iterative"]


@dataclass(frozen=True)
class KnormPress:
    """Keep the cached tokens whose key vectors have the lowest L2 norm.

    The method of Devoto et al., EMNLP 2024 (arXiv 2406.11430). A press is a value: frozen, validated when made,
    hashable. Called with a model it is a context manager in which every ``generate()`` of that model gets a fresh
    pruned cache.

    Args:
        keep_ratio: share r in (0, 1] of the tokens seen that a pruned layer keeps.
        prune_after: tokens (>= 1) a layer must have seen before it is pruned for the first time.
        skip_layers: layers that are never pruned; negative indices count from the last layer.
        layer_keep_ratios: one ratio per layer; where given it replaces ``keep_ratio`` and ``skip_layers``.
        keep_recent: the newest tokens (>= 0) that are never dropped.
        prune_interval: while decoding one token at a time, a layer is pruned again once it holds so many tokens (>= 1)
            more than its budget.
        schedule: ``"proportional"`` keeps ceil(r * seen); ``"iterative"`` keeps ceil(r * stored) whenever
            stored >= prune_after, the rule of the paper's evaluation script.

    Raises:
        KnormError: a value is out of its range.
    """

    keep_ratio: float = 0.9
    prune_after: int = 512
    skip_layers: tuple[int, ...] = (0,)
    layer_keep_ratios: tuple[float, ...] | None = None
    keep_recent: int = 0
    prune_interval: int = 64
    schedule: Schedule = "proportional"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_ratio", _ratio("keep_ratio", self.keep_ratio))
        object.__setattr__(self, "prune_after", _integer("prune_after", self.prune_after, least=1))
        object.__setattr__(self, "keep_recent", _integer("keep_recent", self.keep_recent, least=0))
        object.__setattr__(self, "prune_interval", _integer("prune_interval", self.prune_interval, least=1))
        skipped = (_integer("skip_layers", layer) for layer in _items("skip_layers", self.skip_layers))
        object.__setattr__(self, "skip_layers", tuple(skipped))
        if self.layer_keep_ratios is not None:
            plan = _items("layer_keep_ratios", self.layer_keep_ratios)
            object.__setattr__(self, "layer_keep_ratios", tuple(_ratio("layer_keep_ratios", r) for r in plan))
        if self.schedule not in ("proportional", "iterative"):
            raise KnormError(f'schedule is {self.schedule!r}; wanted "proportional" or "iterative"')

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[Callable[[], KnormCache]]:
        """Give every ``generate()`` of ``model`` a fresh pruned cache while the context lasts.

        Yields a function that makes such a cache, for a loop of your own.
        """
        from knormpress.cache import pruned_generation

        return pruned_generation(model, self)

    @classmethod
    def from_plan(cls, path: str | Path, model: PreTrainedModel) -> KnormPress:
        """The policy that ``knormpress tune`` found for ``model``.

        Args:
            path: the plan file.
            model: the model, in the type that the plan was tuned in.

        Raises:
            KnormError: there is no plan at ``path``, or it is for another model.
        """
        from knormpress.fingerprints import model_fingerprint
        from knormpress.plan import read_plan

        plan = read_plan(path)
        plan.expect(model_fingerprint(model), str(path))
        return plan.press

    def ratios(self, layers: int) -> tuple[float, ...]:
        """The keep ratio of each of a model's ``layers`` layers.

        Raises:
            KnormError: a skipped layer does not exist, or the plan has another length.
        """
        if self.layer_keep_ratios is not None:
            if len(self.layer_keep_ratios) != layers:
                raise KnormError(
                    f"layer_keep_ratios has {len(self.layer_keep_ratios)} entries, but the model has {layers} layers; "
                    "give one ratio per layer"
                )
            return self.layer_keep_ratios
        for layer in self.skip_layers:
            if not -layers <= layer < layers:
                raise KnormError(
                    f"skip_layers names layer {layer}, but the model has {layers} layers; use {-layers} to {layers - 1}"
                )
        skipped = {layer % layers for layer in self.skip_layers}
        return tuple(1.0 if layer in skipped else self.keep_ratio for layer in range(layers))

    @property
    def drops(self) -> bool:
        """Whether any layer keeps less than all, as far as that can be told without a model."""
        return min(self.layer_keep_ratios or (self.keep_ratio,)) < 1.0

    def as_dict(self) -> dict[str, Any]:
        """The policy as JSON-ready values, the inverse of ``KnormPress(**values)``."""
        return asdict(self)


def share(ratio: float, count: int) -> int:
    """ceil(ratio * count) of the decimal number that was typed: 0.07 of 100 is 7, not the 8 of binary rounding."""
    exact = _exact(ratio)
    return -(-exact.numerator * count // exact.denominator)


@functools.cache
def _exact(ratio: float) -> Fraction:
    return Fraction(repr(ratio))


def _ratio(name: str, value: Any) -> float:
    try:
        ratio = float(value)
    except (TypeError, ValueError, OverflowError):
        ratio = math.nan
    if isinstance(value, bool) or not 0.0 < ratio <= 1.0:
        raise KnormError(f"{name} is {value!r}; wanted a number above 0 and at most 1, such as 0.9")
    return ratio


def _integer(name: str, value: Any, least: int | None = None) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or (least is not None and value < least):
        wanted = "a whole number" if least is None else f"a whole number of at least {least}"
        raise KnormError(f"{name} is {value!r}; wanted {wanted}")
    return int(value)


def _items(name: str, value: Any) -> Iterable[Any]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise KnormError(f"{name} is {value!r}; wanted a sequence such as (0,)")
    return value

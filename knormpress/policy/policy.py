"""The pruning policy: what to keep, and when pruning starts. It holds no tensors and needs no torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, field
from fractions import Fraction
from typing import Any, Literal, TypeVar

from knormpress.errors import KnormError

__all__ = ["Policy", "Schedule", "share"]

_Value = TypeVar("_Value")

Schedule = Literal["proportional", "iterative"]


@dataclass(frozen=True)
class Policy:  # noqa: PLW1641 - the dataclass adds __hash__
    """How many of the cached tokens each layer keeps, and when it starts to drop the others.

    A value: frozen, validated when made, hashable. Policies with equal fields are equal. ``KnormPress`` is a policy
    that can be called with a model.

    Args:
        keep_ratio: share r in (0, 1] of the tokens seen that a pruned layer keeps.
        prune_after: tokens (>= 1) a layer must have seen before it is pruned for the first time.
        skip_layers: layers that are never pruned; negative indices count from the last layer.
        layer_keep_ratios: one ratio per layer; where given it replaces ``keep_ratio`` and ``skip_layers``.
        layer_scores: the name of each layer's score, see ``cache.scores.named``; key norms for all unless given.
        keep_recent: the newest tokens (>= 0) that are never dropped.
        prune_interval: while decoding one token at a time, a layer is pruned again once it holds this many tokens
            (>= 1) above its budget.
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
    layer_scores: tuple[str, ...] | None = field(default=None, metadata={"added": True})

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
        if self.layer_scores is not None:
            names = _items("layer_scores", self.layer_scores)
            object.__setattr__(self, "layer_scores", tuple(_name("layer_scores", name) for name in names))
        if self.schedule not in ("proportional", "iterative"):
            raise KnormError(f'schedule is {self.schedule!r}; wanted "proportional" or "iterative"')

    def __eq__(self, other: object) -> bool:
        return astuple(self) == astuple(other) if isinstance(other, Policy) else NotImplemented

    def scores(self, layers: int) -> tuple[str, ...]:
        """The name of the score of each of a model's ``layers`` layers.

        Raises:
            KnormError: ``layer_scores`` has the wrong length.
        """
        return self._one_each("layer_scores", self.layer_scores or ("knorm",) * layers, layers)

    def ratios(self, layers: int) -> tuple[float, ...]:
        """The keep ratio of each of a model's ``layers`` layers.

        Raises:
            KnormError: a skipped layer does not exist, or ``layer_keep_ratios`` has the wrong length.
        """
        if self.layer_keep_ratios is not None:
            return self._one_each("layer_keep_ratios", self.layer_keep_ratios, layers)
        for layer in self.skip_layers:
            if not -layers <= layer < layers:
                raise KnormError(
                    f"skip_layers names layer {layer}, but the model has {layers} layers; use {-layers} to {layers - 1}"
                )
        skipped = {layer % layers for layer in self.skip_layers}
        return tuple(1.0 if layer in skipped else self.keep_ratio for layer in range(layers))

    @staticmethod
    def _one_each(name: str, values: tuple[_Value, ...], layers: int) -> tuple[_Value, ...]:
        if len(values) != layers:
            raise KnormError(f"{name} has {len(values)} entries, but the model has {layers} layers; give one per layer")
        return values

    @property
    def drops(self) -> bool:
        """Whether any layer drops tokens, as far as this is known without a model."""
        return min(self.layer_keep_ratios or (self.keep_ratio,)) < 1.0

    @property
    def mean_keep(self) -> float:
        """The keep ratio, or the mean of ``layer_keep_ratios`` if there are any."""
        ratios = self.layer_keep_ratios or (self.keep_ratio,)
        return math.fsum(ratios) / len(ratios)

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values; ``Policy(**values)`` is the same policy again."""
        return asdict(self)


def share(ratio: float, count: int) -> int:
    """ceil(ratio * count), computed with the decimal number as typed: 0.07 of 100 is 7, not 8 by binary rounding."""
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


def _name(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise KnormError(f"{name} has {value!r}; wanted names of scores, such as knorm")
    return value


def _integer(name: str, value: Any, least: int | None = None) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or (least is not None and value < least):
        wanted = "a whole number" if least is None else f"a whole number of at least {least}"
        raise KnormError(f"{name} is {value!r}; wanted {wanted}")
    return int(value)


def _items(name: str, value: Any) -> Iterable[Any]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise KnormError(f"{name} is {value!r}; wanted a sequence such as (0,)")
    return value

"""Where a search measures: in this process, or on the nodes of a cluster. The search does not know which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from torch import Tensor

from knormpress.methods.knorm import KnormPress
from knormpress.progress import Progress, ticking
from knormpress.records.plan import KeptTokens, Point
from knormpress.tune.notes import Damage
from knormpress.tune.probes import Probes
from knormpress.tune.texts import Texts
from knormpress.tune.unseen import Tried, kept_tokens, measure_unseen
from knormpress.workload.bench import Bench

__all__ = ["Here", "Meter", "Place", "reading", "report"]


class Meter(Protocol):
    """Measures the damage of policies on the calibration texts, see ``probes.Probes``."""

    @property
    def items(self) -> int:
        """The number of items in use: questions that the full cache answers."""

    def measure(self, press: KnormPress) -> Damage:
        """Measure the damage of ``press`` on all texts."""

    def around(self, base: KnormPress, moves: Mapping[KnormPress, int]) -> Iterator[tuple[KnormPress, Damage]]:
        """The damage of each policy, which equals ``base`` below the layer that it is mapped to; in any order."""


class Place(Protocol):
    """Where a search measures."""

    def load(self) -> None:
        """Load what is not there yet; it is no part of the search's time.

        Raises:
            KnormError: that can't be done.
        """

    def probes(self, texts: Texts, progress: Progress) -> AbstractContextManager[Meter]:
        """The calibration texts, read."""

    def report(self, tried: Sequence[Tried], texts: Texts, progress: Progress) -> tuple[Point, ...]:
        """Perplexity and retrieval of every policy on unseen texts, see ``unseen.measure_unseen``."""

    def kept_tokens(self, press: KnormPress, prompt: Tensor) -> KeptTokens:
        """Which tokens of a prompt are kept, see ``unseen.kept_tokens``."""


class Here:
    """This process, with a model that is loaded."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def load(self) -> None:
        """Nothing: all is there."""

    @contextmanager
    def probes(self, texts: Texts, progress: Progress) -> Iterator[Meter]:
        """See ``Place``."""
        with reading(self._bench, texts, progress) as probes:
            yield probes

    def report(self, tried: Sequence[Tried], texts: Texts, progress: Progress) -> tuple[Point, ...]:
        """Measure ``tried`` on ``texts``, and tell ``progress``; see ``Place``."""
        return report(self._bench, tried, texts, progress)

    def kept_tokens(self, press: KnormPress, prompt: Tensor) -> KeptTokens:
        """See ``Place``."""
        return kept_tokens(self._bench, press, prompt)


def reading(bench: Bench, texts: Texts, progress: Progress) -> AbstractContextManager[Probes]:
    """The texts, prefilled by the model of ``bench``."""
    return Probes.open(
        bench.model,
        texts.documents,
        texts.asked,
        context=texts.context,
        after_each=ticking(progress, texts.prompts, "reading the calibration texts"),
    )


def report(bench: Bench, tried: Sequence[Tried], texts: Texts, progress: Progress) -> tuple[Point, ...]:
    """Perplexity and retrieval of every policy on ``texts``, by the model of ``bench``."""
    return measure_unseen(
        bench, tried, texts.documents, context=texts.context, haystacks=texts.asked, progress=progress
    )

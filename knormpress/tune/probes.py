"""Measure the damage of a plan on some documents and items, fast, as feedback for the search for a plan.

Every text is prefilled only once, with the full cache; a plan is tried by pruning a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from knormpress.cache.cache import KnormCache
from knormpress.measure.prefill import prefill
from knormpress.measure.retrieval import read_answers
from knormpress.methods.knorm import KnormPress
from knormpress.records.retrieval import Answer
from knormpress.tune.notes import Damage
from knormpress.tune.replay import Outputs, Replay, replayed
from knormpress.workload.tasks.haystack import Haystack

__all__ = ["Probes"]

# One layer alone is measured on so many documents, texts of each task, and questions of each text. Few, as a search
# measures some hundred layers before it tries the first plan.
_FEW_DOCUMENTS, _FEW_TEXTS, _FEW_QUESTIONS = 1, 1, 1


class Probes:
    """Texts with filled full caches. Made by ``open``.

    Args:
        model: the model.
        replay: controls its passes.
        documents: texts whose ends are scored.
        asked: texts with questions that the full cache answers.
    """

    def __init__(self, model: PreTrainedModel, replay: Replay, documents: list[_Document], asked: list[_Asked]) -> None:
        self._model, self._replay, self._documents, self._asked = model, replay, documents, asked
        self._few_documents = documents[:_FEW_DOCUMENTS]
        tasks: dict[str, list[_Asked]] = {}
        for text in asked:
            tasks.setdefault(text.haystack.task, []).append(text)
        kept = (text for texts in tasks.values() for text in texts[:_FEW_TEXTS])
        self._few_asked = [text.shortened(_FEW_QUESTIONS) for text in kept]
        self._base: tuple[KnormPress, list[Outputs]] | None = None

    @classmethod
    @contextmanager
    def open(
        cls,
        model: PreTrainedModel,
        texts: Sequence[Tensor],
        haystacks: Sequence[Haystack],
        *,
        context: int,
        after_each: Callable[[], None] = lambda: None,
    ) -> Iterator[Probes]:
        """Prefill all texts.

        Args:
            model: the model; its passes are controlled inside the context, see ``tune.replay``.
            texts: token ids (1, context + S + 1) each; S predictions are scored.
            haystacks: texts with questions; those questions that the full cache does not answer are left out.
            context: tokens before the first token that is fed.
            after_each: called after each text.
        """
        documents, asked = [], []
        with torch.inference_mode(), replayed(model) as replay:
            for ids in texts:
                documents.append(_Document(model, ids, context))
                after_each()
            for haystack in haystacks:
                text = _Asked.of(model, haystack)
                if text.known:
                    asked.append(text)
                after_each()
            yield cls(model, replay, documents, asked)

    @property
    def items(self) -> int:
        """The number of items in use: questions that the full cache answers."""
        return sum(len(text.known) for text in self._asked)

    def measure(self, press: KnormPress) -> Damage:
        """Measure the damage of ``press`` on all texts."""
        return self._measure(press, self._documents, self._asked, lambda index, run: run())

    def around(self, base: KnormPress, moves: Mapping[KnormPress, int]) -> Iterator[tuple[KnormPress, Damage]]:
        """Measure the damage of policies that are near ``base``, each when it is asked for.

        They are measured on one document and one question of each task.

        Args:
            base: its passes are recorded, unless it was the last one that was asked for.
            moves: the policies. Each equals ``base`` below the layer that it is mapped to.
        """
        outputs = self._recorded(base)
        for press, layer in moves.items():
            yield press, self._replayed(press, outputs, layer)

    def _recorded(self, base: KnormPress) -> list[Outputs]:
        """The outputs of the layers in each pass of ``base``."""
        if self._base is None or self._base[0] != base:
            outputs: list[Outputs] = []

            def record(_: int, run: Callable[[], Any]) -> Any:
                with self._replay.record() as recorded:
                    result = run()
                outputs.append(recorded)
                return result

            self._base = None  # that of another base is not kept beside it
            self._measure(base, self._few_documents, self._few_asked, record)
            self._base = base, outputs
        return self._base[1]

    def _replayed(self, press: KnormPress, outputs: Sequence[Outputs], layer: int) -> Damage:
        def replay(index: int, run: Callable[[], Any]) -> Any:
            with self._replay.above(outputs[index], layer):
                return run()

        return self._measure(press, self._few_documents, self._few_asked, replay)

    def _measure(
        self,
        press: KnormPress,
        documents: Sequence[_Document],
        asked: Sequence[_Asked],
        execute: Callable[[int, Callable[[], Any]], Any],
    ) -> Damage:
        kl, nll = [], []
        rises: list[float] = []
        found: list[bool] = []
        with torch.inference_mode():
            for index, document in enumerate(documents):
                divergence, rise = execute(index, partial(self._score, document, press))
                kl.append(divergence)
                nll.append(rise)
            for index, text in enumerate(asked, start=len(documents)):
                answers = execute(index, partial(self._read, text, press))
                rises += [answer.nll - known.nll for answer, known in zip(answers, text.known, strict=True)]
                found += [answer.found for answer in answers]
        return Damage(fmean(kl), fmean(nll), fmean(rises or [0.0]), fmean(found or [True]))

    def _score(self, document: _Document, press: KnormPress) -> tuple[float, float]:
        return document.score(self._pruned(press, document.full))

    def _read(self, text: _Asked, press: KnormPress) -> list[Answer]:
        return read_answers(self._model, text.haystack, self._pruned(press, text.full))

    def _pruned(self, press: KnormPress, full: Cache) -> KnormCache:
        cache = KnormCache(self._model, press)
        cache.prefill_from(full)
        return cache


class _Document:
    """A text with its context in a full cache, and the full cache's predictions for the rest."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, context: int) -> None:
        self.full = DynamicCache(config=model.config)
        prefill(model, ids[:, :context], self.full)
        self._model, self._fed, self._targets = model, ids[:, context:-1], ids[0, context + 1 :]
        log_probabilities = self._log_probabilities(_copied(model, self.full))
        self._probabilities = log_probabilities.exp()
        self._entropy = -(self._probabilities * log_probabilities).nan_to_num().sum(dim=-1)
        self._nll = self._nll_of(log_probabilities)

    def score(self, cache: Cache) -> tuple[float, float]:
        """Mean divergence from the full cache and mean rise of the negative log-likelihood, in nats per token."""
        log_probabilities = self._log_probabilities(cache)
        cross_entropy = -(self._probabilities * log_probabilities).nan_to_num().sum(dim=-1)
        return float((cross_entropy - self._entropy).mean()), float(
            (self._nll_of(log_probabilities) - self._nll).mean()
        )

    def _log_probabilities(self, cache: Cache) -> Tensor:
        logits: Tensor = self._model(input_ids=self._fed, past_key_values=cache, use_cache=True).logits[0]
        return logits.float().log_softmax(dim=-1)

    def _nll_of(self, log_probabilities: Tensor) -> Tensor:
        return -log_probabilities.gather(-1, self._targets[:, None])[:, 0]


class _Asked:
    """A text in a full cache, with the questions that this cache answers, and its answers."""

    def __init__(self, haystack: Haystack, full: Cache, known: Sequence[Answer]) -> None:
        self.haystack, self.full, self.known = haystack, full, known

    @classmethod
    def of(cls, model: PreTrainedModel, haystack: Haystack) -> _Asked:
        full = DynamicCache(config=model.config)
        prefill(model, haystack.ids, full)
        pairs = zip(haystack.questions, read_answers(model, haystack, full), strict=True)
        solved = [(question, answer) for question, answer in pairs if answer.found]
        questions = tuple(question for question, _ in solved)
        return cls(replace(haystack, questions=questions), full, [answer for _, answer in solved])

    def shortened(self, most: int) -> _Asked:
        """The same text with at most ``most`` of its questions."""
        questions = self.haystack.questions[:most]
        return _Asked(replace(self.haystack, questions=questions), self.full, self.known[:most])


def _copied(model: PreTrainedModel, full: DynamicCache) -> DynamicCache:
    """A cache with the tokens of ``full``, which can grow without changing ``full``: its first append copies."""
    copied = DynamicCache(config=model.config)
    for index, layer in enumerate(full.layers):
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        copied.update(layer.keys, layer.values, index)
    return copied

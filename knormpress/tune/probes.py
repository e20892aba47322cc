"""Measure the damage of a plan on a few documents and passkeys, fast, as feedback for the search for a plan.

Every text is prefilled only once, with the full cache; a plan is tried by pruning a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


class Probes:
    """Documents and passkeys with filled full caches. Made by ``open``."""

    def __init__(
        self, model: PreTrainedModel, replay: Replay, documents: list[_Document], passkeys: list[_Passkey]
    ) -> None:
        self._model, self._replay, self._documents, self._passkeys = model, replay, documents, passkeys

    @classmethod
    @contextmanager
    def open(
        cls,
        model: PreTrainedModel,
        texts: Sequence[Tensor],
        prompts: Sequence[Haystack],
        *,
        context: int,
        after_each: Callable[[], None] = lambda: None,
    ) -> Iterator[Probes]:
        """Prefill all documents and passkeys.

        Args:
            model: the model; its passes are controlled inside the context, see ``tune.replay``.
            texts: token ids (1, context + S + 1) each; S predictions are scored.
            prompts: texts with one question each; those that the full cache does not answer are left out.
            context: tokens before the first token that is fed.
            after_each: called after each text and prompt.
        """
        documents, passkeys = [], []
        with torch.inference_mode(), replayed(model) as replay:
            for ids in texts:
                documents.append(_Document(model, ids, context))
                after_each()
            for prompt in prompts:
                passkey = _Passkey(model, prompt)
                if passkey.answer.found:
                    passkeys.append(passkey)
                after_each()
            yield cls(model, replay, documents, passkeys)

    @property
    def passkeys(self) -> int:
        """The number of passkeys in use."""
        return len(self._passkeys)

    def measure(self, press: KnormPress) -> Damage:
        """Measure the damage of ``press``."""
        return self._measure(press, lambda index, run: run())

    def around(self, press: KnormPress) -> Callable[[KnormPress, int], Damage]:
        """A function for policies that equal ``press`` below a layer: takes policy and layer, returns the damage."""
        outputs: list[Outputs] = []

        def record(_: int, run: Callable[[], Any]) -> Any:
            with self._replay.record() as recorded:
                result = run()
            outputs.append(recorded)
            return result

        self._measure(press, record)

        def measure(other: KnormPress, layer: int) -> Damage:
            def replay(index: int, run: Callable[[], Any]) -> Any:
                with self._replay.above(outputs[index], layer):
                    return run()

            return self._measure(other, replay)

        return measure

    def _measure(self, press: KnormPress, execute: Callable[[int, Callable[[], Any]], Any]) -> Damage:
        kl, nll, key_nll, found = [], [], [0.0], [True]
        with torch.inference_mode():
            for index, document in enumerate(self._documents):
                divergence, rise = execute(index, partial(self._score, document, press))
                kl.append(divergence)
                nll.append(rise)
            if self._passkeys:
                key_nll, found = [], []
            for index, passkey in enumerate(self._passkeys, start=len(self._documents)):
                answer = execute(index, partial(self._read, passkey, press))
                key_nll.append(answer.nll - passkey.answer.nll)
                found.append(answer.found)
        return Damage(fmean(kl), fmean(nll), fmean(key_nll), fmean(found))

    def _score(self, document: _Document, press: KnormPress) -> tuple[float, float]:
        return document.score(self._pruned(press, document.full))

    def _read(self, passkey: _Passkey, press: KnormPress) -> Answer:
        return passkey.ask(self._pruned(press, passkey.full))

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


class _Passkey:
    """A text with a passkey in a full cache, and the full cache's answer."""

    def __init__(self, model: PreTrainedModel, prompt: Haystack) -> None:
        self.full = DynamicCache(config=model.config)
        prefill(model, prompt.ids, self.full)
        self._model, self._prompt = model, prompt
        self.answer = self.ask(self.full)

    def ask(self, cache: Cache) -> Answer:
        """The answer of ``cache``, which holds the text."""
        (answer,) = read_answers(self._model, self._prompt, cache)
        return answer


def _copied(model: PreTrainedModel, full: DynamicCache) -> DynamicCache:
    """A cache with the tokens of ``full``, which can grow without changing ``full``: its first append copies."""
    copied = DynamicCache(config=model.config)
    for index, layer in enumerate(full.layers):
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        copied.update(layer.keys, layer.values, index)
    return copied

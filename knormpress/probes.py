"""What a plan does to a few documents and passkeys, measured often and fast: the feedback of the search for a plan.

Every text is prefilled once, with the full cache; a plan is tried by pruning a copy. What was measured is noted in a
file, so that a search that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from knormpress.cache import KnormCache
from knormpress.errors import KnormError
from knormpress.files import replacing
from knormpress.metrics import prefill
from knormpress.metrics.passkey import PasskeyPrompt, PasskeyScore, read_key
from knormpress.metrics.replay import Outputs, Replay, replayed
from knormpress.press import KnormPress

__all__ = ["Damage", "Notes", "Probes"]


@dataclass(frozen=True)
class Damage:
    """What a policy does, against the full cache, on average.

    Args:
        kl: divergence from the full cache's predictions, nats a token.
        nll: rise of the text's negative log-likelihood, nats a token.
        key_nll: rise of a passkey's negative log-likelihood, nats a key.
        found: share of the passkeys found, of those that the full cache finds.
    """

    kl: float
    nll: float
    key_nll: float
    found: float

    @property
    def text(self) -> float:
        """Mean of ``kl`` and ``nll``: the one is smooth, the other is what perplexity is made of.

        A fall of ``nll`` counts as none: on a few documents it is luck.
        """
        return (self.kl + max(self.nll, 0.0)) / 2


class Notes:
    """Damages measured before, in a JSON Lines file whose first line says of what, as does a hash in every other.

    The hash tells whose a line is when two searches write to one file at once.

    Args:
        path: the file, made where it is missing.
        identity: JSON-ready values; what was noted under others is forgotten.
        fresh: forget what was noted.

    Raises:
        KnormError: the file can't be written.
    """

    def __init__(self, path: Path, identity: dict[str, Any], *, fresh: bool = False) -> None:
        self.path, self._known = path, {}
        first = json.dumps(identity, sort_keys=True)
        self._owner = hashlib.sha256(first.encode()).hexdigest()[:16]
        with self._told():
            known = path.exists() and not fresh
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if known else []
        self.goes_on = bool(lines) and lines[0] == first
        for line in lines[1:] if self.goes_on else []:
            try:
                owner, press, damage = json.loads(line)
                if owner == self._owner:
                    self._known[press] = Damage(**damage)
            except (ValueError, TypeError):  # cut short when it was stopped
                continue
        with self._told():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as beside:  # a kill must not cost what was measured
                beside.write_text("\n".join([first, *map(self._line, self._known), ""]), encoding="utf-8")

    def get(self, press: KnormPress) -> Damage | None:
        """What was noted of ``press``."""
        return self._known.get(self._name(press))

    def note(self, press: KnormPress, damage: Damage) -> None:
        """Keep what was found."""
        name = self._name(press)
        self._known[name] = damage
        with self._told(), self.path.open("a", encoding="utf-8") as file:
            file.write(self._line(name) + "\n")

    def _line(self, name: str) -> str:
        return json.dumps([self._owner, name, asdict(self._known[name])])

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise KnormError(
                f"what the search measures can't be kept in {self.path} ({error.strerror}); choose another --output"
            ) from error

    @staticmethod
    def _name(press: KnormPress) -> str:
        return json.dumps(press.as_dict(), sort_keys=True)


class Probes:
    """Documents and passkeys behind full caches, made by ``open``."""

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
        prompts: Sequence[PasskeyPrompt],
        *,
        context: int,
        after_each: Callable[[], None] = lambda: None,
    ) -> Iterator[Probes]:
        """Prefill everything.

        Args:
            model: the model; its passes can be steered while the context lasts, see ``metrics.replay``.
            texts: (1, context + S + 1) ids each, S predictions are scored.
            prompts: passkeys; those that the full cache does not find are left out.
            context: tokens before the first scored prediction's input.
            after_each: called after each text and prompt.
        """
        documents, passkeys = [], []
        with torch.inference_mode(), replayed(model) as replay:
            for ids in texts:
                documents.append(_Document(model, ids, context))
                after_each()
            for prompt in prompts:
                passkey = _Passkey(model, prompt)
                if passkey.score.found:
                    passkeys.append(passkey)
                after_each()
            yield cls(model, replay, documents, passkeys)

    @property
    def passkeys(self) -> int:
        """Passkeys in use."""
        return len(self._passkeys)

    def measure(self, press: KnormPress) -> Damage:
        """What ``press`` does."""
        return self._measure(press, lambda index, run: run())

    def around(self, press: KnormPress) -> Callable[[KnormPress, int], Damage]:
        """A function that measures policies equal to ``press`` below a layer: called with the policy and that layer."""
        outputs: list[Outputs] = []

        def record(_: int, run: Callable[[], Any]) -> Any:
            with self._replay.record() as recorded:
                found = run()
            outputs.append(recorded)
            return found

        self._measure(press, record)

        def measure(other: KnormPress, layer: int) -> Damage:
            def steer(index: int, run: Callable[[], Any]) -> Any:
                with self._replay.above(outputs[index], layer):
                    return run()

            return self._measure(other, steer)

        return measure

    def _measure(self, press: KnormPress, steer: Callable[[int, Callable[[], Any]], Any]) -> Damage:
        kl, nll, key_nll, found = [], [], [0.0], [True]
        with torch.inference_mode():
            for index, document in enumerate(self._documents):
                divergence, rise = steer(index, partial(self._score, document, press))
                kl.append(divergence)
                nll.append(rise)
            if self._passkeys:
                key_nll, found = [], []
            for index, passkey in enumerate(self._passkeys, start=len(self._documents)):
                score = steer(index, partial(self._read, passkey, press))
                key_nll.append(score.nll - passkey.score.nll)
                found.append(score.found)
        return Damage(fmean(kl), fmean(nll), fmean(key_nll), fmean(found))

    def _score(self, document: _Document, press: KnormPress) -> tuple[float, float]:
        return document.score(self._pruned(press, document.full))

    def _read(self, passkey: _Passkey, press: KnormPress) -> PasskeyScore:
        return read_key(self._model, passkey.prompt, self._pruned(press, passkey.full))

    def _pruned(self, press: KnormPress, full: Cache) -> KnormCache:
        cache = KnormCache(self._model, press)
        cache.prefill_from(full)
        return cache


class _Document:
    def __init__(self, model: PreTrainedModel, ids: Tensor, context: int) -> None:
        self.full = DynamicCache(config=model.config)
        prefill(model, ids[:, :context], self.full)
        self._model, self._fed, self._targets = model, ids[:, context:-1], ids[0, context + 1 :]
        log_probabilities = self._log_probabilities(_copied(model, self.full))
        self._probabilities = log_probabilities.exp()
        self._entropy = -(self._probabilities * log_probabilities).nan_to_num().sum(dim=-1)
        self._nll = self._nll_of(log_probabilities)

    def score(self, cache: Cache) -> tuple[float, float]:
        """Mean divergence from the full cache, and mean rise of the negative log-likelihood, in nats."""
        log_probabilities = self._log_probabilities(cache)
        cross = -(self._probabilities * log_probabilities).nan_to_num().sum(dim=-1)
        return float((cross - self._entropy).mean()), float((self._nll_of(log_probabilities) - self._nll).mean())

    def _log_probabilities(self, cache: Cache) -> Tensor:
        logits: Tensor = self._model(input_ids=self._fed, past_key_values=cache, use_cache=True).logits[0]
        return logits.float().log_softmax(dim=-1)

    def _nll_of(self, log_probabilities: Tensor) -> Tensor:
        return -log_probabilities.gather(-1, self._targets[:, None])[:, 0]


class _Passkey:
    def __init__(self, model: PreTrainedModel, prompt: PasskeyPrompt) -> None:
        self.full = DynamicCache(config=model.config)
        prefill(model, prompt.text, self.full)
        self.prompt = prompt
        self.score = read_key(model, prompt, _copied(model, self.full))


def _copied(model: PreTrainedModel, full: DynamicCache) -> DynamicCache:
    """A cache that grows without changing ``full``: its first append copies."""
    copied = DynamicCache(config=model.config)
    for index, layer in enumerate(full.layers):
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        copied.update(layer.keys, layer.values, index)
    return copied

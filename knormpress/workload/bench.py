"""A loaded model and a tokenised text, on which measurements are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from knormpress.errors import KnormError
from knormpress.records.schema import Environment, ModelInfo, TextInfo
from knormpress.workload.corpora import Corpus, documents
from knormpress.workload.device_map import DeviceMap
from knormpress.workload.devices import input_device
from knormpress.workload.environment import describe_environment
from knormpress.workload.models import LoadedModel, load_model

__all__ = ["Bench", "describe_model"]


def describe_model(loaded: LoadedModel) -> ModelInfo:
    """Describe a model, for a record."""
    return ModelInfo(
        name=loaded.name,
        source=loaded.source,
        fingerprint=loaded.fingerprint,
        dtype=loaded.dtype,
        parameters=loaded.parameters,
    )


@dataclass(frozen=True)
class Bench:
    """A loaded model, the tokens of a text, and the description of model, text and machine for records.

    ``ids`` (n,) are the tokens of the whole text; ``start`` (0 or 1,) is the token that begins every text, if any.
    """

    model: PreTrainedModel
    tokenizer: Any
    ids: Tensor
    start: Tensor
    environment: Environment
    model_info: ModelInfo
    text_info: TextInfo

    @classmethod
    def open(cls, model: str | None, corpus: Corpus, *, device: torch.device | DeviceMap, dtype: str) -> Bench:
        """Load ``model`` as ``models.load_model`` does, and tokenise the text.

        Raises:
            KnormError: the model can't be loaded.
        """
        loaded = load_model(model, device=device, dtype=dtype)
        tokenizer: Any = loaded.tokenizer
        first = tokenizer("a").input_ids[:1]
        return cls(
            model=loaded.model,
            tokenizer=tokenizer,
            ids=torch.tensor(tokenizer(corpus.text, add_special_tokens=False, verbose=False).input_ids),
            start=torch.tensor(first if first == [tokenizer.bos_token_id] else [], dtype=torch.long),
            environment=describe_environment(*loaded.devices, device_map=loaded.device_map),
            model_info=describe_model(loaded),
            text_info=TextInfo(name=corpus.name, source=corpus.source, sha256=corpus.sha256),
        )

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return input_device(self.model)

    @property
    def layers(self) -> int:
        """Layers of the decoder."""
        return int(self.model.config.get_text_config(decoder=True).num_hidden_layers)

    @property
    def positions(self) -> int | None:
        """The number of positions that the model is made for; None if its configuration sets no limit."""
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return None if limit is None else int(limit)

    def check_length(self, tokens: int) -> None:
        """Check that the model has positions for ``tokens`` tokens.

        Raises:
            KnormError: it has fewer.
        """
        if self.positions is not None and tokens > self.positions:
            raise KnormError(
                f"{self.model_info.name} is made for {self.positions} positions, but the prompt and what follows it "
                f"take {tokens}; use a shorter prompt"
            )

    def documents(self, *, length: int, count: int) -> list[Tensor]:
        """``count`` parts of the text as token ids of shape (1, length), on ``device``.

        Raises:
            KnormError: the text is too short, or the model has too few positions.
        """
        self.check_length(length)
        parts = documents(self.ids, length=length - len(self.start), count=count)
        return [torch.cat([self.start, ids])[None].to(self.device) for ids in parts]

"""A model on a device with a text, and what is measured there: quality, memory and latency, as records hold them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from knormpress.corpora import Corpus, documents
from knormpress.environment import describe_environment
from knormpress.errors import KnormError
from knormpress.methods import FullCache
from knormpress.metrics import (
    Method,
    Repeat,
    Timing,
    measure_memory,
    score_document,
    time_generation,
    time_in_turn,
    until_enough,
)
from knormpress.metrics.passkey import PasskeyPrompt, passkey_prompts
from knormpress.models import load_model
from knormpress.records import (
    ROUNDING_KL,
    DocumentScore,
    Environment,
    Latency,
    Memory,
    MemoryReading,
    ModelInfo,
    Quality,
    Run,
    TextInfo,
)

__all__ = ["Bench", "cold_ttft", "latency", "memory", "quality", "refuse_unpruned", "weights_tpot"]

# So few that the cache costs nothing beside the weights, and enough for a median.
_SHORT_PROMPT = 16
_SHORT_ANSWER = 16


@dataclass(frozen=True)
class Bench:
    """A loaded model, the text cut into tokens, and what a record says of both and of the machine.

    ``ids`` (n,) are the tokens of the whole text; ``start`` (0 or 1,) is the token that the model's texts begin with.
    """

    model: PreTrainedModel
    tokenizer: Any
    ids: Tensor
    start: Tensor
    environment: Environment
    model_info: ModelInfo
    text_info: TextInfo

    @classmethod
    def open(cls, model: str | None, corpus: Corpus, *, device: torch.device, dtype: str) -> Bench:
        """Load ``model`` on ``device`` and tokenise the text.

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
            environment=describe_environment(device),
            model_info=ModelInfo(
                name=loaded.name,
                source=loaded.source,
                fingerprint=loaded.fingerprint,
                dtype=loaded.dtype,
                parameters=loaded.parameters,
            ),
            text_info=TextInfo(name=corpus.name, source=corpus.source, sha256=corpus.sha256),
        )

    @property
    def layers(self) -> int:
        """Layers of the decoder."""
        return int(self.model.config.get_text_config(decoder=True).num_hidden_layers)

    @property
    def positions(self) -> int | None:
        """Positions that the model is made for; None where its configuration sets no end."""
        found = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return None if found is None else int(found)

    def check_length(self, tokens: int) -> None:
        """See that the model has positions for so many tokens.

        Raises:
            KnormError: it has fewer.
        """
        if self.positions is not None and tokens > self.positions:
            raise KnormError(
                f"{self.model_info.name} is made for {self.positions} positions, but the prompt and what follows it "
                f"take {tokens}; use a shorter prompt"
            )

    def documents(self, *, length: int, count: int) -> list[Tensor]:
        """``count`` stretches of the text, (1, length) token ids each, on the model's device.

        Raises:
            KnormError: the text is too short, or the model is not made for so many positions.
        """
        self.check_length(length)
        cut = documents(self.ids, length=length - len(self.start), count=count)
        return [torch.cat([self.start, ids])[None].to(self.model.device) for ids in cut]

    def passkeys(self, *, count: int, which: Literal["calibration", "held-out"]) -> list[PasskeyPrompt]:
        """``count`` prompts of ``metrics.passkey``, on the model's device.

        Raises:
            KnormError: the model is not made for so many positions.
        """
        prompts = passkey_prompts(self.tokenizer, self.start, count=count, which=which, device=self.model.device)
        longest = max(prompt.text.shape[-1] + prompt.fed.shape[-1] for prompt in prompts)
        if self.positions is not None and longest > self.positions:
            raise KnormError(
                f"{self.model_info.name} is made for {self.positions} positions, but the passkey prompts take "
                f"{longest}; go without them (for knormpress tune: --target-passkey none), or use another model"
            )
        return prompts


def quality(
    bench: Bench,
    texts: Sequence[Tensor],
    candidates: Sequence[Method],
    *,
    context: int,
    prefill_chunk: int | None,
    after_document: Callable[[], None] = lambda: None,
) -> list[Quality]:
    """Score ``texts`` through the full cache and each candidate's, see ``metrics.quality``; one result a candidate."""
    scores: list[list[DocumentScore]] = [[] for _ in candidates]
    for index, ids in enumerate(texts):
        found = score_document(bench.model, ids, FullCache(), candidates, context=context, prefill_chunk=prefill_chunk)
        for collected, score in zip(scores, found.candidates, strict=True):
            collected.append(
                DocumentScore(
                    document=index,
                    baseline_nll=found.baseline_nll,
                    candidate_nll=score.nll,
                    kl=score.kl,
                    top1_agreement=score.top1_agreement,
                )
            )
        after_document()
    return [Quality(documents=tuple(collected)) for collected in scores]


def refuse_unpruned(method: str, quality: Quality) -> None:
    """See that a method which is to drop tokens predicts otherwise than the full cache, beyond rounding.

    Raises:
        KnormError: it never does, so that the full cache was scored.
    """
    if all(document.kl < ROUNDING_KL for document in quality.documents):
        raise KnormError(
            f"{method} predicts exactly what the full cache does, so nothing was pruned, or the full cache was scored; "
            "see that it prunes within the prompt"
        )


def memory(
    bench: Bench,
    prompt: Tensor,
    candidate: Method,
    *,
    prefill_chunk: int | None,
    after_run: Callable[[], None] = lambda: None,
) -> Memory:
    """Prefill ``prompt`` into the full cache and into the candidate's, in passes of their own."""
    uses = []
    for method in (FullCache(), candidate):
        uses.append(measure_memory(bench.model, method, prompt, prefill_chunk=prefill_chunk))
        after_run()
    readings = [
        tuple(MemoryReading(name=reading.name, bytes=reading.bytes, reason=reading.reason) for reading in use.device)
        for use in uses
    ]
    return Memory(
        baseline_cache_bytes=uses[0].cache_bytes,
        candidate_cache_bytes=uses[1].cache_bytes,
        baseline_device=readings[0],
        candidate_device=readings[1],
    )


def latency(
    bench: Bench,
    prompt: Tensor,
    candidate: Method,
    *,
    new_tokens: int,
    rounds: int,
    precision: float | None = None,
    seconds: float = math.inf,
    prefill_chunk: int | None,
    cold_s: float | None = None,
    after_run: Callable[[], None] = lambda: None,
    repeat: Repeat = until_enough,
) -> Latency:
    """Time the full cache and the candidate in turn, see ``metrics.time_in_turn``.

    ``cold_s`` is noted as the first call of the process.
    """
    found = time_in_turn(
        bench.model,
        FullCache(),
        candidate,
        prompt,
        new_tokens=new_tokens,
        rounds=rounds,
        precision=precision,
        seconds=seconds,
        prefill_chunk=prefill_chunk,
        after_run=after_run,
        repeat=repeat,
    )
    return Latency(
        baseline=tuple(_as_run(baseline) for baseline, _ in found.pairs),
        candidate=tuple(_as_run(timed) for _, timed in found.pairs),
        stopped=found.stopped,
        calibration_s=found.calibration_s,
        ttft_cold_s=cold_s,
    )


def weights_tpot(bench: Bench, prompt: Tensor) -> float:
    """Seconds that a token takes behind an almost empty cache, where nearly all of it goes into the weights.

    What is stored can only add to that, so no cache gets below it. It is the median gap of one generation with the full
    cache behind the first 16 tokens of ``prompt`` (1, n); the model should be warm.
    """
    with FullCache()(bench.model) as new_cache:
        timing = time_generation(bench.model, prompt[:, :_SHORT_PROMPT], new_cache, new_tokens=_SHORT_ANSWER)
    return statistics.median(timing.gaps_s)


_process_is_cold = True


def cold_ttft(bench: Bench, prompt: Tensor, *, prefill_chunk: int | None) -> float | None:
    """Seconds to the first token of the first call of this process, with the full cache; None in any later call.

    Args:
        bench: the model.
        prompt: (1, n) token ids.
        prefill_chunk: tokens a forward pass takes at most; None sends the prompt whole.
    """
    global _process_is_cold  # noqa: PLW0603 - being cold is a state of the process
    if not _process_is_cold:
        return None
    _process_is_cold = False
    with FullCache()(bench.model) as new_cache:
        return time_generation(bench.model, prompt, new_cache, new_tokens=1, prefill_chunk=prefill_chunk).ttft_s


def _as_run(timing: Timing) -> Run:
    """A timing as records hold it."""
    return Run(ttft_s=timing.ttft_s, gaps_s=timing.gaps_s)

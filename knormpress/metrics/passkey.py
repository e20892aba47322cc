"""Finding a number in a long text, which perplexity hardly notices: the passkey test.

The task of Mohtashami and Jaggi, NeurIPS 2023 (arXiv 2305.16300), as the paper on key norms uses it: sentences that say
nothing, a number among them, and at the end the question for it. Here the question comes after the cache was pruned, so
that nothing of the prompt could be kept on its account.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from knormpress.errors import KnormError
from knormpress.metrics.forward import Method, filled_cache, prefill

__all__ = ["PasskeyPrompt", "PasskeyScore", "passkey_prompts", "read_key", "score_passkey"]

_INTRODUCTION = "Somewhere in this long and idle text stands a number that matters. Find it and keep it in mind.\n"
_NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
_QUESTION = "\nWhat is the pass key? The pass key is"

_SETS: dict[str, tuple[tuple[str, ...], tuple[int, ...], tuple[float, ...]]] = {
    "calibration": (
        (
            "The river is wide.",
            "The dog is asleep.",
            "A cart goes by.",
            "The bread is warm.",
            "Snow lies on the hill.",
            "The door is open.",
            "We walk home.",
            "The lamp is lit.",
            "Rain falls again.",
            "The road is long.",
        ),
        (580, 780, 980, 1180),
        (0.04, 0.16, 0.28, 0.4, 0.52, 0.64, 0.76, 0.88, 0.96),
    ),
    "held-out": (
        (
            "The grass is green.",
            "The sky is blue.",
            "The sun is yellow.",
            "Here we go.",
            "There and back again.",
            "A boat comes in.",
            "The field is empty.",
            "The wind is cold.",
            "Leaves turn red.",
            "The moon is up.",
        ),
        (660, 860, 1060, 1300),
        (0.02, 0.1, 0.22, 0.34, 0.46, 0.58, 0.7, 0.82, 0.92),
    ),
}
"""Sentences, lengths in tokens and depths as shares of the text; of the two sets, none is in both."""

_SENTENCES = 6


@dataclass(frozen=True)
class PasskeyPrompt:
    """Token ids: the text (1, n), the question (1, q) and the key (k,)."""

    text: Tensor
    question: Tensor
    key: Tensor

    @property
    def fed(self) -> Tensor:
        """(1, q + k - 1): the question and all of the key but its last token."""
        return torch.cat([self.question, self.key[None, :-1]], dim=-1)


@dataclass(frozen=True)
class PasskeyScore:
    """``nll``: negative log-likelihood of the whole key, in nats; ``found``: whether greedy decoding spells it."""

    nll: float
    found: bool


def passkey_prompts(
    tokenizer: Any, start: Tensor, *, count: int, which: Literal["calibration", "held-out"], device: torch.device
) -> list[PasskeyPrompt]:
    """``count`` prompts, the same in every run; the two sets share no key, no sentence, no depth and no length.

    Args:
        tokenizer: the model's.
        start: (0 or 1,) the token that the model's texts begin with.
        count: at least 1.
        which: the set.
        device: where the ids go.

    Raises:
        KnormError: ``count`` is below 1.
    """
    if count < 1:
        raise KnormError(f"asked for {count} passkey prompts; wanted at least 1")

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    sentences, lengths, depths = _SETS[which]
    draw = random.Random(which)
    prompts = []
    for index in range(count):
        # Even keys calibrate, odd ones are held out.
        key = str(2 * draw.randrange(5_000, 50_000) + (which == "held-out"))
        filler = encode(" ".join(draw.sample(sentences, _SENTENCES)) + " ")
        head, needle = encode(_INTRODUCTION), encode(_NEEDLE.format(key=key))
        room = lengths[index % len(lengths)] - len(start) - len(head) - len(needle)
        body = list(islice(cycle(filler), room))
        at = round(depths[index % len(depths)] * room)
        question, answered = encode(_QUESTION), encode(f"{_QUESTION} {key}")
        same = next((i for i, (a, b) in enumerate(zip(question, answered, strict=False)) if a != b), len(question))
        text = torch.cat([start, torch.tensor(head + body[:at] + needle + body[at:])])
        prompts.append(
            PasskeyPrompt(
                text=text[None].to(device),
                question=torch.tensor(answered[:same])[None].to(device),
                key=torch.tensor(answered[same:]).to(device),
            )
        )
    return prompts


def read_key(model: PreTrainedModel, prompt: PasskeyPrompt, cache: Cache) -> PasskeyScore:
    """Ask ``cache``, which holds the prompt's text, for the key.

    One pass over question and key: greedy decoding spells the key just if each of its tokens is the first choice behind
    the ones before it.
    """
    with torch.inference_mode():
        logits = model(
            input_ids=prompt.fed, past_key_values=cache, use_cache=True, logits_to_keep=len(prompt.key)
        ).logits[0]
    log_probabilities = logits.float().log_softmax(dim=-1)
    nll = -log_probabilities.gather(-1, prompt.key[:, None]).sum()
    return PasskeyScore(float(nll), bool((logits.argmax(dim=-1) == prompt.key).all()))


def score_passkey(
    model: PreTrainedModel, prompt: PasskeyPrompt, baseline: Method, candidates: Sequence[Method]
) -> tuple[PasskeyScore, list[PasskeyScore]]:
    """Ask the full cache and each candidate's, filled with the same text, for the key; one prefill serves all that can.

    Args:
        model: a causal language model.
        prompt: see ``passkey_prompts``.
        baseline: makes the full cache.
        candidates: the methods to ask.
    """
    scores = []
    with torch.inference_mode():
        with baseline(model) as new_cache:
            full = new_cache()
            prefill(model, prompt.text, full)
        for candidate in candidates:
            with filled_cache(model, candidate, prompt.text, full) as cache:
                scores.append(read_key(model, prompt, cache))
        # Last, as the question goes into it.
        return read_key(model, prompt, full), scores

"""The passkey test: find a number in a long text. Perplexity hardly measures this.

The task of Mohtashami and Jaggi, NeurIPS 2023 (arXiv 2305.16300), as the paper on key norms uses it: filler sentences
with a number among them, and a question for the number at the end. Here the question comes after pruning, so that it
can't influence which tokens are kept.
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
from knormpress.measure.prefill import filled_cache, prefill
from knormpress.methods.full import FullCache
from knormpress.methods.method import Method
from knormpress.progress import Progress, ticking
from knormpress.workload.bench import Bench

__all__ = [
    "PasskeyPrompt",
    "PasskeyScore",
    "ask_passkeys",
    "passkey_prompts",
    "prompts_for",
    "read_key",
    "score_passkey",
]

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
"""Sentences, lengths in tokens, and depths as shares of the text. The two sets have none of these in common."""

_SENTENCES = 6


@dataclass(frozen=True)
class PasskeyPrompt:
    """Token ids: the text (1, n), the question (1, q) and the key (k,)."""

    text: Tensor
    question: Tensor
    key: Tensor

    @property
    def fed(self) -> Tensor:
        """The question and the key without its last token (1, q + k - 1)."""
        return torch.cat([self.question, self.key[None, :-1]], dim=-1)


@dataclass(frozen=True)
class PasskeyScore:
    """``nll``: negative log-likelihood of the whole key, in nats; ``found``: whether greedy decoding gives the key."""

    nll: float
    found: bool


def passkey_prompts(
    tokenizer: Any, start: Tensor, *, count: int, which: Literal["calibration", "held-out"], device: torch.device
) -> list[PasskeyPrompt]:
    """Make ``count`` prompts, the same in every run; the two sets share no key, sentence, depth or length.

    Args:
        tokenizer: the model's tokenizer.
        start: (0 or 1,) the token that begins every text of the model, if any.
        count: number of prompts, at least 1.
        which: the set.
        device: the device for the token ids.

    Raises:
        KnormError: ``count`` is below 1.
    """
    if count < 1:
        raise KnormError(f"got {count} passkey prompts; wanted at least 1")

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    sentences, lengths, depths = _SETS[which]
    draw = random.Random(which)
    prompts = []
    for index in range(count):
        # Calibration keys are even, held-out keys are odd.
        key = str(2 * draw.randrange(5_000, 50_000) + (which == "held-out"))
        filler = encode(" ".join(draw.sample(sentences, _SENTENCES)) + " ")
        head, needle = encode(_INTRODUCTION), encode(_NEEDLE.format(key=key))
        room = lengths[index % len(lengths)] - len(start) - len(head) - len(needle)
        body = list(islice(cycle(filler), room))
        place = round(depths[index % len(depths)] * room)
        question, answered = encode(_QUESTION), encode(f"{_QUESTION} {key}")
        same = next((i for i, (a, b) in enumerate(zip(question, answered, strict=False)) if a != b), len(question))
        text = torch.cat([start, torch.tensor(head + body[:place] + needle + body[place:])])
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

    One pass over question and key is enough: greedy decoding gives the key exactly if each of its tokens is the first
    choice after the tokens before it.
    """
    with torch.inference_mode():
        logits = model(
            input_ids=prompt.fed, past_key_values=cache, use_cache=True, logits_to_keep=len(prompt.key)
        ).logits[0]
    log_probabilities = logits.float().log_softmax(dim=-1)
    nll = -log_probabilities.gather(-1, prompt.key[:, None]).sum()
    return PasskeyScore(float(nll), bool((logits.argmax(dim=-1) == prompt.key).all()))


def score_passkey(
    model: PreTrainedModel, prompt: PasskeyPrompt, methods: Sequence[Method]
) -> tuple[PasskeyScore, list[PasskeyScore]]:
    """Ask the full cache and each method's cache, filled with the same text, for the key; share prefills if possible.

    Args:
        model: a causal language model.
        prompt: see ``passkey_prompts``.
        methods: the methods to ask.
    """
    scores = []
    with torch.inference_mode():
        with FullCache()(model) as new_cache:
            full = new_cache()
            prefill(model, prompt.text, full)
        for method in methods:
            with filled_cache(model, method, prompt.text, full) as cache:
                scores.append(read_key(model, prompt, cache))
        # The full cache comes last, since the question is added to it.
        return read_key(model, prompt, full), scores


def prompts_for(bench: Bench, *, count: int, which: Literal["calibration", "held-out"]) -> list[PasskeyPrompt]:
    """Make ``count`` prompts with ``passkey_prompts``, on the model's device.

    Raises:
        KnormError: the model has too few positions.
    """
    prompts = passkey_prompts(bench.tokenizer, bench.start, count=count, which=which, device=bench.model.device)
    longest = max(prompt.text.shape[-1] + prompt.fed.shape[-1] for prompt in prompts)
    if bench.positions is not None and longest > bench.positions:
        raise KnormError(
            f"{bench.model_info.name} is made for {bench.positions} positions, but the passkey prompts take "
            f"{longest}; leave them out (for knormpress tune: --target-passkey none), or use another model"
        )
    return prompts


def ask_passkeys(
    bench: Bench, methods: Sequence[Method], count: int, progress: Progress | None = None
) -> list[tuple[int, int]]:
    """Ask each method's cache for ``count`` held-out passkeys.

    Args:
        bench: the model.
        methods: the methods to ask.
        count: number of prompts, at least 1.
        progress: gets a step for each prompt.

    Returns:
        For each method: how many passkeys it found, and how many the full cache found; only the latter count.
    """
    if not methods:
        return []
    prompts = prompts_for(bench, count=count, which="held-out")
    tick = ticking(progress or Progress(), count, "unseen passkeys")
    counts, known = [0] * len(methods), 0
    for prompt in prompts:
        full, scores = score_passkey(bench.model, prompt, methods)
        if full.found:
            known += 1
            counts = [count + score.found for count, score in zip(counts, scores, strict=True)]
        tick()
    return [(count, known) for count in counts]

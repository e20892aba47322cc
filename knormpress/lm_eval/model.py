"""The model ``knormpress`` of lm-evaluation-harness: every answer is scored behind a pruned cache.

The harness's own model for transformers sends context and continuation in one forward pass, so that nothing has been
pruned when the continuation is scored. Here the context is prefilled and pruned first. Its last token is fed after
that, with the continuation, since the prediction that a prefill ends with is still that of the full cache. Tokens,
truncation, stop sequences and answers are the harness's own: ``KnormLM`` is its ``HFLM`` in all else.
"""

from __future__ import annotations

import bisect
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import Cache, PreTrainedModel

from knormpress.errors import KnormError
from knormpress.measure.prefill import prefill, slots_of
from knormpress.measure.retrieval import read_answers
from knormpress.methods.knorm import KnormPress
from knormpress.methods.method import Method, caches_of, describe_method, policy_of
from knormpress.methods.registry import make_method
from knormpress.progress import Progress, ticking
from knormpress.workload.device_map import DeviceMap
from knormpress.workload.devices import input_device, resolve
from knormpress.workload.models import load_model
from knormpress.workload.tasks.haystack import Haystack, Question

__all__ = ["LAST_EXAMPLE", "KnormLM", "quiet"]

LAST_EXAMPLE = "\n\n"
"""What stands before the question of a task that generates: the blank line behind the last example."""

# Tokens of a rolling window in one pass: as often as decoding prunes.
_ROLLED = 64


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off what the harness logs below an error, such as that it can't load a model that is loaded."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


_Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("knormpress")
class KnormLM(HFLM):  # type: ignore[misc]
    """A causal language model whose answers come from behind a pruned cache.

    Args:
        pretrained: a loaded model, with its ``tokenizer`` among ``options``; or as for ``workload.models.load_model``.
        keep_ratio, prune_after, skip_layers: see ``KnormPress``.
        plan: in place of a keep ratio, a plan of ``knormpress tune``, or ``"auto"`` for the one that comes with
            KnormPress for the model.
        method: a name, see ``methods.registry.make_method``; or a method, which has its policy.
        split: the text that a question begins with, at its last occurrence: what stands before it is pruned, and
            nothing of the question is in the cache then. Unless given, tasks that generate split at the last blank
            line, and of other tasks the whole context is pruned.
        prefill_chunk: the most tokens of a context in one forward pass; None sends it in one pass.
        batch_size: the most continuations behind one context that are scored in one pass.
        device, device_map, dtype: see ``workload.devices.resolve``, ``DeviceMap.read`` and ``load_model``; not for a
            loaded model. A map is used in place of the device.
        progress: is told of each context.
        options: any other option of the harness's ``HFLM``, such as ``max_length``.

    Raises:
        KnormError: the model can't be loaded, there is no such method or plan, or a value is out of its range.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel | None = None,
        *,
        keep_ratio: float | None = None,
        plan: str | Path | None = None,
        method: str | Method = "knorm",
        prune_after: int = 512,
        skip_layers: Sequence[int] = (0,),
        split: str | None = None,
        prefill_chunk: int | None = None,
        batch_size: int | str | None = 1,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "float32",
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        if split == "":
            raise KnormError('split is empty; wanted the text that a question begins with, such as "Question:"')
        rows = "1" if batch_size is None else str(batch_size)
        if not rows.isdigit() or int(rows) < 1:
            raise KnormError(f"batch_size is {batch_size!r}; wanted a whole number of at least 1")
        if pretrained is None or isinstance(pretrained, str):
            place = DeviceMap.read(device_map) if device_map else resolve(device or "auto")
            loaded = load_model(pretrained, device=place, dtype=dtype)
            pretrained, options = loaded.model, {"tokenizer": loaded.tokenizer} | options
        options.pop("max_batch_size", None)
        with quiet():
            # One prompt at a time is generated from, as each has a text of its own before its question.
            super().__init__(pretrained=pretrained, batch_size=1, **options)
        # Where weights wait on disk, the model's own device is none.
        self._device = input_device(pretrained)
        if isinstance(method, str):
            method = make_method(method, _press(pretrained, keep_ratio, plan, prune_after, skip_layers))
        self.method, self.split, self.prefill_chunk = method, split, prefill_chunk
        self.contexts, self.pruned = 0, 0
        self._rows, self._progress = int(rows), progress or Progress()
        self._new_cache: Callable[[], Cache]
        self._is_open = False
        self._held: tuple[tuple[int, ...], Cache] | None = None

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer the prompts of ``requests``. ``disable_tqdm`` has no use, as ``progress`` is told.

        Raises:
            KnormError: a prompt does not hold the text that its question begins with, or no context was pruned.
        """
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            marker, prompt = self.split or LAST_EXAMPLE, str(request.args[0])
            _expect_in(marker, prompt)
            groups.setdefault(prompt.rpartition(marker)[0], []).append(place)
        answers = [""] * len(requests)
        with self._answering(len(requests), "answering prompts") as tick:
            for places in groups.values():
                texts = super().generate_until([requests[place] for place in places], disable_tqdm=True)
                for place, text in zip(places, texts, strict=True):
                    answers[place] = text
                    tick()
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of the text of each of ``requests``; ``disable_tqdm`` has no use.

        A text is read in passes of 64 tokens, and the cache is pruned after each, so that what follows is scored
        behind it. Texts that are longer than the model's positions are cut as the harness cuts them.

        Raises:
            KnormError: no text was pruned.
        """
        with self._answering(len(requests), "scoring texts"):
            scores: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return scores

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, in nats, and whether greedy decoding gives it."""
        groups: dict[tuple[int, ...], list[tuple[int, Question | None, Tensor]]] = {}
        for place, (strings, context, continuation) in enumerate(requests):
            if self.split is not None and strings is not None:
                _expect_in(self.split, strings[0])
            # As in the harness: what is too long loses its beginning.
            whole = torch.tensor((context + continuation)[-(self.max_length + 1) :], device=self.device)
            known = len(whole) - len(continuation)
            # A rolling window has no context to prune: it is pruned while it is read.
            start = 0 if strings is None else self._text_length(whole[:known].tolist())
            question = Question("", whole[None, start:known], whole[known:], (), 0.0) if strings is not None else None
            groups.setdefault(tuple(whole[:start].tolist()), []).append((place, question, whole))
        found = [(0.0, False)] * len(requests)
        with self._answering(len(requests), "scoring continuations") as tick:
            for text, group in groups.items():
                # A question behind no text at all has a cache of its own, since there is nothing to share.
                rows = self._rows if text else 1
                for first in range(0, len(group), rows):
                    part = group[first : first + rows]
                    for (place, _, _), answer in zip(part, self._scored(text, part), strict=True):
                        found[place] = answer
                        if requests[place][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[place][0], answer)
                        tick()
        return found

    def _scored(
        self, text: tuple[int, ...], group: Sequence[tuple[int, Question | None, Tensor]]
    ) -> list[tuple[float, bool]]:
        questions = tuple(question for _, question, _ in group if question is not None)
        if not questions:
            return [self._rolled(whole) for _, _, whole in group]
        haystack = Haystack("", 0, torch.tensor([text], device=self.device), questions, in_turn=False)
        return [(-answer.nll, answer.found) for answer in read_answers(self.model, haystack, self._filled(text))]

    def _rolled(self, whole: Tensor) -> tuple[float, bool]:
        """Score all tokens of ``whole`` (n,) but the first, in passes behind which the cache is pruned."""
        cache, score, greedy = self._new_cache(), 0.0, True
        for fed, wanted in zip(whole[:-1].split(_ROLLED), whole[1:].split(_ROLLED), strict=True):
            logits = self.model(input_ids=fed[None], past_key_values=cache, use_cache=True).logits[0].float()
            score += float(logits.log_softmax(dim=-1).gather(-1, wanted[:, None]).sum())
            greedy = greedy and bool((logits.argmax(dim=-1) == wanted).all())
        self._count(cache, len(whole) - 1)
        return score, greedy

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Generate behind the text of ``context`` (1, n), whose question is fed after the pruning."""
        ids = context[0].tolist()
        text = tuple(ids[: self._text_length(ids, self.split or LAST_EXAMPLE)])
        cache = copy.deepcopy(self._filled(text))
        generated: Tensor = super()._model_generate(context, max_length, stop, past_key_values=cache, **options)
        return generated

    def _text_length(self, ids: list[int], marker: str | None = None) -> int:
        """How many of the prompt's ``ids`` are pruned: those before the question, and never the last one."""
        marker = marker or self.split
        if marker is None:
            return len(ids) - 1

        # The question begins with the last token from which on the marker is whole.
        def lacks(place: int) -> bool:
            return marker not in self.tokenizer.decode(ids[place:], clean_up_tokenization_spaces=False)

        return max(0, bisect.bisect_left(range(len(ids)), True, key=lacks) - 1)

    def _filled(self, text: tuple[int, ...]) -> Cache:
        """A cache that holds ``text``, pruned. It is kept for the next question, so copy it before it is used."""
        if self._held is None or self._held[0] != text:
            cache = self._new_cache()
            if text:
                prefill(self.model, torch.tensor([text], device=self.device), cache, chunk=self.prefill_chunk)
            self._count(cache, len(text))
            self._held = text, cache
        return self._held[1]

    def _count(self, cache: Cache, seen: int) -> None:
        self.contexts += 1
        stored = [
            slots
            for slots, layer in zip(slots_of(cache), cache.layers, strict=True)
            if not getattr(layer, "is_sliding", False)
        ]
        self.pruned += any(0 < slots < seen for slots in stored)

    @contextmanager
    def _answering(self, requests: int, doing: str) -> Iterator[Callable[[], None]]:
        """Let the method make caches inside the context; check behind it that something was pruned."""
        if self._is_open:  # a window of a rolling text
            yield lambda: None
            return
        policy = policy_of(self.method)
        contexts, pruned = self.contexts, self.pruned
        with torch.inference_mode(), caches_of(self.method, self.model) as self._new_cache:
            self._is_open = True
            try:
                yield ticking(self._progress, requests, doing)
            finally:
                self._is_open, self._held = False, None
        if requests and policy is not None and policy.drops and self.pruned == pruned:
            raise KnormError(
                f"{describe_method(self.method)} pruned none of {self.contexts - contexts} contexts, so these would be "
                f"the figures of the full cache; use longer contexts (more examples) or a prune_after below "
                f"{policy.prune_after}"
            )


def _expect_in(marker: str, prompt: str) -> None:
    """Check that a question can be told from what stands before it."""
    if marker not in prompt:
        what = "no blank line" if marker == LAST_EXAMPLE else f"no {marker!r}"
        raise KnormError(
            f"the prompt {prompt[:40]!r}... has {what}, so that nothing stands before its question to be pruned; add "
            "examples (num_fewshot), or give as split the text that a question begins with"
        )


def _press(
    model: Any, keep_ratio: float | None, plan: str | Path | None, prune_after: int, skip_layers: Sequence[int]
) -> KnormPress:
    if (keep_ratio is None) == (plan is None):
        given = "neither is" if plan is None else "both are"
        raise KnormError(f"keep_ratio and plan: {given} given; wanted one of them, such as keep_ratio 0.5 or plan auto")
    if keep_ratio is not None:
        return KnormPress(keep_ratio, prune_after, tuple(skip_layers))
    return KnormPress.for_model(model) if str(plan) == "auto" else KnormPress.from_plan(str(plan), model)

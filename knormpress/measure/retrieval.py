"""Ask for what stands in a text, behind a pruned cache. Perplexity hardly measures this.

A text is prefilled and pruned; the question comes after that, so that nothing is kept because of it. One pass over
question and answer is enough: greedy decoding gives the answer exactly if each of its tokens is the first choice after
the tokens before it. What a cache drops between question and answer, while it decodes, is not in this and comes on top.
What the full cache does not answer can't be lost, and is not asked of the others.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from knormpress.cache.cache import KnormCache
from knormpress.errors import KnormError
from knormpress.measure.prefill import Way, expect_pruned, filled_cache, prefill, slots_of
from knormpress.methods.full import FullCache
from knormpress.methods.method import Method, caches_of, describe_method, policy_of
from knormpress.policy.policy import Policy
from knormpress.records.retrieval import Answer, Item, Retrieval
from knormpress.workload.tasks.haystack import Haystack, Question

__all__ = ["measure_retrieval", "read_answers"]


def measure_retrieval(
    model: PreTrainedModel,
    methods: Sequence[Method],
    haystacks: Sequence[Haystack],
    *,
    prefill_chunk: int | None = None,
    ways: Sequence[Way] | None = None,
    policies: Sequence[Policy | None] | None = None,
    after_text: Callable[[], None] = lambda: None,
) -> list[Retrieval]:
    """Ask the full cache and each method's cache; returns one result for each method.

    Args:
        model: a causal language model.
        methods: the methods to ask; they share each text's prefill where they can.
        haystacks: texts and questions, see ``workload.tasks.haystack``.
        prefill_chunk: the most tokens of a text in one forward pass; None sends it in one pass.
        ways: how each method's cache takes a text; as the full cache does unless given.
        policies: the policy that each method should follow; its own ``press`` unless given.
        after_text: called after each text.

    Raises:
        KnormError: a method that should drop tokens holds all of them, or answers are NaN.
    """
    asked: dict[str, int] = {}
    items: list[list[Item]] = [[] for _ in methods]
    wanted = list(policies or map(policy_of, methods))
    ways = ways or [Way(prefill_chunk)] * len(methods)
    for haystack in haystacks:
        asked[haystack.task] = asked.get(haystack.task, 0) + len(haystack.questions)
        with torch.inference_mode():
            with caches_of(FullCache(), model) as new_cache:
                full = new_cache()
                prefill(model, haystack.ids, full, chunk=prefill_chunk)
            known = _answers(model, haystack, full, FullCache())
            if any(answer.found for answer in known):
                held = slots_of(full)
                for method, way, policy, own in zip(methods, ways, wanted, items, strict=True):
                    with filled_cache(model, method, haystack.ids, full, way=way) as cache:
                        expect_pruned(method, policy, cache, held)
                        own.extend(_items(haystack, known, _answers(model, haystack, cache, method)))
        after_text()
    return [Retrieval(asked=asked, items=tuple(own)) for own in items]


def read_answers(model: PreTrainedModel, haystack: Haystack, cache: Cache) -> list[Answer]:
    """Ask ``cache``, which holds the text of ``haystack``, every question; the cache itself is not changed.

    Questions that are not asked in turn come as the rows of one batch where the cache is one of transformers' or ours:
    a row of a batch is what it is alone. Any other cache, and one with layers that can't be repeated (such as linear
    attention), is copied for each question.
    """
    if haystack.in_turn:
        return _in_turn(model, haystack.questions, copy.deepcopy(cache))
    repeats = all(hasattr(layer, "batch_repeat_interleave") for layer in cache.layers)
    if type(cache) not in (DynamicCache, KnormCache) or not repeats:
        return [_in_turn(model, [question], copy.deepcopy(cache))[0] for question in haystack.questions]
    rows = copy.deepcopy(cache)
    if len(haystack.questions) > 1:
        rows.batch_repeat_interleave(len(haystack.questions))
    fed = [torch.cat([question.ids[0], question.answer[:-1]]) for question in haystack.questions]
    # Shorter rows end in padding, which nothing in them attends to.
    ids = torch.nn.utils.rnn.pad_sequence(fed, batch_first=True)
    first = min(question.ids.shape[-1] for question in haystack.questions) - 1
    logits = model(input_ids=ids, past_key_values=rows, use_cache=True, logits_to_keep=ids.shape[-1] - first).logits
    starts = [question.ids.shape[-1] - 1 - first for question in haystack.questions]
    return [
        _answer(logits[row, start : start + len(question.answer)], question)
        for row, (start, question) in enumerate(zip(starts, haystack.questions, strict=True))
    ]


def _in_turn(model: PreTrainedModel, questions: Sequence[Question], cache: Cache) -> list[Answer]:
    """Ask one after another; each right answer is added to the cache, whatever the model would have said."""
    answers = []
    before = questions[0].answer[:0]
    for question in questions:
        fed = torch.cat([before, question.ids[0], question.answer[:-1]])[None]
        logits = model(
            input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=len(question.answer)
        ).logits[0]
        answers.append(_answer(logits, question))
        before = question.answer[-1:]
    return answers


def _answer(logits: Tensor, question: Question) -> Answer:
    """Read the logits (a, V) before each token of the answer."""
    answer, logits = question.answer.cpu(), logits.float().cpu()
    log_probabilities = logits.log_softmax(dim=-1)
    chosen = None
    for other in question.others:
        length = min(len(other), len(answer))
        differing = (other.cpu()[:length] != answer[:length]).nonzero()
        if len(differing):
            place = int(differing[0])
            preferred = bool(logits[place, answer[place]] > logits[place, int(other[place])])
            chosen = preferred if chosen is None else chosen and preferred
    return Answer(
        nll=-float(log_probabilities.gather(-1, answer[:, None]).sum()),
        found=bool((logits.argmax(dim=-1) == answer).all()),
        chosen=chosen,
    )


def _answers(model: PreTrainedModel, haystack: Haystack, cache: Cache, method: Method) -> list[Answer]:
    answers = read_answers(model, haystack, cache)
    if not all(math.isfinite(answer.nll) for answer in answers):
        raise KnormError(
            f"the model's logits are NaN or infinite through the cache of {describe_method(method)}, so nothing can be "
            "found; try dtype float32"
        )
    return answers


def _items(haystack: Haystack, known: Sequence[Answer], answers: Sequence[Answer]) -> list[Item]:
    return [
        Item(
            task=haystack.task,
            text=haystack.number,
            name=question.name,
            length=haystack.ids.shape[-1],
            depth=question.depth,
            tokens=len(question.answer),
            full=full,
            candidate=answer,
        )
        for question, full, answer in zip(haystack.questions, known, answers, strict=True)
        if full.found
    ]

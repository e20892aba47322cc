"""Haystacks whose answers are what a model says: a model with fresh weights has learned nothing and would find none."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from knormpress.measure.prefill import prefill
from knormpress.workload.tasks.haystack import Haystack


def said(model: PreTrainedModel, fed: Tensor, count: int) -> Tensor:
    """The ``count`` tokens (count,) that greedy decoding gives after ``fed`` (1, n), token by token."""
    cache, tokens = DynamicCache(config=model.config), []
    with torch.inference_mode():
        token = prefill(model, fed, cache).argmax(-1)
        for _ in range(count):
            tokens.append(int(token))
            token = prefill(model, token[None], cache).argmax(-1)
    return torch.tensor(tokens)


def answered(model: PreTrainedModel, haystack: Haystack, count: int = 3) -> Haystack:
    """``haystack``, but the answer to each of its questions is what ``model`` says there, ``count`` tokens of it."""
    questions, before = [], haystack.ids
    for question in haystack.questions:
        fed = torch.cat([before, question.ids], dim=-1)
        answer = said(model, fed, count)
        questions.append(replace(question, answer=answer))
        if haystack.in_turn:
            before = torch.cat([fed, answer[None]], dim=-1)
    return replace(haystack, questions=tuple(questions))

"""Make texts of an exact length in tokens, with something to find in them and questions about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from knormpress.errors import KnormError
from knormpress.workload.bench import Bench
from knormpress.workload.tasks.counting import common_word, frequent_words, variables
from knormpress.workload.tasks.draft import Asked, Task
from knormpress.workload.tasks.draw import LENGTHS, Draw, Which
from knormpress.workload.tasks.instruction import instruction
from knormpress.workload.tasks.lists import json_object, lines_of_needles, lines_of_uuids, listed
from knormpress.workload.tasks.needles import multi_key, multi_query, multi_value, passkey, single

__all__ = ["DEFAULT_TASKS", "TASKS", "Haystack", "Question", "haystacks", "named_tasks"]

_RULER = "RULER, arXiv 2404.06654"

TASKS = {
    task.name: task
    for task in (
        Task("single-prose", single, "prose", source=_RULER),
        Task("single-filler", single, "filler", source=_RULER),
        Task("multikey-prose", multi_key, "prose", source=_RULER),
        Task("multikey-filler", multi_key, "filler", source=_RULER),
        Task("multivalue-prose", multi_value, "prose", source=_RULER),
        Task("multivalue-filler", multi_value, "filler", source=_RULER),
        Task("multiquery-prose", multi_query, "prose", source=_RULER),
        Task("multiquery-filler", multi_query, "filler", source=_RULER),
        Task("list", listed, "prose"),
        Task("json", json_object, "prose"),
        Task("needle-lines", lines_of_needles, "lines", source=f"{_RULER}, multi-key 2"),
        Task("uuid-lines", lines_of_uuids, "lines", source=f"{_RULER}, multi-key 3"),
        Task("variables", variables, "filler", source=_RULER),
        Task("common-word", common_word, "lines", source=_RULER),
        Task("frequent-words", frequent_words, "lines", source=_RULER),
        Task("instruction", instruction, "prose", source="arXiv 2510.00231"),
        Task("turns", multi_key, "prose", in_turn=True, source="SCBench, arXiv 2412.10319"),
        Task("passkey", passkey, "filler", source="arXiv 2305.16300"),
    )
}
"""The tasks by name."""

# How full a text of lines may be: lines differ in length, and it must not be longer than was asked for.
_SHARES = (0.95, 0.85, 0.75, 0.6, 0.45)

# How far from its depth a needle may be for the sake of whole sentences, as a share of the text.
_NEAR = 0.05

DEFAULT_TASKS = ("multikey-prose", "list", "json", "passkey")
"""What is asked unless tasks are named."""


@dataclass(frozen=True)
class Question:
    """A question as token ids.

    Args:
        name: what is asked for.
        ids: (1, q) the question.
        answer: (a,) the answer, which follows it.
        others: other values that stand in the text, (a',) each, in place of the answer.
        depth: where the answer stands, as a share of the text.
    """

    name: str
    ids: Tensor
    answer: Tensor
    others: tuple[Tensor, ...]
    depth: float


@dataclass(frozen=True)
class Haystack:
    """A text as token ids (1, n), and the questions about it; see ``Task`` for ``in_turn``."""

    task: str
    number: int
    ids: Tensor
    questions: tuple[Question, ...]
    in_turn: bool


def named_tasks(names: Sequence[str]) -> tuple[Task, ...]:
    """The tasks called ``names``; ``"all"`` stands for all of them.

    Raises:
        KnormError: there is no such task.
    """
    chosen: dict[str, Task] = {}
    for name in names:
        if name != "all" and name not in TASKS:
            raise KnormError(f"there is no task {name!r}; wanted all, or some of {', '.join(TASKS)}")
        chosen |= TASKS if name == "all" else {name: TASKS[name]}
    return tuple(chosen.values())


def haystacks(
    bench: Bench,
    tasks: Sequence[str] = DEFAULT_TASKS,
    *,
    count: int = 4,
    which: Which = "held-out",
    lengths: Sequence[int] | None = None,
    seed: int = 0,
) -> list[Haystack]:
    """Make ``count`` texts for each task, the same in every run.

    The two sets share no document, name, value, wording, depth or length.

    Args:
        bench: the model, whose tokenizer is used, and the text, whose documents are the prose.
        tasks: names of tasks, see ``named_tasks``.
        count: texts for each task, at least 1.
        which: the set.
        lengths: lengths in tokens, in turn; those of the set unless given.
        seed: another seed gives other texts.

    Raises:
        KnormError: there is no such task, the text is too short for the prose, the model has too few positions, or its
            tokenizer splits an answer differently in text and question.
    """
    if count < 1:
        raise KnormError(f"got {count} texts for each task; wanted at least 1")
    chosen, lengths = named_tasks(tasks), tuple(lengths or LENGTHS[which])
    prose = _Prose(bench, which, count, max(lengths)) if any(task.body == "prose" for task in chosen) else None
    made = []
    for task in chosen:
        for number in range(count):
            # Texts of tasks in prose share documents, but not their lengths: each task begins with another length.
            length = lengths[(number + list(TASKS).index(task.name)) % len(lengths)]
            made.append(_make(bench, task, partial(Draw, which, task.name, number, seed), length, prose))
    _check_positions(bench, made)
    return made


def _make(bench: Bench, task: Task, draws: Callable[[], Draw], length: int, prose: _Prose | None) -> Haystack:
    encode = _encoder(bench.tokenizer)
    room = length - len(bench.start)
    for share in _SHARES:
        draw = draws()
        draft = task.write(draw, _fitting(share * room, encode))
        head, needles = encode(draft.head), [(depth, encode(needle)) for depth, needle in draft.needles]
        left = room - len(head) - sum(len(needle) for _, needle in needles)
        if left >= 0:
            break
    else:
        raise KnormError(f"{length} tokens are too few for {task.name}; use longer texts")
    body: list[int] = []
    if task.body == "prose" and prose is not None:
        body = prose.part(draw.number, left)
    elif task.body == "filler":
        body = list(islice(cycle(encode(draw.filler())), left))
    ids = head + _hidden(body, needles, bench.tokenizer)
    text = torch.cat([bench.start, torch.tensor(ids)])[None].to(bench.device)
    questions = tuple(_question(task, asked, ids, encode, bench) for asked in draft.asked)
    return Haystack(task.name, draw.number, text, questions, task.in_turn)


def _fitting(room: float, encode: Callable[[str], list[int]]) -> Callable[[str], int]:
    return lambda line: max(4, int(room / len(encode(line))))


def _hidden(body: list[int], needles: Sequence[tuple[float, list[int]]], tokenizer: Any) -> list[int]:
    """``body`` with each needle at its depth: after the nearest end of a sentence or, if none is near, of a line."""
    written = {token: tokenizer.decode([token]) for token in set(body)}
    ends = (
        {token for token, text in written.items() if text.rstrip().endswith((".", "!", "?"))},
        {token for token, text in written.items() if text.endswith("\n")},
    )
    breaks = [[place + 1 for place, token in enumerate(body) if token in kind] for kind in ends]
    ids, done = [], 0
    for depth, needle in needles:
        wanted = depth * len(body)
        nearest = (min(places, key=lambda place: abs(place - wanted)) for places in breaks if places)
        place = next((place for place in nearest if abs(place - wanted) <= _NEAR * len(body)), round(wanted))
        place = max(place, done)
        ids += body[done:place] + needle
        done = place
    return ids + body[done:]


def _question(task: Task, asked: Asked, text: list[int], encode: Callable[[str], list[int]], bench: Bench) -> Question:
    """The question as token ids, split from its answer where the tokenizer splits them.

    Raises:
        KnormError: there is no such split, or the text holds the answer in other tokens.
    """
    question = encode(asked.question)

    def answer(written: str) -> list[int]:
        together = encode(asked.question + written)
        same = next((i for i, pair in enumerate(zip(question, together, strict=False)) if pair[0] != pair[1]), None)
        return together[len(question) if same is None else same :]

    ids = answer(asked.answer)
    begins = encode(asked.question + asked.answer)[: -len(ids) or None]
    # Of an answer in several parts, each part stands in the text by itself.
    first = answer(asked.answer.partition(",")[0])
    if not ids or bench.tokenizer.decode(ids).strip() != asked.answer.strip() or not _holds(text, first):
        raise KnormError(
            f"the tokenizer of {bench.model_info.name} splits {asked.answer.strip()!r} differently in text and "
            f"question, so {task.name} can't be scored; leave it out, or use another model"
        )
    device = bench.device
    return Question(
        name=asked.name,
        ids=torch.tensor(begins)[None].to(device),
        answer=torch.tensor(ids).to(device),
        others=tuple(torch.tensor(answer(other)).to(device) for other in asked.others),
        depth=asked.depth,
    )


def _holds(text: list[int], part: list[int]) -> bool:
    return any(text[place : place + len(part)] == part for place in range(len(text) - len(part) + 1))


def _encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    return encode


def _check_positions(bench: Bench, made: Sequence[Haystack]) -> None:
    for haystack in made:
        asked = [question.ids.shape[-1] + len(question.answer) for question in haystack.questions]
        longest = haystack.ids.shape[-1] + (sum(asked) if haystack.in_turn else max(asked))
        if bench.positions is not None and longest > bench.positions:
            raise KnormError(
                f"{bench.model_info.name} is made for {bench.positions} positions, but {haystack.task} takes "
                f"{longest}; use shorter texts, leave the retrieval tasks out (sweep: --tasks none; tune: "
                "--target-retrieval none), or use another model"
            )


class _Prose:
    """The documents of one set: parts of its half of the text, whatever the number of parts."""

    def __init__(self, bench: Bench, which: Which, count: int, longest: int) -> None:
        half = len(bench.ids) // 2
        size = half // count
        if size < longest:
            raise KnormError(
                f"the text has {len(bench.ids):,} tokens, but {count} texts of {longest:,} tokens for each of two sets "
                f"need {2 * count * longest:,}; use a longer text, fewer texts or shorter ones"
            )
        first = half if which == "held-out" else 0
        self._parts = [bench.ids[start : start + size].tolist() for start in range(first, first + count * size, size)]

    def part(self, number: int, length: int) -> list[int]:
        """The first ``length`` tokens of document ``number``."""
        return self._parts[number][:length]

"""The texts of a search: some to find the plan on, others to measure it on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from knormpress.workload.bench import Bench
from knormpress.workload.tasks.haystack import Haystack, haystacks

__all__ = ["Texts", "split"]

# The text is cut into 14 documents; six of them, every other one, are used for calibration.
_CUT = 14
_SEEN = tuple(range(1, 12, 2))
_UNSEEN = tuple(number for number in range(_CUT) if number not in _SEEN)
CALIBRATION_SCORED, SCORED = 256, 256
TASKS = ("multikey-prose", "list", "json", "multikey-filler")
"""The tasks whose items a plan must still find, in prose and in filler."""
CALIBRATION_TEXTS, HELD_OUT_TEXTS = 4, 4
"""Texts for each task."""


@dataclass(frozen=True)
class Texts:
    """Documents whose ends are scored, and texts with questions.

    Args:
        documents: token ids (1, ``context`` + ``scored`` + 1) each.
        numbers: their places among all documents of the text.
        context: tokens before the first token that is fed.
        scored: predictions that are scored.
        asked: texts with questions; may be empty.
    """

    documents: tuple[Tensor, ...]
    numbers: tuple[int, ...]
    context: int
    scored: int
    asked: tuple[Haystack, ...]

    def to(self, device: torch.device) -> Texts:
        """The same texts with their token ids on ``device``."""
        asked = tuple(
            replace(
                haystack,
                ids=haystack.ids.to(device),
                questions=tuple(
                    replace(
                        question,
                        ids=question.ids.to(device),
                        answer=question.answer.to(device),
                        others=tuple(other.to(device) for other in question.others),
                    )
                    for question in haystack.questions
                ),
            )
            for haystack in self.asked
        )
        return replace(self, documents=tuple(ids.to(device) for ids in self.documents), asked=asked)

    @property
    def prompts(self) -> int:
        """How many prompts there are to read."""
        return len(self.documents) + len(self.asked)

    @property
    def sha256(self) -> str:
        """A hash of the token ids, which differs for another text or another tokenizer."""
        return hashlib.sha256(json.dumps([ids.tolist() for ids in self._tokens()]).encode()).hexdigest()

    def described(self, bench: Bench) -> dict[str, object]:
        """What a plan file says of these texts, cut from that of ``bench``."""
        return {
            "text": bench.text_info.name,
            "sha256": bench.text_info.sha256,
            "documents": len(self.numbers),
            "numbers": list(self.numbers),
            "cut_into": _CUT,
            "context": self.context,
            "scored": self.scored,
            "tasks": list(dict.fromkeys(haystack.task for haystack in self.asked)),
            "texts": len(self.asked),
        }

    def _tokens(self) -> Iterator[Tensor]:
        yield from self.documents
        for haystack in self.asked:
            yield haystack.ids
            for question in haystack.questions:
                yield from (question.ids, question.answer)


def split(bench: Bench, *, context: int, with_items: bool) -> tuple[Texts, Texts]:
    """Texts for calibration, and other texts for the final measurement; the documents are spread over the whole text.

    Args:
        bench: the model, and the text to cut.
        context: tokens of a document before the scored ones.
        with_items: whether there are texts with questions.

    Raises:
        KnormError: the text is too short, or the model has too few positions for the items.
    """
    documents = bench.documents(length=context + SCORED + 1, count=_CUT)
    short = context + CALIBRATION_SCORED + 1
    prompts = haystacks(bench, TASKS, count=CALIBRATION_TEXTS, which="calibration") if with_items else ()
    asked = haystacks(bench, TASKS, count=HELD_OUT_TEXTS, which="held-out") if with_items else ()
    return (
        Texts(tuple(documents[i][:, :short] for i in _SEEN), _SEEN, context, CALIBRATION_SCORED, tuple(prompts)),
        Texts(tuple(documents[i] for i in _UNSEEN), _UNSEEN, context, SCORED, tuple(asked)),
    )

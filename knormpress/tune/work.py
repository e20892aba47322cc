"""How much a search sends through the model: known before it starts, and the reason for when it must end."""

from __future__ import annotations

from dataclasses import dataclass

from knormpress.tune.texts import Texts

__all__ = ["Work"]

# Whole plans that a search tries before it looks around the best one.
_PLANS = 20
# A layer alone is measured on about a quarter of the texts, a ninth of the tokens that are fed behind them, through the
# layers from it on: half of them in the mean.
_FEW, _PART = 1 / 4, 1 / 18
# The report also scores each document without what is far: 192 tokens for every 64 that are scored.
_LOCAL = 3


@dataclass(frozen=True)
class Work:
    """Forward passes and tokens of a search and of the report that follows.

    Args:
        prompts, held_out: prompts that are read by the search and by the report.
        alone: measurements of one layer, at most.
        passes: forward passes.
        search_tokens: tokens that the search sends through all layers; a pass through half of them counts half.
        report_tokens: the same of the report.
        read_tokens: the part of ``search_tokens`` that are prompts.
    """

    prompts: int
    held_out: int
    alone: int
    policies: int
    passes: int
    search_tokens: int
    report_tokens: int
    read_tokens: int

    @classmethod
    def of(cls, calibration: Texts, held_out: Texts, *, alone: int, policies: int) -> Work:
        """The work of a search.

        Args:
            calibration, held_out: the texts of the search and of the report.
            alone: measurements of one layer, at most.
            policies: policies that the report measures.
        """
        read, asked, reported = _read(calibration), _fed(calibration), _fed(held_out) * (1 + policies)
        local = _LOCAL * held_out.scored * len(held_out.documents)
        return cls(
            prompts=calibration.prompts,
            held_out=held_out.prompts,
            alone=alone,
            policies=policies,
            passes=round(calibration.prompts * (2 + _FEW * alone + _PLANS) + held_out.prompts * (2 + policies)),
            search_tokens=round(read + asked * (1 + _PART * alone + _PLANS)),
            report_tokens=_read(held_out) + reported + local,
            read_tokens=read + asked,
        )

    def __str__(self) -> str:
        tokens = self.search_tokens + self.report_tokens
        return (
            f"to do: {self.prompts} prompts to read, at most {self.alone} measurements of one layer, about {_PLANS} of "
            f"whole plans; then a report on {self.held_out} other prompts with {self.policies} policies: about "
            f"{self.passes:,} forward passes, {tokens:,} tokens"
        )

    def end_of_search(self, began: float, seconds: float, read_seconds: float) -> float:
        """When the search must end, so that the report is made within ``seconds`` after ``began``.

        Args:
            began: when everything began, in seconds of a clock.
            seconds: the time for everything; the search gets at least half of it.
            read_seconds: what reading the calibration prompts took.
        """
        report = read_seconds * self.report_tokens / self.read_tokens
        return began + max(seconds - report, seconds / 2)


def _read(texts: Texts) -> int:
    """The tokens of all prompts."""
    return texts.context * len(texts.documents) + sum(haystack.ids.shape[-1] for haystack in texts.asked)


def _fed(texts: Texts) -> int:
    """The tokens that are fed behind the prompts."""
    questions = (question for haystack in texts.asked for question in haystack.questions)
    lengths = sum(question.ids.shape[-1] + question.answer.shape[-1] for question in questions)
    return texts.scored * len(texts.documents) + lengths

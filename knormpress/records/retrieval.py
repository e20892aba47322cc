"""What was found behind a pruned cache: every item with its answer, and the figures derived from them."""

from __future__ import annotations

import statistics

import numpy as np

from knormpress.records.figures import Strict
from knormpress.stats.intervals import Change, percent
from knormpress.stats.perplexity import ppl_change
from knormpress.stats.shares import Share, found_change, share_of

__all__ = ["Answer", "Item", "Retrieval"]


class Answer(Strict):
    """An answer through one cache.

    Args:
        nll: negative log-likelihood of the whole answer, in nats.
        found: whether greedy decoding gives the answer.
        chosen: whether the answer is preferred to each other value that stands in the text, at the token where the two
            part; None if there is no other.
    """

    nll: float
    found: bool
    chosen: bool | None = None


class Item(Strict):
    """A question that the full cache answers, and what the candidate answers.

    ``length`` is the text's length in tokens, ``depth`` the place of the answer as a share of it, ``tokens`` the length
    of the answer. Task, text and name identify the item.
    """

    task: str
    text: int
    name: str
    length: int
    depth: float
    tokens: int
    full: Answer
    candidate: Answer

    @property
    def key(self) -> tuple[str, int, str]:
        """What identifies the item."""
        return self.task, self.text, self.name

    @property
    def label(self) -> str:
        """The item in words."""
        return f"{self.task} {self.text}: {self.name} ({self.length:,} tokens, depth {self.depth:.2f})"


class Retrieval(Strict):
    """The items that the full cache solves, of those that were ``asked`` for each task. Only these count."""

    asked: dict[str, int]
    items: tuple[Item, ...]

    def of(self, *tasks: str) -> Retrieval:
        """The part about ``tasks``."""
        asked = {task: count for task, count in self.asked.items() if task in tasks}
        return Retrieval(asked=asked, items=tuple(item for item in self.items if item.task in tasks))

    @property
    def share(self) -> Share:
        """The share of the items that the candidate finds too."""
        texts: dict[tuple[str, int], list[bool]] = {}
        for item in self.items:
            texts.setdefault((item.task, item.text), []).append(item.candidate.found)
        return share_of([(sum(found), len(found)) for found in texts.values()])

    @property
    def change(self) -> Change:
        """The items lost, as a change from the full cache in %, with the interval of the share."""
        share = self.share
        if not share.known:
            return Change(0.0, None, None)
        return Change(percent(share.value), percent(share.low), percent(share.high))

    @property
    def chosen(self) -> tuple[int, int]:
        """How many answers are preferred to the other values in the text, and of how many."""
        choices = [item.candidate.chosen for item in self.items if item.candidate.chosen is not None]
        return sum(choices), len(choices)

    @property
    def nll_rise(self) -> float | None:
        """Mean rise of an answer's negative log-likelihood, in nats; None if there is no item."""
        rises = [item.candidate.nll - item.full.nll for item in self.items]
        return statistics.fmean(rises) if rises else None

    def paired(self, before: Retrieval) -> list[tuple[Item, Item]]:
        """The items of ``before`` with the same items now; an item that either full cache did not solve is left out."""
        now = {item.key: item for item in self.items}
        return [(item, now[item.key]) for item in before.items if item.key in now]

    def found_since(self, before: Retrieval) -> Change:
        """The change of the share of found items since ``before``, in points of %."""
        pairs = [(old.candidate.found, new.candidate.found) for old, new in self.paired(before)]
        return found_change([old for old, _ in pairs], [new for _, new in pairs])

    def answers_since(self, before: Retrieval) -> Change:
        """The change of the answers' perplexity since ``before``, token by token, in %."""
        texts: dict[tuple[str, int], list[float]] = {}
        for old, new in self.paired(before):
            rise = (new.candidate.nll - old.candidate.nll) / old.tokens
            texts.setdefault((old.task, old.text), []).append(rise)
        return ppl_change([np.array(rises) for rises in texts.values()]) if texts else Change(0.0, None, None)

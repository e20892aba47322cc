"""What lm-evaluation-harness says of its tasks through the full cache and through a candidate's: metric by metric."""

from __future__ import annotations

from functools import cached_property

from knormpress.records.figures import Strict
from knormpress.stats.intervals import Change
from knormpress.stats.shares import Share, found_change, share_of

__all__ = ["HarnessTasks", "TaskMetric"]


class TaskMetric(Strict):
    """One metric of one task.

    Args:
        task: the harness's name of the task.
        metric: its name of the metric and of the filter before it, such as ``"acc,none"``.
        higher_is_better: whether more is better; None if the task does not say.
        full, candidate: the metric through the full cache and through the candidate's.
        right: for each document, whether the full cache and the candidate have it right. Empty for a metric that is
            not the share of documents that are right, such as one of which less is better.
    """

    task: str
    metric: str
    higher_is_better: bool | None
    full: float
    candidate: float
    right: tuple[tuple[bool, bool], ...] = ()

    @property
    def change(self) -> Change:
        """The change of the share of documents that are right, in points of %; no interval for another metric."""
        if not self.right:
            return Change(100 * (self.candidate - self.full), None, None)
        return found_change([full for full, _ in self.right], [candidate for _, candidate in self.right])


class HarnessTasks(Strict):
    """The tasks of one run of the harness.

    Args:
        version: of the harness.
        contexts: contexts that were prefilled for the candidate, of which ``pruned`` lost tokens.
        metrics: every metric of every task.
    """

    version: str
    contexts: int
    pruned: int
    metrics: tuple[TaskMetric, ...]

    @cached_property
    def right(self) -> dict[str, tuple[tuple[bool, bool], ...]]:
        """For each task its documents, by the first of its metrics that is a share of documents."""
        found: dict[str, tuple[tuple[bool, bool], ...]] = {}
        for metric in self.metrics:
            if metric.right:
                found.setdefault(metric.task, metric.right)
        return found

    @property
    def kept(self) -> dict[str, Share]:
        """For each task, of how many documents that the full cache has right the candidate has right too."""
        return {
            task: share_of([(candidate, 1) for full, candidate in documents if full])
            for task, documents in self.right.items()
        }

    @property
    def change(self) -> Change:
        """The change of the share of right documents over all tasks, in points of %."""
        pairs = [pair for documents in self.right.values() for pair in documents]
        return found_change([full for full, _ in pairs], [candidate for _, candidate in pairs])

    def change_since(self, before: HarnessTasks) -> Change:
        """The change of the candidate's share since ``before``, document by document, in points of %."""
        pairs = [
            (old, new)
            for task, documents in before.right.items()
            for (_, old), (_, new) in zip(documents, self.right.get(task, ()), strict=False)
        ]
        return found_change([old for old, _ in pairs], [new for _, new in pairs])

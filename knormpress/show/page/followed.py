"""The figures that are followed over the stored runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from knormpress.records.figures import Timed
from knormpress.records.schema import Entry

__all__ = ["FIGURES", "Figure", "tests_of"]


@dataclass(frozen=True)
class Figure:
    """A figure of a stored entry: a ratio to the full cache of the same run (``level`` 1), or a share or change in %.

    Args:
        metric: its name in verdicts.
        title: the title of its chart.
        label: its name in a table.
        level: its value where nothing differs from the full cache.
        worse: 1 if more is worse, -1 if less is.
        of: the figure of an entry; NaN where it has none.
    """

    metric: str
    title: str
    label: str
    level: float
    worse: int
    of: Callable[[Entry], float]

    @property
    def is_timed(self) -> bool:
        """Whether it depends on the machine."""
        return self.metric in ("ttft", "tpot")


def tests_of(entries: Sequence[Entry]) -> list[dict[str, Entry]]:
    """The entries of each test by their runs. With another method, model, text or condition it is another test."""
    tests: dict[object, dict[str, Entry]] = {}
    for entry in entries:
        key = (
            entry.test,
            entry.model.fingerprint,
            entry.model.dtype,
            entry.text.sha256,
            entry.method,
            tuple(sorted(entry.conditions.items())),
        )
        tests.setdefault(key, {})[entry.run] = entry
    return list(tests.values())


def _ratio(name: Timed) -> Callable[[Entry], float]:
    def figure(entry: Entry) -> float:
        latency = entry.latency
        return statistics.median(latency.ratios(name)) if latency is not None and latency.decodes else math.nan

    return figure


def _moved(entry: Entry) -> float:
    return entry.cost.ratio("decode", "moved") if entry.cost else math.nan


FIGURES = (
    Figure("ttft", "Time to first token over commits", "TTFT / full cache", 1.0, 1, _ratio("ttft")),
    Figure("tpot", "Time per output token over commits", "TPOT / full cache", 1.0, 1, _ratio("tpot")),
    Figure(
        "bytes",
        "Cache bytes over commits",
        "Bytes / full cache",
        1.0,
        1,
        lambda e: e.memory.ratio if e.memory else math.nan,
    ),
    Figure("moved", "Bytes moved for a token over commits", "Moved / full cache", 1.0, 1, _moved),
    Figure(
        "ppl",
        "Perplexity over commits",
        "PPL change (%)",
        0.0,
        1,
        lambda e: e.quality.ppl_percent if e.quality else math.nan,
    ),
    Figure(
        "found",
        "Items found over commits",
        "Found (%)",
        100.0,
        -1,
        lambda e: 100 * e.retrieval.share.value if e.retrieval and e.retrieval.share.known else math.nan,
    ),
    Figure(
        "tasks",
        "Tasks of lm-evaluation-harness over commits",
        "Right documents (points)",
        0.0,
        -1,
        lambda e: e.lm_eval.change.percent if e.lm_eval else math.nan,
    ),
)

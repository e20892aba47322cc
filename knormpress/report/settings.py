"""Which rows of a report belong together, what they were measured with, and in what they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from knormpress.compare import Row, differences, group_rows, setting
from knormpress.report.parts import Block, Facts, Words

__all__ = [
    "NOISE",
    "Family",
    "describe_differences",
    "environment_blocks",
    "families",
    "is_control",
    "listed",
]


NOISE = "full"
"""The method that measures the full cache against itself."""

_CONTROLS = ("random", "highest-norm", "recent-window")


@dataclass(frozen=True)
class Family:
    """Rows that differ in nothing but method and keep ratio.

    Args:
        title: what sets them apart from the report's other families; empty where there is but one.
        groups: the rows of each method, falling in keep ratio; methods first, controls after them.
    """

    title: str
    groups: tuple[tuple[Row, ...], ...]

    @property
    def methods(self) -> tuple[tuple[Row, ...], ...]:
        """The groups that are no controls."""
        return tuple(group for group in self.groups if not is_control(group[0]))


def is_control(row: Row) -> bool:
    """Whether a row was measured to be set beside others, not for its own sake."""
    return row.record.policy.method in (*_CONTROLS, NOISE)


def families(rows: Sequence[Row]) -> list[Family]:
    """The rows by what they were measured with; the later of two rows of one cell stands."""
    found: dict[tuple[object, ...], list[tuple[Row, ...]]] = {}
    for group in group_rows(rows):
        key = tuple(value for name, value in setting(group[0]).items() if name not in ("method", "kind of ratio"))
        found.setdefault(key, []).append(tuple(group))
    heads = [groups[0][0] for groups in found.values()]
    differing = [name for name in differences(heads) if name not in ("method", "kind of ratio")]
    return [
        Family(
            ", ".join(_named(name, setting(groups[0][0])[name]) for name in differing),
            tuple(sorted(groups, key=lambda group: is_control(group[0]))),
        )
        for groups in found.values()
    ]


def describe_differences(rows: Sequence[Row]) -> list[Block]:
    """In what the records differ beside the keep ratio, in a sentence; nothing where they don't."""
    found = {name: values for name, values in differences(rows).items() if name != "kind of ratio"}
    if not found:
        return []
    named = "; ".join(f"{name} ({listed([*map(_text, values)])})" for name, values in found.items())
    return [Words(f"The records differ in: {named}. Those that agree in all but method and keep ratio share a table.")]


def listed(words: Sequence[str]) -> str:
    """Words as a sentence lists them: ``0.9, 0.8 and 0.7``."""
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def environment_blocks(rows: Sequence[Row]) -> list[Block]:
    """The machine, the software, the model, the text and the conditions; where they differ, all that occur."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, value in _facts(row):
            found.setdefault(name, {})[value] = None
    return [Facts(tuple((name, "; ".join(values)) for name, values in found.items()))]


def _facts(row: Row) -> list[tuple[str, str]]:
    record = row.record
    environment, model, policy, conditions = record.environment, record.model, record.policy, record.conditions
    dirty = {True: ", with changes that were not committed", False: "", None: ""}[environment.git_dirty]
    chunk = "in one pass" if conditions.prefill_chunk is None else f"in chunks of {conditions.prefill_chunk:,}"
    return [
        ("Model", f"{model.name}, {model.dtype}, {model.parameters:,} parameters"),
        ("Model from", f"{model.source} (fingerprint {model.fingerprint[:12]})"),
        ("Text", f"{record.text.name}, from {record.text.source} (sha256 {record.text.sha256[:12]})"),
        ("Device", f"{environment.device} ({environment.device_name})"),
        ("Threads", f"{environment.threads}"),
        ("Platform", f"{environment.platform}, {environment.processor}"),
        ("Python", environment.python),
        ("torch", environment.torch),
        ("transformers", environment.transformers),
        ("knormpress", environment.knormpress),
        ("Commit", f"{environment.git_commit or 'no git'}{dirty}"),
        ("Measured on", record.created[:10]),
        ("Method", policy.method),
        ("Policy", f"prune_after {policy.prune_after:,}, skip_layers {_text(policy.skip_layers)}, {policy.schedule}"),
        ("Timing", f"prompt of {conditions.prompt_tokens:,} tokens {chunk}, {conditions.new_tokens:,} new ones"),
        (
            "Quality",
            f"{conditions.samples:,} samples, {conditions.scored_tokens:,} tokens scored in each after "
            f"{conditions.context_tokens:,}",
        ),
    ]


def _named(name: str, value: object) -> str:
    return f"{name} {_text(value)}"


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)

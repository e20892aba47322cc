"""Group the records of a report, and describe their settings and differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from knormpress.compare.settings import differences, group_records, setting
from knormpress.records.schema import Record
from knormpress.show.page.parts import Block, Facts, Words

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

_IN_A_GROUP = ("kind of ratio", "way of the prompt")
_IN_A_FAMILY = ("method", *_IN_A_GROUP)
_CONTROLS = ("random", "highest-norm", "recent-window")


@dataclass(frozen=True)
class Family:
    """Records that differ only in method and keep ratio.

    Args:
        title: the settings that distinguish this family from the others; empty if it is the only one.
        groups: the records of each method, from the highest keep ratio down; controls come last.
    """

    title: str
    groups: tuple[tuple[Record, ...], ...]

    @property
    def methods(self) -> tuple[tuple[Record, ...], ...]:
        """The groups that are not controls."""
        return tuple(group for group in self.groups if not is_control(group[0]))


def is_control(record: Record) -> bool:
    """Whether a record was measured only to compare others with it."""
    return record.policy.method in (*_CONTROLS, NOISE)


def families(records: Sequence[Record]) -> list[Family]:
    """The records by their settings; of two records of the same cell, the later one is used."""
    groups_of: dict[tuple[object, ...], list[tuple[Record, ...]]] = {}
    for group in group_records(records):
        key = tuple(value for name, value in setting(group[0]).items() if name not in _IN_A_FAMILY)
        groups_of.setdefault(key, []).append(tuple(group))
    heads = [groups[0][0] for groups in groups_of.values()]
    differing = [name for name in differences(heads) if name not in _IN_A_FAMILY]
    return [
        Family(
            ", ".join(_named(name, setting(groups[0][0])[name]) for name in differing),
            tuple(sorted(groups, key=lambda group: is_control(group[0]))),
        )
        for groups in groups_of.values()
    ]


def describe_differences(records: Sequence[Record]) -> list[Block]:
    """A sentence about the settings in which the records differ, apart from the keep ratio; empty if they don't."""
    differing = {name: values for name, values in differences(records).items() if name not in _IN_A_GROUP}
    if not differing:
        return []
    named = "; ".join(f"{name} ({listed([*map(_text, values)])})" for name, values in differing.items())
    return [Words(f"The records differ in: {named}. Records that differ only in method and keep ratio share a table.")]


def listed(words: Sequence[str]) -> str:
    """Words as a list in a sentence: ``0.9, 0.8 and 0.7``."""
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def environment_blocks(records: Sequence[Record]) -> list[Block]:
    """The machine, the software, the model, the text and the conditions, with all values of each."""
    values_of: dict[str, dict[str, None]] = {}
    for record in records:
        for name, value in _facts(record):
            values_of.setdefault(name, {})[value] = None
    return [Facts(tuple((name, "; ".join(values)) for name, values in values_of.items()))]


def _facts(record: Record) -> list[tuple[str, str]]:
    environment, model, policy, conditions = record.environment, record.model, record.policy, record.conditions
    dirty = {True: ", with uncommitted changes", False: "", None: ""}[environment.git_dirty]
    chunk = "in one pass" if conditions.prefill_chunk is None else f"in chunks of {conditions.prefill_chunk:,}"
    return [
        ("Model", f"{model.name}, {model.dtype}, {model.parameters:,} parameters"),
        ("Model from", f"{model.source} (fingerprint {model.fingerprint[:12]})"),
        ("Text", f"{record.text.name}, from {record.text.source} (sha256 {record.text.sha256[:12]})"),
        ("Device", environment.place),
        ("Threads", f"{environment.threads}"),
        ("Platform", f"{environment.platform}, {environment.processor}"),
        *([("Node", environment.node)] if environment.node else []),
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

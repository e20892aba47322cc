"""Which records of sweeps can be compared with each other, and how they differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from knormpress.records.schema import Record

__all__ = ["comparable", "differences", "group_records", "newest", "setting"]


def group_records(records: Iterable[Record]) -> list[list[Record]]:
    """Group the records that differ only in keep ratio; each group is sorted from the highest keep ratio down.

    A plan joins the first group that it can be compared with, and so do further records of it in which the prompt came
    in another way than the full cache's; these stand below it. Of the records of one cell only the newest is used, see
    ``newest``.
    """
    groups: dict[tuple[object, ...], dict[object, Record]] = {}
    for record in sorted(newest(records), key=_order):
        key = tuple(setting(record).values())
        if record.policy.layer_keep_ratios or record.way:
            beside = (group for group, cells in groups.items() if comparable(record, next(iter(cells.values()))))
            key = next(beside, key)
        groups.setdefault(key, {})[_cell(record)] = record
    return [sorted(cells.values(), key=lambda record: -record.keep_ratio) for cells in groups.values()]


def newest(records: Iterable[Record]) -> list[Record]:
    """The records of different cells; of records of one cell, measured again or at another commit, the last one.

    Files grow at their end, so the last one is the newest.
    """
    cells: dict[tuple[object, ...], Record] = {}
    for record in records:
        cell = (*(value for name, value in setting(record).items() if name != "commit"), _cell(record))
        cells.pop(cell, None)
        cells[cell] = record
    return list(cells.values())


def differences(records: Sequence[Record]) -> dict[str, list[object]]:
    """The settings other than the keep ratio in which records differ, each with its values in order."""
    settings = [setting(record) for record in records]
    names = settings[0] if settings else {}
    values_of = {name: list(dict.fromkeys(values[name] for values in settings)) for name in names}
    return {name: values for name, values in values_of.items() if len(values) > 1}


def setting(record: Record) -> dict[str, object]:
    """The settings of a record by name, without the keep ratio: records with equal settings can be compared."""
    policy, conditions, environment = record.policy, record.conditions, record.environment
    return {
        "model": f"{record.model.name} ({record.model.fingerprint[:12]})",
        "dtype": record.model.dtype,
        "text": f"{record.text.name} ({record.text.sha256[:12]})",
        "device": environment.place,
        "threads": environment.threads,
        "commit": (environment.git_commit or "none")[:12],
        "versions": f"torch {environment.torch}, transformers {environment.transformers}",
        "method": policy.method,
        "kind of ratio": "one per layer" if policy.layer_keep_ratios else "one for all layers",
        "prune_after": policy.prune_after,
        "skip_layers": policy.skip_layers,
        "keep_recent": policy.keep_recent,
        "prune_interval": policy.prune_interval,
        "schedule": policy.schedule,
        "prompt tokens": conditions.prompt_tokens,
        "new tokens": conditions.new_tokens,
        "prefill chunk": conditions.prefill_chunk,
        "way of the prompt": record.way or "whole",
        "samples": conditions.samples,
        "context tokens": conditions.context_tokens,
        "scored tokens": conditions.scored_tokens,
        "retrieval": f"{conditions.texts} texts of {', '.join(conditions.tasks)}" if conditions.tasks else "none",
    }


def comparable(plan: Record, other: Record) -> bool:
    """Whether a plan's record differs from another one only in what a plan decides, and in the way of the prompt."""
    return not set(differences([plan, other])) - {"kind of ratio", "skip_layers", "keep_recent", "way of the prompt"}


def _order(record: Record) -> tuple[bool, bool, bool]:
    """Single ratios, then plans, then those whose prompt came in another way: in chunks, and reused."""
    conditions = record.conditions
    return record.policy.layer_keep_ratios is not None, bool(record.way), conditions.reused_tokens is not None


def _cell(record: Record) -> object:
    policy, conditions = record.policy, record.conditions
    ratios = (policy.layer_keep_ratios, policy.layer_scores) if policy.layer_keep_ratios else policy.keep_ratio
    return ratios, conditions.candidate_chunk, conditions.reused_tokens

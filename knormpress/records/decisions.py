"""What people decided about the stored runs: the pinned commit, accepted losses, and new names of tests.

Each decision is a file of its own in the folder ``knormpress/decisions`` of the storage. So two branches never change
the same file, and the folder can be kept in git where the measurements are not.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError

from knormpress.errors import KnormError
from knormpress.records.figures import Strict
from knormpress.records.git import user
from knormpress.records.jsonl import append_record, fault
from knormpress.records.schema import Entry

__all__ = ["Acceptance", "Decision", "Pin", "Rename", "covers", "current_name", "decide", "read_decisions"]

_FOLDER: Final = Path("knormpress", "decisions")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


class _Decision(Strict):
    created: str = Field(default_factory=_now)
    who: str = Field(default_factory=user)


class Pin(_Decision):
    """From now on each run is also compared with those of ``commit``; with None, no longer."""

    kind: Literal["pin"] = "pin"
    commit: str | None


class Acceptance(_Decision):
    """A loss of one figure of one test that is accepted: from ``before`` to ``now``, in words, and ``why``.

    ``entry`` is the test's entry with the accepted level, and no other measurement than that of ``metric``.
    """

    kind: Literal["accepted"] = "accepted"
    metric: str
    before: str
    now: str
    why: str
    entry: Entry


class Rename(_Decision):
    """The earlier runs of ``old`` are those of ``new``: a test, or a function or file with all its tests."""

    kind: Literal["renamed"] = "renamed"
    old: str
    new: str


Decision: TypeAlias = Pin | Acceptance | Rename

_ANY: TypeAdapter[Decision] = TypeAdapter(Annotated[Decision, Field(discriminator="kind")])


def decide(storage: Path, decision: Decision) -> None:
    """Store ``decision`` in the folder ``storage``.

    Raises:
        KnormError: it can't be written.
    """
    name = f"{decision.created[:10]}_{decision.kind}_{uuid.uuid4().hex}.jsonl"
    try:
        append_record(storage / _FOLDER / name, decision)
    except OSError as error:
        raise KnormError(f"nothing can be stored in {storage} ({error.strerror}); name another storage") from error


def read_decisions(storage: Path) -> tuple[Decision, ...]:
    """The decisions in the folder ``storage``, oldest first. Accepted entries have the current names of their tests.

    Raises:
        KnormError: a file is not a decision.
    """
    found: list[Decision] = []
    for path in storage.glob(f"{_FOLDER.as_posix()}/*.jsonl"):
        try:
            found.append(_ANY.validate_json(path.read_bytes()))
        except OSError as error:
            raise KnormError(f"{path} can't be read ({error.strerror}); make it readable, or move it away") from error
        except ValidationError as error:
            raise KnormError(f"{path} is not a decision ({fault(error)}); correct it, or move it away") from error
    found.sort(key=lambda decision: decision.created)
    return tuple(_with_current_name(decision, found) for decision in found)


def _with_current_name(decision: Decision, decisions: Iterable[Decision]) -> Decision:
    if not isinstance(decision, Acceptance):
        return decision
    test = current_name(decision.entry, decisions)
    return decision.model_copy(update={"entry": decision.entry.model_copy(update={"test": test})})


def current_name(entry: Entry, decisions: Iterable[Decision]) -> str:
    """The name that the test of ``entry`` has now, after all ``decisions``, which are in their order."""
    test = entry.test
    for decision in decisions:
        if isinstance(decision, Rename) and entry.created < decision.created and covers(decision.old, test):
            test = decision.new + test[len(decision.old) :]
    return test


def covers(name: str, test: str) -> bool:
    """Whether ``test`` is the test called ``name``, or one of the tests of a function or file called so."""
    return test == name or test.startswith((f"{name}[", f"{name}::"))

"""A pytest session that stores its measurements, and compares them with those of earlier sessions."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from knormpress.errors import KnormError
from knormpress.pytest_plugin.options import flag, setting, threshold_text

if TYPE_CHECKING:
    from knormpress.compare.verdicts import Verdict
    from knormpress.records.history import History
    from knormpress.records.schema import Entry

__all__ = ["StoredRun"]

_RUN_OF_WORKER = "knorm_run"
_FROM_WORKER = "knorm"


@dataclass
class StoredRun:
    """A session that stores its measurements: its name, the folder, and the runs stored before."""

    name: str
    storage: Path
    history: History
    compares: bool
    thresholds: dict[str, float]
    verdicts: list[Verdict] = field(default_factory=list)
    collected: set[str] = field(default_factory=set)
    deselected: set[str] = field(default_factory=set)

    @classmethod
    def begin(cls, config: pytest.Config) -> StoredRun:
        """Start a run as the options say; reads the stored runs before anything is measured.

        Raises:
            KnormError: entries can't be stored, or stored entries can't be read.
        """
        from knormpress.compare.decided import pin
        from knormpress.compare.verdicts import read_thresholds
        from knormpress.records.decisions import decide
        from knormpress.records.history import History

        if config.getoption("benchmark_storage", None) is None:
            raise KnormError(
                "runs are stored in pytest-benchmark's storage, but that plugin is off; leave -p no:benchmark out"
            )
        kind, separator, place = str(config.getoption("benchmark_storage")).partition("://")
        # A test may change the current folder.
        storage = Path(place if separator else kind).absolute()
        if separator and kind != "file":
            raise KnormError(f"--benchmark-storage is a {kind}; wanted a folder: use file://FOLDER")
        compares = flag(config, "compare")
        if storage.exists() and not storage.is_dir():
            raise KnormError(
                f"entries can't be stored in {storage}, which is not a folder; use another --benchmark-storage"
            )
        history = replace(History.read(storage) if compares else History(()), repository=Path.cwd())
        decision = pin(history, setting(config, "pin")) if compares and setting(config, "pin") else None
        if decision is not None:
            decide(storage, decision)
            history = replace(history, decisions=(*history.decisions, decision))
        # The workers of pytest-xdist add to the run of the process that started them.
        name = getattr(config, "workerinput", {}).get(_RUN_OF_WORKER) or uuid.uuid4().hex
        return cls(name, storage, history, compares, read_thresholds(threshold_text(config)))

    def told_to(self, node: Any) -> None:
        """Give a worker of pytest-xdist, which is about to start, the name of this run."""
        node.workerinput[_RUN_OF_WORKER] = self.name

    def report(self, output: dict[str, Any]) -> None:
        """In a worker: leave in ``output`` what the process that started it can't know."""
        from pydantic import TypeAdapter

        from knormpress.compare.verdicts import Verdict

        verdicts = TypeAdapter(list[Verdict]).dump_python(self.verdicts)
        output[_FROM_WORKER] = {"verdicts": verdicts, "collected": [*self.collected], "deselected": [*self.deselected]}

    def gather(self, output: dict[str, Any]) -> None:
        """Take over what a worker reported; one that crashed has no report."""
        from pydantic import TypeAdapter

        from knormpress.compare.verdicts import Verdict

        told = output.get(_FROM_WORKER, {"verdicts": [], "collected": [], "deselected": []})
        self.verdicts += TypeAdapter(list[Verdict]).validate_python(told["verdicts"])
        self.collected |= {*told["collected"]}
        self.deselected |= {*told["deselected"]}

    def thresholds_of(self, item: pytest.Item) -> dict[str, float]:
        """The thresholds from the marks of ``item``, where the closest mark wins; the options set the rest."""
        from knormpress.compare.verdicts import read_thresholds

        marks = reversed([*item.iter_markers("knorm_thresholds")])
        given = [[*map(str, mark.args), *(f"{name}={value}" for name, value in mark.kwargs.items())] for mark in marks]
        return read_thresholds(",".join(part for parts in given for part in parts), self.thresholds)

    def finish(self, item: pytest.Item, entry: Entry, again: Callable[[], Entry]) -> tuple[Entry, str]:
        """Judge ``entry`` and store it with its verdicts; returns it, and a message if the test must fail.

        Where only a second measurement can tell a slow-down from a disturbance, ``again`` makes it. Its entry is then
        the one that is stored.
        """
        from knormpress.compare.stored import judge_entries
        from knormpress.compare.verdicts import confirmed, slower
        from knormpress.records.history import store

        fault = ""
        if self.compares:
            try:
                verdict = judge_entries(self.history, [entry], self.thresholds_of(item))
                if entry.passed and slower(verdict):
                    entry = again()
                    verdict = confirmed(verdict, judge_entries(self.history, [entry], self.thresholds_of(item)))
            except KnormError as error:
                fault = str(error)
            else:
                self.verdicts.append(verdict)
                words = {finding.metric: finding.word for finding in verdict.findings}
                entry = entry.model_copy(update={"verdicts": words})
                fault = f"regressed: {verdict.reason}" if verdict.word == "regressed" else ""
        try:
            store(self.storage, entry)
        except OSError as error:
            fault = f"the entry can't be stored in {self.storage} ({error.strerror}): {entry.model_dump_json()}"
        return entry, fault

    def vanished(self, config: pytest.Config) -> list[Verdict]:
        """Tests of the last stored run that the command line's paths cover, but that do not exist any more."""
        from knormpress.compare.stored import vanished_tests

        # pytest does not report which tests --lf leaves out.
        if not self.collected or config.getoption("lf", False):
            return []
        folders = [argument.partition("::")[0].removeprefix("./").rstrip("/") for argument in config.args]
        paths = [_from_root(config, folder) for folder in folders if "::" not in folder]

        ignored = [_from_root(config, str(path)) for path in config.getoption("ignore") or ()]
        globs = [_from_root(config, glob) for glob in config.getoption("ignore_glob") or ()]

        def expected(test: str) -> bool:
            path = Path(test.partition("::")[0])
            places = (path, *path.parents)
            if any(place in ignored or any(fnmatch(str(place), str(glob)) for glob in globs) for place in places):
                return False
            return test not in self.deselected and any(place in places for place in paths)

        return vanished_tests(self.history, self.name, sorted(self.collected), expected)


def _from_root(config: pytest.Config, folder: str) -> Path:
    path = (config.invocation_params.dir / folder).resolve()
    try:
        return path.relative_to(config.rootpath)
    except ValueError:
        return path

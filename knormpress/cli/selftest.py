"""``knormpress selftest``: run the user's tests sound, then with each known loss, and say which tests notice."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from knormpress.errors import KnormError

__all__ = ["Noticed", "selftest"]

_STDERR = 2
_PASSED, _TESTS_FAILED = 0, 1
_KINDS = ("latency", "memory", "quality", "retrieval", "cost")

_Outcomes = dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Noticed:
    """What became of a loss, and why: the tests that failed by it, else those that did not, else what none measures."""

    loss: str
    word: Literal["caught", "blind", "no gate", "not planted"]
    why: Mapping[str, str]


def selftest(tests: str, say: Callable[[str], None]) -> Iterator[Noticed]:
    """Run ``tests``, arguments for pytest, without a loss and then with each; ``say`` gets a line for each run.

    A loss is run with the tests that measure what it changes. They are compared with two sound runs of now: what fails
    by the second one already notices nothing.

    Raises:
        KnormError: pytest can't run the tests, or none of them passes and measures something.
    """
    from knormpress.measure.losses import LOSSES

    with tempfile.TemporaryDirectory(prefix="knormpress-") as place:
        sound = Path(place) / "sound"
        say("sound, to compare with")
        first = _run(tests, sound, None, None, "--knorm-save")
        say("sound again: what fails now, fails by noise")
        second = _run(tests, sound, None, None, "--knorm-compare")
        measures = _measures(sound)
        usable = {
            test for test in measures if all(run.get(test, ("failed", ""))[0] != "failed" for run in (first, second))
        }
        for test in sorted(measures.keys() - usable):
            say(f"left out, as it fails without a loss: {test}: {(second.get(test) or first.get(test, ('', '')))[1]}")
        if not usable:
            raise KnormError(f"no test of {tests!r} passes and measures something; use the knorm_* fixtures in tests")
        for name, loss in LOSSES.items():
            concerned = sorted(test for test in usable if measures[test] & loss.kinds)
            if not concerned:
                yield Noticed(loss.title, "no gate", {"no test measures": " or ".join(sorted(loss.kinds))})
                continue
            say(f"{loss.title}: {len(concerned)} tests")
            folder = Path(place) / name
            shutil.copytree(sound, folder)
            told = _run(tests, folder, name, concerned, "--knorm-compare")
            failed = {test: why for test, (outcome, why) in told.items() if outcome == "failed"}
            unseen = {test: why for test, (outcome, why) in told.items() if outcome not in ("failed", "unplantable")}
            if failed:
                yield Noticed(loss.title, "caught", failed)
            elif unseen:
                moved = _moved(folder)
                said = {test: f"{why or 'passed'}: {moved.get(test, 'unmoved')}" for test, why in unseen.items()}
                yield Noticed(loss.title, "blind", said)
            else:
                yield Noticed(loss.title, "not planted", {test: why for test, (_, why) in told.items()})


def _measures(folder: Path) -> dict[str, set[str]]:
    """What each test stored."""
    from knormpress.records.history import History

    found: dict[str, set[str]] = {}
    for entry in History.read(folder).entries:
        found.setdefault(entry.test, set()).update(kind for kind in _KINDS if getattr(entry, kind) is not None)
    return found


def _moved(folder: Path) -> dict[str, str]:
    """By how much each test's figures of the newest run differ from those of the sound ones, in words."""
    from knormpress.compare.stored import judge_newest
    from knormpress.compare.verdicts import THRESHOLDS
    from knormpress.records.history import History

    found: dict[str, str] = {}
    for verdict in judge_newest(History.read(folder), THRESHOLDS):
        changes = [(finding.metric, finding.change) for finding in verdict.findings if finding.change is not None]
        figures = [
            f"{metric} {change}" if change.low == change.high else f"{metric} {change} ({change.interval})"
            for metric, change in changes
            if change.ends != (0.0, 0.0)
        ]
        if figures:
            found[verdict.test] = ", ".join(figures)
    return found


def _run(tests: str, storage: Path, loss: str | None, only: list[str] | None, how: str) -> _Outcomes:
    """Run pytest, with ``storage`` for its runs; the outcome and the reason of each test."""
    asked, outcomes = storage.with_suffix(".asked.json"), storage.with_suffix(".outcomes.json")
    asked.write_text(json.dumps({"loss": loss, "tests": only}), encoding="utf-8")
    outcomes.unlink(missing_ok=True)
    own = ["-p", "knormpress.pytest_plugin.planted", f"--knorm-asked={asked}", f"--knorm-outcomes={outcomes}"]
    own += [how, "--knorm-pin=", f"--benchmark-storage=file://{storage}", "-p", "no:cacheprovider", "-q", "--tb=line"]
    # Tests that compute side by side can't be timed.
    own += ["-n", "0"] if importlib.util.find_spec("xdist") else []
    status = _pytest([*shlex.split(tests), *own])
    if status not in (_PASSED, _TESTS_FAILED):
        raise KnormError(f"pytest ended with status {status}; see its output above, and correct --tests")
    found: _Outcomes = json.loads(outcomes.read_text(encoding="utf-8"))
    return found


def _pytest(arguments: list[str]) -> int:
    # Without git no run counts as one of uncommitted changes, and the newest runs are the reference.
    environment = {**os.environ, "GIT_DIR": os.devnull}
    command = [sys.executable, "-m", "pytest", *arguments]
    # stdout is only for what was noticed.
    return subprocess.run(command, env=environment, stdout=_STDERR, check=False).returncode

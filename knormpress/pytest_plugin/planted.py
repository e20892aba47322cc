"""A second plugin, of ``knormpress selftest`` alone: it plants a loss into what the tests measure, and notes outcomes.

Loaded by ``pytest -p knormpress.pytest_plugin.planted --knorm-asked FILE --knorm-outcomes FILE``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from knormpress.measure.losses import LOSSES, Loss, UnplantableError
from knormpress.pytest_plugin import measured

__all__: list[str] = []

_TOLD = pytest.StashKey[dict[str, tuple[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that name the two files of this run."""
    group = parser.getgroup("knormpress selftest")
    group.addoption("--knorm-asked", type=Path, help="file with the name of the loss, and of the tests to run")
    group.addoption("--knorm-outcomes", type=Path, help="file for the outcome and the reason of each test")


def pytest_configure(config: pytest.Config) -> None:
    """Plant the loss."""
    config.stash[_TOLD] = {}
    loss = _asked(config)["loss"]
    if loss is not None:
        patch = pytest.MonkeyPatch()
        config.add_cleanup(patch.undo)
        _plant(LOSSES[loss], patch)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out all tests but those that were asked for."""
    tests = _asked(config)["tests"]
    if tests is not None:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in tests])
        items[:] = [item for item in items if item.nodeid in tests]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note the outcome of the test, or of the fixture that failed."""
    report = yield
    if call.when == "call" or report.failed:
        why = "" if call.excinfo is None else next(iter(str(call.excinfo.value).splitlines()), "")
        unplantable = call.excinfo is not None and call.excinfo.errisinstance(UnplantableError)
        item.config.stash[_TOLD][item.nodeid] = ("unplantable" if unplantable else report.outcome, why)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the outcomes."""
    outcomes: Path = session.config.getoption("--knorm-outcomes")
    outcomes.write_text(json.dumps(session.config.stash[_TOLD]), encoding="utf-8")


def _asked(config: pytest.Config) -> Any:
    asked: Path = config.getoption("--knorm-asked")
    return json.loads(asked.read_text(encoding="utf-8"))


def _plant(loss: Loss, patch: pytest.MonkeyPatch) -> None:
    """Plant ``loss`` into every method but the controls, which show what a gate's items are worth."""
    controls: list[object] = []
    make_controls = measured.retrieval_controls

    def noted(*arguments: Any) -> Any:
        made = make_controls(*arguments)
        controls.extend(made.values())
        return made

    def planted(method: Any) -> Any:
        return method if any(method is control for control in controls) else loss.method(method)

    def one(measure: Callable[..., Any]) -> Callable[..., Any]:
        return lambda model, method, *rest, **how: measure(model, planted(method), *rest, **how)

    def many(measure: Callable[..., Any]) -> Callable[..., Any]:
        return lambda model, methods, *rest, **how: measure(model, [*map(planted, methods)], *rest, **how)

    def lowered(measure: Callable[..., Any]) -> Callable[..., Any]:
        def ask(model: Any, methods: Sequence[Any], *rest: Any, **how: Any) -> list[Any]:
            found = many(measure)(model, methods, *rest, **how)
            sound = [any(method is control for control in controls) for method in methods]
            return [each if kept else loss.retrieval(each) for each, kept in zip(found, sound, strict=True)]

        return ask

    for name, wrap in {
        "measure_latency": many,
        "measure_memory": many,
        "measure_cost": one,
        "measure_quality": many,
        "measure_retrieval": lowered,
    }.items():
        patch.setattr(measured, name, wrap(getattr(measured, name)))
    patch.setattr(measured, "retrieval_controls", noted)

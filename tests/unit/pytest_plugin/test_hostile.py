"""Methods that don't do what they were asked to, and settings that can't be had: refused, and said in one line."""

from __future__ import annotations

import pytest

from tests.unit.conftest import Run
from tests.unit.pytest_plugin.test_session import ONE, refused

METHODS = """
from contextlib import contextmanager
from transformers import DynamicCache


def idle(press):
    @contextmanager
    def method(model):
        yield lambda: DynamicCache(config=model.config)
    return method


def no_cache(press):
    @contextmanager
    def method(model):
        yield lambda: None
    return method


def no_function(press):
    @contextmanager
    def method(model):
        yield DynamicCache(config=model.config)
    return method


def no_context(press):
    return lambda model: DynamicCache(config=model.config)
"""

BOTH = """
def test_bytes(knorm_memory, knorm_method):
    knorm_memory(knorm_method, prompt_tokens=40)


def test_quality(knorm_gate, knorm_method):
    knorm_gate(knorm_method, context=40, scored=24)
"""


@pytest.fixture
def methods(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    pytester.makepyfile(hostile_methods=METHODS)
    monkeypatch.syspath_prepend(pytester.path)


@pytest.mark.usefixtures("methods")
def test_a_method_that_drops_nothing_fails_by_its_bytes_and_by_what_it_predicts(run: Run) -> None:
    result = run(BOTH, method="hostile_methods:idle", keep_ratios="0.25", ppl_tolerance="1e6")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*so nothing was pruned*", "*predicts exactly what the full cache does*"])


@pytest.mark.usefixtures("methods")
def test_a_method_that_keeps_all_when_asked_to_passes(run: Run) -> None:
    run(BOTH, method="hostile_methods:idle", keep_ratios="1.0", ppl_tolerance="1e6").assert_outcomes(passed=2)


@pytest.mark.usefixtures("methods")
def test_what_is_no_cache_is_refused(run: Run) -> None:
    result = run(BOTH, method="hostile_methods:no_cache", keep_ratios="1.0")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*made a NoneType; wanted a fresh transformers Cache"])


@pytest.mark.usefixtures("methods")
@pytest.mark.parametrize(
    ("method", "said"),
    [("no_function", "yields a DynamicCache; wanted a function*"), ("no_context", "a DynamicCache*a context manager*")],
)
def test_a_method_of_the_wrong_form_is_told_the_right_one(run: Run, method: str, said: str) -> None:
    result = run(BOTH, method=f"hostile_methods:{method}", keep_ratios="1.0")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines([f"*KnormError: hostile_methods.{method}*{said}"])


def test_nothing_is_stored_without_pytest_benchmark(run: Run) -> None:
    refused(run(ONE, "--knorm-save", "-p", "no:benchmark"), "no:benchmark")


def test_latency_needs_pytest_benchmark(run: Run) -> None:
    source = "def test_x(knorm_latency):\n    pass\n"
    result = run(source, "-p", "no:benchmark")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*knorm_latency needs pytest-benchmark*no:benchmark*"])


def test_the_settings_that_were_not_read_are_named(pytester: pytest.Pytester, tmp_path: object) -> None:
    pytester.makeini("[pytest]\nknorm_keep_ratios = 0.5\n")
    pytester.makepyfile("def test_x():\n    pass\n")
    other = pytester.mkdir("other")
    (other / "pytest.ini").write_text("[pytest]\n")
    pytester.chdir()
    sound = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    assert "has read" not in sound.stdout.str()
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-c", str(other / "pytest.ini"))
    assert "has read" not in result.stdout.str(), "the user has named the file"
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", str(other), "-W", "default")
    result.stdout.fnmatch_lines(["*pytest has read *other/pytest.ini and not *--knorm-model=PATH*"])

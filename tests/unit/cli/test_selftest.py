"""``knormpress selftest``: which known losses the tests of a stranger see. Real runs of pytest, in this process."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from knormpress.cli import selftest
from knormpress.cli.app import main

TESTS = """
import pytest


def test_bytes(knorm_memory, knorm_method):
    knorm_memory(knorm_method, prompt_tokens=40)


@pytest.mark.knorm_thresholds(host_reads=1000, ops=1000, allocated=1000, moved=1000, flops=1000)
def test_loose(knorm_cost, knorm_method):
    knorm_cost(knorm_method, prompt_tokens=40, new_tokens=2)


def test_broken(knorm_gate, knorm_method):
    knorm_gate(knorm_method, context=40, scored=24)
    assert not "broken"
"""


@pytest.fixture
def options(pytester: pytest.Pytester, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The arguments for pytest, which is run here: a process for each run takes its time to import torch."""

    def run(arguments: list[str]) -> int:
        with monkeypatch.context() as patched:
            patched.setenv("GIT_DIR", os.devnull)
            return int(pytester.runpytest_inprocess(*arguments).ret)

    monkeypatch.setattr(selftest, "_pytest", run)
    monkeypatch.chdir(pytester.path)
    given = {"model": model_folder, "corpus": model_folder / "text.txt", "device": "cpu", "prune_after": 16}
    given |= {"samples": 8, "keep_ratios": "0.5", "ppl_tolerance": "1e6"}
    return shlex.join(f"--knorm-{name.replace('_', '-')}={value}" for name, value in given.items())


def test_losses_that_are_seen_and_gates_that_are_blind(
    options: str, pytester: pytest.Pytester, capfd: pytest.CaptureFixture[str]
) -> None:
    pytester.makepyfile(test_it=TESTS)
    assert main(["selftest", "--tests", f"test_it.py {options}"]) == 1
    out, err = capfd.readouterr()
    told = [line for line in out.splitlines() if line.startswith(("caught  ", "blind  ", "no gate  ", "not planted  "))]
    assert told == [
        "caught       5 % more bytes in the cache",
        "blind        one more host read a layer",
        "no gate      a tenth more time for each decoded token",
        "no gate      one layer keeps random tokens",
        "no gate      ten of 100 items no longer found",
        "caught       a full cache under the method's name",
    ]
    assert "             test_it.py::test_bytes[cpu-0.5]: regressed: bytes +5" in out
    assert "             test_it.py::test_loose[cpu-0.5]: passed: " in out
    # By how much, so that it can be told which threshold would see it.
    assert re.search(r"passed:[^:]* host_reads \+\d", out)
    assert "             no test measures: latency" in out
    assert "left out, as it fails without a loss: test_it.py::test_broken[cpu-0.5]: " in err
    assert not Path(".benchmarks").exists()


def test_it_passes_where_every_gate_sees_its_loss(options: str, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=TESTS.partition("@pytest")[0])
    assert main(["selftest", "--tests", f"test_it.py {options}"]) == 0


@pytest.mark.parametrize(
    ("source", "tests", "named"),
    [
        ("def test_x():\n    pass\n", "test_it.py", "knorm_* fixtures"),
        ("def test_x():\n    pass\n", "test_none.py", "status 4"),
        ("def no_test():\n    pass\n", "test_it.py", "status 5"),
    ],
)
def test_tests_that_cannot_be_judged_are_an_error(
    options: str, pytester: pytest.Pytester, capfd: pytest.CaptureFixture[str], source: str, tests: str, named: str
) -> None:
    pytester.makepyfile(test_it=source)
    assert main(["selftest", "--tests", tests]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert named in line

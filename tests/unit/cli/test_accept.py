"""``knormpress accept`` and ``knormpress rename``: what they write, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from knormpress.cli.app import main
from knormpress.records.history import History, store
from tests.entry_factory import make_entry
from tests.unit.cli.conftest import Fails

TEST = make_entry().test
STORAGE = Path(".benchmarks")


@pytest.fixture(autouse=True)
def _lost() -> None:
    """The second of two runs lost perplexity."""
    for run, ppl in (("1", 1.0), ("2", 20.0)):
        store(STORAGE, make_entry(run=run, commit=None, created=f"2026-01-0{run}", ppl=ppl, noise=0.001))


def test_it_is_written_who_accepted_what_when_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare"]) == 1
    capsys.readouterr()
    assert main(["accept", TEST, "ppl", "--why", "the text is another"]) == 0
    assert capsys.readouterr().out == f"accepted: ppl of {TEST}, +1.0 % -> +20.0 %\n"
    (made,) = History.read(STORAGE).accepted
    assert (made.metric, made.why, made.before, made.now) == ("ppl", "the text is another", "+1.0 %", "+20.0 %")
    assert made.who
    assert made.created.startswith("20")
    assert made.entry.run == "2"
    assert main(["compare"]) == 1, "KL rose too"
    assert main(["accept", TEST, "kl", "--why", "it is the same loss"]) == 0
    assert main(["compare"]) == 0


def test_a_threshold_decides_what_is_a_loss(fails: Fails) -> None:
    assert "lost nothing" in fails("accept", TEST, "ppl", "--why", "w", "--thresholds", "ppl=50")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["accept", TEST, "ppl"], "--why"),
        (["accept", TEST, "ppl", "--why", ""], "--why is empty"),
        (["accept", TEST, "bytes", "--why", "w"], "bytes lost nothing"),
        (["accept", "t.py::none", "bytes", "--why", "w"], TEST),
        (["accept", TEST, "ppl", "--why", "w", "--storage", "none"], "--knorm-save"),
        (["rename", "t.py::none", "t.py::some"], TEST),
    ],
)
def test_errors_are_one_line_and_write_nothing(arguments: list[str], named: str, fails: Fails) -> None:
    assert named in fails(*arguments)


def test_a_renamed_test_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rename", TEST, "t.py::new"]) == 0
    assert "t.py::new" in capsys.readouterr().out
    assert {entry.test for entry in History.read(STORAGE).entries} == {"t.py::new"}

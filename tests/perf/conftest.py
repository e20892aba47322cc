"""What the benchmarks of tests/perf share: pairs measured in turn, and the table of targets that they fill."""

from __future__ import annotations

import gc
import io
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from matplotlib.figure import Figure
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from knormpress.measure import pairs
from knormpress.show.pictures.style import DPI
from knormpress.stats.intervals import Change, ratio_change


class Target(NamedTuple):
    """A row of the table: a ratio that was measured, and the one that is aimed at."""

    what: str
    against: str
    reach: float
    change: Change
    speeds: str

    @property
    def ratio(self) -> float:
        return 1 + self.change.percent / 100


_PLACE = re.compile(r"(<!-- targets -->\n).*?(\n<!-- end -->)", re.DOTALL)
TARGETS = pytest.StashKey[list[Target]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--peers-table", metavar="FILE", help="replace the table of peers in this Markdown file, and its picture"
    )
    parser.addoption(
        "--performance-table",
        metavar="FILE",
        help="replace the table of targets in this Markdown file, and its pictures",
    )


def pytest_configure(config: pytest.Config) -> None:
    table = config.option.performance_table
    if table and config.option.knorm_quick:
        raise pytest.UsageError("--performance-table wants the long measurements; leave --knorm-quick out")
    # Told now, and not when everything has been measured.
    if table and not (Path(table).is_file() and _PLACE.search(Path(table).read_text(encoding="utf-8"))):
        raise pytest.UsageError(f"--performance-table is {table}; wanted a Markdown file with the marks of a table")
    config.stash[TARGETS] = []


@pytest.fixture(scope="session")
def quick(pytestconfig: pytest.Config) -> bool:
    """Whether short measurements were asked for, that only show that everything runs."""
    return bool(pytestconfig.getoption("--knorm-quick"))


@pytest.fixture(scope="session")
def thorough(pytestconfig: pytest.Config) -> bool:
    """Whether figures are wanted for the table, whatever they take."""
    return bool(pytestconfig.getoption("--performance-table"))


@pytest.fixture
def picture(pytestconfig: pytest.Config) -> Callable[[str, Figure], None]:
    """Write a picture beside the page of the table; where none is named, draw it to see that this works."""
    table = pytestconfig.option.performance_table

    def write(name: str, figure: Figure) -> None:
        path = io.BytesIO() if table is None else Path(table).parent / "images" / name
        figure.savefig(path, format="png", dpi=DPI)

    return write


@pytest.fixture
def for_the_table(thorough: bool, quick: bool) -> None:
    """Skip what no gate needs: it is a figure of the table. With ``--knorm-quick`` it is run to see that it works."""
    if not (thorough or quick):
        pytest.skip("a figure of the table, and no gate; measured with --performance-table")


@pytest.fixture(scope="session")
def without_attention_of_kvpress() -> Callable[[], None]:
    """Take away what the import of kvpress puts over sdpa for its presses per head, which are not used here.

    KnormPress leaves what others put there, so that the benchmarks that follow would be of another attention.
    """

    def take_away() -> None:
        gc.collect()  # a KnormCache that is left has put a function of its own there
        if ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward

    return take_away


@pytest.fixture
def target(benchmark: Any, request: pytest.FixtureRequest, quick: bool) -> Callable[..., None]:
    """Note a ratio for the table; with ``worst`` it is a gate, which fails if the whole interval is worse than that."""

    def note(
        what: str, against: str, change: Change, *, reach: float, worst: float = math.inf, speeds: str = ""
    ) -> None:
        ratio, low = 1 + change.percent / 100, 1 + change.ends[0] / 100
        benchmark.extra_info.update(what=what, against=against, reach=reach, ratio=round(ratio, 3))
        request.config.stash[TARGETS].append(Target(what, against, reach, change, speeds))
        # A few short rounds, often without an interval, decide little.
        most = 2 * worst if quick else worst
        assert low <= most, f"{what}: {ratio:.3f} x {against}, at least {low:.3f}; never more than {most} is allowed"

    return note


@pytest.fixture(autouse=True)
def collector_paused() -> Iterator[None]:
    """Collections outside the clock only, and quick ones: a walk through what imports left outlasts a token."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


@pytest.fixture
def in_turn(timed_in_turn: Callable[..., pairs.Pairs[float]]) -> Callable[..., Change]:
    """The change of the paired ratios that ``timed_in_turn`` measures."""

    def measure(baseline: Callable[[], object], candidate: Callable[[], object], *, rounds: int) -> Change:
        found = timed_in_turn(baseline, candidate, rounds=rounds)
        return ratio_change(found.baseline, found.candidate)

    return measure


@pytest.fixture
def timed_in_turn(benchmark: Any) -> Callable[..., pairs.Pairs[float]]:
    """Time ``candidate`` by pytest-benchmark in turn with ``baseline``: pairs of seconds."""

    def measure(baseline: Callable[[], object], candidate: Callable[[], object], *, rounds: int) -> pairs.Pairs[float]:
        def timed(run: Callable[[], object]) -> float:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

        def collected() -> float:
            gc.collect()
            return timed(baseline)

        def repeat(before: Callable[[], None], run: Callable[[], None]) -> None:
            def outside_the_clock() -> None:
                before()
                gc.collect()

            benchmark.pedantic(run, setup=outside_the_clock, rounds=rounds)

        (found,) = pairs.in_turn(collected, lambda: timed(candidate), rounds=rounds, repeat=repeat)
        return found

    return measure


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    if not config.stash[TARGETS]:
        return
    page = config.option.performance_table
    # What is aimed at is said of the lengths of the page's table only.
    columns = list(_COLUMNS) if page else ["what", "against", "measured", "interval"]
    rows = [[_COLUMNS[column](row) for column in columns] for row in config.stash[TARGETS]]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))
    terminalreporter.section("targets")
    terminalreporter.write_line(table)
    if page:
        text = Path(page).read_text(encoding="utf-8")
        Path(page).write_text(_PLACE.sub(lambda found: found[1] + table + found[2], text), encoding="utf-8")


def interval(change: Change) -> str:
    """The interval of a ratio, as text."""
    return "" if change.low is None else "..".join(f"{1 + end / 100:.2f}" for end in change.ends)


_COLUMNS: dict[str, Callable[[Target], str]] = {
    "what": lambda row: row.what,
    "against": lambda row: row.against,
    "reach": lambda row: f"<= {row.reach:.2f}",
    "measured": lambda row: f"{row.ratio:.2f}",
    "interval": lambda row: interval(row.change),
    "tokens/s": lambda row: row.speeds,
    "met": lambda row: "yes" if row.ratio <= row.reach else "no",
}

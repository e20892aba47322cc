"""What the gates of tests/quality share: the plan that comes with the package, and the tables of what is found."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from knormpress import KnormError, KnormPress

_TABLES = ("retrieval", "more texts", "longer contexts")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--retrieval-table", metavar="FILE", help="replace the tables of what is found in this file")


def _place(table: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {table} -->\n).*?(\n<!-- end of {table} -->)", re.DOTALL)


def pytest_configure(config: pytest.Config) -> None:
    page = config.option.retrieval_table
    if not page:
        return
    # Told now, and not when everything has been measured.
    text = Path(page).read_text(encoding="utf-8") if Path(page).is_file() else ""
    if not all(_place(table).search(text) for table in _TABLES):
        raise pytest.UsageError(f"--retrieval-table is {page}; wanted a Markdown file with the marks of the tables")


@pytest.fixture(scope="module")
def plan(knorm_bench) -> KnormPress:
    """The smallest plan that comes with the package for the model; without one the tests that take it are skipped."""
    try:
        return KnormPress.for_model(knorm_bench.model)
    except KnormError as error:
        pytest.skip(str(error))


@pytest.fixture
def write_table(pytestconfig: pytest.Config) -> Callable[[str, Sequence[Sequence[str]]], None]:
    """Write rows, the head first, as a named table of the page that --retrieval-table names; skip where none is."""
    path = pytestconfig.option.retrieval_table
    if not path:
        pytest.skip("no --retrieval-table was given")

    def write(name: str, rows: Sequence[Sequence[str]]) -> None:
        head, *others = rows
        table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *others))
        print(table)
        page = Path(path)
        text = _place(name).sub(lambda place: place[1] + table + place[2], page.read_text(encoding="utf-8"))
        page.write_text(text, encoding="utf-8")

    return write

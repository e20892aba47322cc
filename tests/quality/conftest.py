"""What the gates of tests/quality share: the plan that comes with the package, and the table of what is found."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from knormpress import KnormError, KnormPress
from knormpress.records.retrieval import Retrieval

_PLACE = re.compile(r"(<!-- retrieval -->\n).*?(\n<!-- end of retrieval -->)", re.DOTALL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--retrieval-table", metavar="FILE", help="replace the table of what is found in this file")


def pytest_configure(config: pytest.Config) -> None:
    table = config.option.retrieval_table
    # Told now, and not when everything has been measured.
    if table and not (Path(table).is_file() and _PLACE.search(Path(table).read_text(encoding="utf-8"))):
        raise pytest.UsageError(f"--retrieval-table is {table}; wanted a Markdown file with the marks of a table")


@pytest.fixture(scope="module")
def plan(knorm_bench) -> KnormPress:
    """The smallest plan that comes with the package for the model; without one the tests that take it are skipped."""
    try:
        return KnormPress.for_model(knorm_bench.model)
    except KnormError as error:
        pytest.skip(str(error))


@pytest.fixture
def retrieval_table(pytestconfig: pytest.Config) -> Callable[[Mapping[str, Retrieval]], None]:
    """Write what each method found into the file that --retrieval-table names; skip where none is named."""
    path = pytestconfig.option.retrieval_table
    if not path:
        pytest.skip("no --retrieval-table was given")

    def write(found: Mapping[str, Retrieval]) -> None:
        first = next(iter(found.values()))
        tasks = [f"{task} ({first.of(task).share.known}/{asked})" for task, asked in first.asked.items()]
        rows = [["policy", *tasks, "all", "rise of the NLL"], ["---"] * (len(tasks) + 3)]
        for name, retrieval in found.items():
            shares = [retrieval.of(task).share for task in first.asked]
            cells = [f"{share.found} ({share.ends})" for share in shares]
            rows.append([name, *cells, f"{retrieval.share}: {retrieval.share.percent}", f"{retrieval.nll_rise:+.2f}"])
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        print(table)
        page = Path(path)
        text = _PLACE.sub(lambda place: place[1] + table + place[2], page.read_text(encoding="utf-8"))
        page.write_text(text, encoding="utf-8")

    return write

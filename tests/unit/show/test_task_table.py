"""Tasks of lm-evaluation-harness in the terminal and on the page."""

from __future__ import annotations

import io

from rich.console import Console

from knormpress.records.history import History
from knormpress.records.schema import Entry
from knormpress.show.page.report import build_sections, render_page
from knormpress.show.task_table import print_tasks
from tests.entry_factory import make_entry, make_tasks


def entry(right: int = 30, **changes: object) -> Entry:
    return make_entry(parts=()).model_copy(update={"lm_eval": make_tasks(right), **changes})


def test_the_table_has_a_change_only_for_shares() -> None:
    written = io.StringIO()
    print_tasks(entry(), Console(file=written, width=80))
    rows = {words[1]: words[2:] for words in map(str.split, written.getvalue().splitlines()) if words[:1] == ["choice"]}
    assert rows["perplexity,none"] == ["5.0000", "6.0000"]
    assert rows["acc,none"][:3] == ["1.0000", "0.7500", "-25.0"]
    assert "40 of 40 contexts were pruned" in written.getvalue()
    assert max(map(len, written.getvalue().splitlines())) <= 80


def test_the_page_shows_the_last_run_of_each_method_from_files_and_history() -> None:
    stored, again = entry(30), entry(20)
    other = entry(10, method="Other(<b>)", test="knormpress lm-eval <choice>")
    sections = build_sections([], History((stored,)), tasks=[again, other])
    (section,) = [section for section in sections if section.identifier == "tasks"]
    assert len(section.blocks) == 2
    page = render_page(sections)
    assert "0.5000" in page
    assert "0.2500" in page
    assert "Other(&lt;b&gt;)" in page
    alone = build_sections([], History(()), tasks=[other])
    assert "tasks" in {section.identifier for section in alone}

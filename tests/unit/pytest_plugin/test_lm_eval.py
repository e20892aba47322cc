"""The gate on tasks of lm-evaluation-harness, in pytest sessions of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

# pytester forgets what a run imports, and a model can't be registered twice.
import knormpress.lm_eval.model  # noqa: F401
from knormpress.records.history import History
from tests.lm_eval_tasks import let_answers_be, write_tasks
from tests.unit.conftest import Run

SHARE = {"retrieval_share": 0.7}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> str:
    """A test with a gate on twelve documents, all of which the full cache has right."""
    folder = write_tasks(tmp_path_factory.mktemp("tasks"), texts=3)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32")
    let_answers_be(folder, HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(model_folder)))
    return f"""
        def test_tasks(knorm_lm_eval_gate, knorm_method):
            knorm_lm_eval_gate(knorm_method, ["choice"], include_path={str(folder)!r}, limit=LIMIT)
    """


def test_keep_1_passes_and_keep_1_percent_fails(run: Run, source: str) -> None:
    result = run(source.replace("LIMIT", "None"), keep_ratios="1.0,0.01", skip_layers="none", **SHARE)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["choice: 0 of 12 documents are still right*wanted 70 %", "FAILED*0.01*"])


def test_few_right_documents_decide_nothing(run: Run, source: str) -> None:
    result = run(source.replace("LIMIT", "4"), keep_ratios="1.0", **SHARE)
    result.assert_outcomes(xfailed=1)
    result.stdout.fnmatch_lines(["*inconclusive: choice: 4 of 4 documents*fewer than 5*"])


def test_a_run_is_stored_and_the_next_one_compared_with_it(run: Run, source: str, pytester: pytest.Pytester) -> None:
    source = source.replace("LIMIT", "None")
    run(source, "--knorm-save", keep_ratios="1.0", **SHARE).assert_outcomes(passed=1)
    (entry,) = History.read(pytester.path / ".benchmarks").entries
    assert entry.lm_eval is not None
    assert (entry.text.name, entry.conditions) == ("choice", {"few_shot": None, "limit": None})
    assert [len(documents) for documents in entry.lm_eval.right.values()] == [12]
    again = run(source, "--knorm-compare", keep_ratios="1.0", **SHARE)
    again.assert_outcomes(passed=1)
    again.stdout.fnmatch_lines(["*compared with the stored runs*", "*1 ok*"])

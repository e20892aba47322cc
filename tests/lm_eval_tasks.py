"""Tasks of lm-evaluation-harness over retrieval items, as YAML and JSON Lines files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from knormpress.workload.tasks.draw import Draw
from knormpress.workload.tasks.needles import multi_key

TASKS = ("cloze", "choice", "generation", "shots", "rolling")
"""A cloze, a choice among the values in a text, a generation, a generation with examples, and the texts themselves."""

QUESTION = "What is the locker"
"""What each question begins with."""

_FORMS: dict[str, dict[str, Any]] = {
    "cloze": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}{{question}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}],
    },
    "generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}\n{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    },
    "shots": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "fewshot_split": "train",
        "num_fewshot": 3,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
}


def write_tasks(folder: Path, *, texts: int = 2) -> Path:
    """Write the files of all ``TASKS`` into ``folder``; each text has four questions, and is the context of all."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, numbers in (("test", range(texts)), ("train", range(texts, texts + 2))):
        lines = [json.dumps(document) + "\n" for number in numbers for document in _documents(number)]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    data = {"data_files": {split: str(folder / f"{split}.jsonl") for split in ("test", "train")}}
    data["cache_dir"] = str(folder / "cache")  # type: ignore[assignment]
    for task, form in _FORMS.items():
        source = {"task": task, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        # JSON is YAML.
        (folder / f"{task}.yaml").write_text(json.dumps(source | form), encoding="utf-8")
    return folder


def let_answers_be(folder: Path, model: Any) -> None:
    """Make what ``model``, one of the harness's models, chooses the right answer of each document of ``choice``."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = simple_evaluate(model=model, tasks=["choice"], task_manager=manager, bootstrap_iters=0)
    lines = []
    for sample in results["samples"]["choice"]:
        scores = [score for ((score, _),) in sample["resps"]]
        lines.append(json.dumps(sample["doc"] | {"label": scores.index(max(scores))}) + "\n")
    (folder / "test.jsonl").write_text("".join(lines), encoding="utf-8")


def _documents(number: int) -> list[dict[str, Any]]:
    draw = Draw("held-out", "lm-eval", number)
    draft = multi_key(draw, len)
    text = draft.head + "".join(draw.filler() + needle for _, needle in draft.needles) + draw.filler()
    documents = []
    for asked in draft.asked:
        choices = sorted([asked.answer, *asked.others])
        label = choices.index(asked.answer)
        question = asked.question.lstrip()
        known = {"text": text, "question": question, "answer": asked.answer, "choices": choices, "label": label}
        documents.append(known)
    return documents

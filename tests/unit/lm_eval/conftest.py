"""What tests of lm-evaluation-harness share: tasks as files, and a tiny model in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.lm_eval_tasks import write_tasks


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def loaded(model_folder: Path) -> dict[str, Any]:
    """A model and its tokenizer, as the harness takes them."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64).eval()
    return {"pretrained": model, "tokenizer": AutoTokenizer.from_pretrained(model_folder)}

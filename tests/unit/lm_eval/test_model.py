"""The model that lm-evaluation-harness takes: its figures at keep 1.0 are the harness's own, and others below it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from knormpress import KnormCache, KnormError, KnormPress
from knormpress.lm_eval.model import KnormLM
from knormpress.measure.prefill import prefill
from knormpress.methods.full import FullCache
from tests.lm_eval_tasks import QUESTION, TASKS

SCORED = ("cloze", "choice", "rolling")
GENERATED = ("generation", "shots")


def run(model: Any, folder: Path, *tasks: str) -> Any:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0)


def answers(results: Any) -> dict[str, list[Any]]:
    """What the model answered, request by request."""
    return {task: [sample["resps"] for sample in samples] for task, samples in results["samples"].items()}


def knorm(loaded: dict[str, Any], keep: float, **options: Any) -> KnormLM:
    given: dict[str, Any] = {"keep_ratio": keep, "prune_after": 16, "split": QUESTION} | options
    return KnormLM(**loaded, **given)


@pytest.fixture(scope="module")
def own(loaded: dict[str, Any], task_folder: Path) -> Any:
    """The results of the harness's own model."""
    return run(HFLM(**loaded), task_folder, *TASKS)


def numbers(answered: Any) -> list[float]:
    if isinstance(answered, list | tuple):
        return [number for part in answered for number in numbers(part)]
    return [float(answered)]


@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"prefill_chunk": 100}, {"method": FullCache()}])
def test_keep_1_gives_the_figures_of_the_harness(
    loaded: dict[str, Any], task_folder: Path, own: Any, options: dict[str, Any]
) -> None:
    results = run(knorm(loaded, 1.0, **options), task_folder, *TASKS)
    for task, figures in own["results"].items():
        for metric, figure in figures.items():
            expected = pytest.approx(figure, rel=1e-4) if isinstance(figure, float) else figure
            assert results["results"][task][metric] == expected, (task, metric)
    for task in SCORED:
        assert numbers(answers(results)[task]) == pytest.approx(numbers(answers(own)[task]), abs=1e-4)
    for task in GENERATED:
        assert answers(results)[task] == answers(own)[task]


def test_keep_5_percent_gives_others(loaded: dict[str, Any], task_folder: Path, own: Any) -> None:
    pruned = answers(run(knorm(loaded, 0.05), task_folder, *TASKS))
    for task in SCORED:
        assert numbers(pruned[task]) != pytest.approx(numbers(answers(own)[task]), abs=0.1)
    for task in GENERATED:
        assert pruned[task] != answers(own)[task]


def ids_of(model: KnormLM, text: str) -> torch.Tensor:
    return torch.tensor([model.tok_encode(text)])


def expected(model: KnormLM, text: torch.Tensor, fed: torch.Tensor, answer: torch.Tensor) -> float:
    """The log-likelihood of ``answer``, token by token, behind a cache that was pruned after ``text``."""
    cache, total = KnormCache(model.model, PRESS), 0.0
    with torch.inference_mode():
        prefill(model.model, text, cache)
        for token in answer[0]:
            logits = model.model(fed, past_key_values=copy.deepcopy(cache)).logits[0, -1]
            total += float(logits.log_softmax(-1)[token])
            fed = torch.cat([fed, token[None, None]], dim=-1)
    return total


def ask(model: KnormLM, *pairs: tuple[str, str]) -> list[float]:
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    return [score for score, _ in model.loglikelihood(requests, disable_tqdm=True)]


PRESS = KnormPress(0.3, 16)
CONTEXT = "The locker number of Rome is 51. The grass is green. The locker number of Riga is 17. What is it? It is"


@pytest.mark.parametrize("answer", [" 51", "!"])
@pytest.mark.parametrize("split", [None, "What"])
def test_an_answer_is_scored_behind_the_pruned_context(loaded: dict[str, Any], split: str | None, answer: str) -> None:
    """Its first token too, which a prefill of the whole context would predict from the full cache."""
    model = KnormLM(**loaded, method=PRESS, split=split)
    ids = ids_of(model, CONTEXT)
    start = ids.shape[-1] - 1 if split is None else ids_of(model, CONTEXT.partition("What")[0]).shape[-1]
    text, fed = ids[:, :start], ids[:, start:]
    continuation = ids_of(model, CONTEXT + answer)[:, ids.shape[-1] :]
    assert ask(model, (CONTEXT, answer)) == pytest.approx([expected(model, text, fed, continuation)], abs=1e-4)
    assert (model.contexts, model.pruned) == (1, 1)


@contextmanager
def passes(model: KnormLM) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the passes inside the context."""
    shapes: list[tuple[int, ...]] = []
    with model.model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    ):
        yield shapes


def test_a_context_is_prefilled_once(loaded: dict[str, Any]) -> None:
    pairs = [(CONTEXT, " 51"), ("x" * 30, " y"), (CONTEXT, " 17"), (CONTEXT, "!"), ("x" * 30, "!")]
    for rows, wanted in ((1, 5), (2, 3)):
        model = KnormLM(**loaded, method=PRESS, batch_size=rows)
        with passes(model) as shapes:
            scores = ask(model, *pairs)
        texts = [len(model.tok_encode(context)) - 1 for context in (CONTEXT, "x" * 30)]
        assert [shape for shape in shapes if shape[1] > 5] == [(1, length) for length in texts]
        assert len(shapes) == len(texts) + wanted
        assert scores == pytest.approx([ask(model, pair)[0] for pair in pairs], abs=1e-5)


def generate(model: KnormLM, *prompts: str) -> list[str]:
    options = {"until": ["\n"], "max_gen_toks": 6}
    return model.generate_until([Instance("generate_until", {}, (prompt, options), 0) for prompt in prompts])


def test_a_text_is_prefilled_once_for_all_its_questions_and_holds_nothing_of_them(loaded: dict[str, Any]) -> None:
    text, other = CONTEXT.partition("What")[0], "The moon is up. The wind is cold. "
    prompts = [text + "\n\nWhat is it?", other + "\n\nWhat was it?", text + "\n\nWho is it then?"]
    model = KnormLM(**loaded, method=PRESS)
    with passes(model) as shapes:
        said = generate(model, *prompts)
    lengths = [len(model.tok_encode(part)) for part in (text, other)]
    assert [shape[1] for shape in shapes if shape[1] > 20] == lengths
    assert said == [generate(model, prompt)[0] for prompt in prompts]


def test_what_is_too_long_loses_its_beginning_as_in_the_harness(loaded: dict[str, Any]) -> None:
    requests = [Instance("loglikelihood", {}, (CONTEXT, answer), 0) for answer in (" 51", "!")]
    full = HFLM(**loaded, max_length=40).loglikelihood(requests, disable_tqdm=True)
    model = KnormLM(**loaded, keep_ratio=1.0, max_length=40)
    assert model.loglikelihood(requests, disable_tqdm=True) == [
        (pytest.approx(score, abs=1e-4), greedy) for score, greedy in full
    ]


@pytest.mark.parametrize("context", ["", "a"])
def test_a_context_of_one_token_has_nothing_to_prune(loaded: dict[str, Any], context: str) -> None:
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in ((context, " b"), (CONTEXT, " 5"))]
    (full, _), _ = HFLM(**loaded).loglikelihood(requests, disable_tqdm=True)
    model = KnormLM(**loaded, method=PRESS)
    (score, _), _ = model.loglikelihood(requests, disable_tqdm=True)
    assert score == pytest.approx(full, abs=1e-4)
    assert (model.contexts, model.pruned) == (2, 1)


class TestRefused:
    def test_contexts_of_which_nothing_is_pruned(self, loaded: dict[str, Any]) -> None:
        model = KnormLM(**loaded, keep_ratio=0.5)
        with pytest.raises(KnormError, match=r"pruned none of 1 contexts.*prune_after below 512") as caught:
            ask(model, (CONTEXT, " 51"), (CONTEXT, " 17"))
        assert "\n" not in str(caught.value)

    def test_a_prompt_without_a_place_to_split_it(self, loaded: dict[str, Any]) -> None:
        with pytest.raises(KnormError, match=r"no blank line.*num_fewshot.*split"):
            generate(KnormLM(**loaded, method=PRESS), CONTEXT)
        for asked in (generate, lambda model, prompt: ask(model, (prompt, " 51"))):
            with pytest.raises(KnormError, match="no 'Who'"):
                asked(KnormLM(**loaded, method=PRESS, split="Who"), CONTEXT)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "neither is given"),
            ({"keep_ratio": 0.5, "plan": "auto"}, "both are given"),
            ({"keep_ratio": 0.0}, "keep_ratio is 0.0"),
            ({"keep_ratio": 0.5, "method": "nothing"}, "no method 'nothing'"),
            ({"plan": "auto"}, "no plan comes with KnormPress for this LlamaForCausalLM"),
            ({"keep_ratio": 0.5, "split": ""}, "split is empty"),
            ({"keep_ratio": 0.5, "batch_size": "auto"}, "batch_size is 'auto'"),
            ({"keep_ratio": 0.5, "batch_size": 0}, "batch_size is 0"),
        ],
    )
    def test_options(self, loaded: dict[str, Any], options: dict[str, Any], message: str) -> None:
        with pytest.raises(KnormError, match=message) as caught:
            KnormLM(**loaded, **options)
        assert "\n" not in str(caught.value)


def test_the_harness_finds_the_model_by_its_name(model_folder: Path, task_folder: Path) -> None:
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    given = {"pretrained": str(model_folder), "keep_ratio": 0.5, "prune_after": 16, "device": "cpu"}
    results = simple_evaluate(
        model="knormpress", model_args=given, tasks=["choice"], task_manager=manager, limit=1, bootstrap_iters=0
    )
    assert results["n-samples"]["choice"]["effective"] == 1

"""The ways of a prompt into a candidate's cache, beside a full cache that computes it in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from knormpress import KnormCache, KnormPress
from knormpress.errors import KnormError
from knormpress.measure import latency
from knormpress.measure.latency import measure_latency
from knormpress.measure.memory import measure_memory
from knormpress.measure.prefill import Way, begun, can_be_reused, prefill
from knormpress.measure.quality import score_document
from knormpress.measure.retrieval import measure_retrieval
from knormpress.methods.full import FullCache
from knormpress.methods.method import Method
from knormpress.methods.registry import make_method
from knormpress.workload.tasks.haystack import Haystack, Question
from tests.strategies import VOCABULARY, tiny_model

PRESS = KnormPress(layer_keep_ratios=(0.5, 0.25, 0.6), layer_scores=("knorm", "keydiff", "knorm"), prune_after=16)
WAYS = (Way(), Way(20), Way(question=8), Way(20, question=8))


def tokens(count: int, seed: int = 3) -> Tensor:
    return torch.randint(2, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


@contextmanager
def passes() -> Iterator[list[int]]:
    """How many tokens each forward pass of the tiny model brings."""
    seen: list[int] = []
    model = tiny_model()

    def look(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["input_ids"].shape[-1])

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("method", [PRESS, make_method("keydiff", KnormPress(0.5, 16))], ids=["plan", "score"])
def test_a_question_behind_a_saved_context_is_the_question_behind_the_context(method: Method) -> None:
    model, ids = tiny_model(), tokens(60)
    with torch.inference_mode():
        with method(model) as new_cache:
            own = new_cache()
        prefill(model, ids[:, :52], own)
        expected = prefill(model, ids[:, 52:], own)
        with begun(model, method, ids, Way(question=8)) as (saved, left), saved(model) as load, passes() as seen:
            assert torch.equal(left, ids[:, 52:])
            for _ in range(2):
                assert torch.equal(prefill(model, left, load()), expected)
            assert seen == [8, 8]
        with pytest.raises(KnormError, match="does not exist"):
            load()


def test_what_has_no_context_or_no_file_is_told_of() -> None:
    for question in (0, 8, 9):
        with (
            pytest.raises(KnormError, match=f"8 tokens .*question of {question}"),
            begun(tiny_model(), PRESS, tokens(8), Way(question=question)),
        ):
            pass
    with (
        pytest.raises(KnormError, match=r"FullCache.*DynamicCache; wanted a KnormCache"),
        begun(tiny_model(), FullCache(), tokens(9), Way(question=8)),
    ):
        pass


@pytest.mark.parametrize(
    ("family", "method", "can"),
    [("llama", PRESS, True), ("gemma3", PRESS, True), ("qwen3-next", PRESS, False), ("llama", FullCache(), False)],
)
def test_which_caches_can_be_reused(family: str, method: Method, can: bool) -> None:
    assert can_be_reused(tiny_model(family), method) == can


@pytest.mark.parametrize(
    ("way", "before", "of_prompt"), [(Way(20), [], [20, 20, 20]), (Way(question=8), [52], [8])], ids=str
)
def test_only_the_candidate_is_timed_that_way(
    monkeypatch: pytest.MonkeyPatch, way: Way, before: list[int], of_prompt: list[int]
) -> None:
    """What comes before is computed once, before the warm-up of either."""
    monkeypatch.setattr(latency, "calibrate", lambda device: 0.01)
    full, own = [60, 1], [*of_prompt, 1]
    with passes() as seen:
        measure_latency(tiny_model(), [PRESS], tokens(60), new_tokens=2, rounds=2, ways=[way])
    assert seen == [*before, *full, *own, *full, *own, *own, *full]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_bytes_are_those_of_the_cache_that_took_the_prompt_that_way(way: Way) -> None:
    ids = tokens(60)
    (found,) = measure_memory(tiny_model(), [PRESS], ids, ways=[way], decoded_tokens=3)
    (whole,) = measure_memory(tiny_model(), [PRESS], ids)
    assert found.baseline_cache_bytes == whole.baseline_cache_bytes
    # The budgets are the same whatever the way; the spare room of a layer may not be.
    assert found.candidate_cache_bytes == pytest.approx(whole.candidate_cache_bytes, rel=0.05)
    assert found.candidate_cache_bytes < found.baseline_cache_bytes


def test_perplexity_is_that_of_each_way() -> None:
    """The scored tokens are the question; the full cache is the same for all."""
    ids = tokens(48 + 20 + 1)

    def score(**how: Any) -> list[Any]:
        return score_document(tiny_model(), ids, [PRESS] * len(how.get("ways", "1")), context=48, decoded=True, **how)

    whole, chunked, reused, both = score(ways=WAYS)
    (alone,), (in_chunks,) = score(), score(prefill_chunk=20)
    assert whole == alone
    assert reused == whole.model_copy(update={"decoded_nll": ()})
    assert both == chunked.model_copy(update={"decoded_nll": ()})
    assert chunked.candidate_nll == in_chunks.candidate_nll != whole.candidate_nll
    assert chunked.decoded_nll == in_chunks.decoded_nll
    assert chunked.baseline_nll == whole.baseline_nll


def test_retrieval_is_that_of_each_way() -> None:
    model, ids = tiny_model(), tokens(48)
    asked = tokens(5, seed=4)
    with torch.inference_mode():
        answer = model(torch.cat([ids, asked], dim=1)).logits[0, -1].argmax()[None]
    question = Question(name="a", ids=asked, answer=answer, depth=0.5, others=())
    text = Haystack(task="single-prose", number=0, ids=ids, questions=(question,), in_turn=False)

    def measure(**how: Any) -> list[Any]:
        found = measure_retrieval(model, [PRESS] * len(how.get("ways", "1")), [text], **how)
        return [one.items[0].candidate for one in found]

    whole, chunked, reused, both = measure(ways=WAYS)
    with torch.inference_mode():
        cache = KnormCache(model, PRESS)
        prefill(model, ids, cache, chunk=20)
        logits = prefill(model, asked, cache)[0]
    assert whole == reused == measure()[0]
    assert chunked == both != whole
    assert chunked.nll == pytest.approx(-float(logits.log_softmax(-1)[answer]), abs=1e-5)

"""Answers behind a cache: against plain arithmetic on the model's logits, and against what ``generate`` says."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel

from knormpress import KnormCache, KnormPress
from knormpress.errors import KnormError
from knormpress.measure.prefill import prefill
from knormpress.measure.retrieval import measure_retrieval, read_answers
from knormpress.methods.full import FullCache
from knormpress.methods.method import Method
from knormpress.records.retrieval import Answer, Retrieval
from knormpress.workload.tasks.haystack import Haystack, Question
from tests.answered import answered, said
from tests.strategies import VOCABULARY, tiny_model, tokens

LENGTH = 60
LINEAR = ("qwen3-next", "lfm2")
# Answers are read in float32, whatever the model computes in.
ROUNDING = 1e-5
PRESS = KnormPress(0.5, prune_after=16, skip_layers=(0,))


def haystack(*questions: Question, number: int = 0, in_turn: bool = False, task: str = "list") -> Haystack:
    return Haystack(task, number, tokens(LENGTH, seed=100 + number), questions or asked(), in_turn)


def question(length: int, answer: int, seed: int, name: str = "") -> Question:
    """A random question of so many tokens, with a random answer."""
    return Question(name or str(seed), tokens(length, seed=seed), tokens(answer, seed=50 + seed)[0], (), 0.5)


def asked() -> tuple[Question, ...]:
    """Three questions of different lengths, with answers of different lengths."""
    return question(5, 3, seed=1), question(9, 1, seed=2), question(2, 4, seed=3)


def filled(model: PreTrainedModel, text: Haystack, press: KnormPress | None = PRESS) -> Cache:
    """A cache that holds the text; the full cache without a press."""
    cache = DynamicCache(config=model.config) if press is None else KnormCache(model, press)
    with torch.inference_mode():
        prefill(model, text.ids, cache)
    return cache


def read(model: PreTrainedModel, text: Haystack, cache: Cache) -> list[Answer]:
    with torch.inference_mode():
        return read_answers(model, text, cache)


def log_probabilities(model: PreTrainedModel, fed: Tensor, cache: Cache) -> Tensor:
    """(n, V) after each of the tokens ``fed`` (n,), behind a copy of ``cache``."""
    with torch.inference_mode():
        return model(fed[None], past_key_values=copy.deepcopy(cache)).logits[0].log_softmax(-1)


def nll(model: PreTrainedModel, one: Question, cache: Cache) -> float:
    """The sum over the answer's tokens, each fed with all that stands before it."""
    total = 0.0
    for place, token in enumerate(one.answer):
        before = torch.cat([one.ids[0], one.answer[:place]])
        total -= float(log_probabilities(model, before, cache)[-1, token])
    return total


def batches(model: PreTrainedModel) -> Any:
    """A list that gets the shape of the tokens of each forward pass, while the handle beside it is in use."""
    shapes: list[tuple[int, ...]] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    return shapes, model.register_forward_pre_hook(look, with_kwargs=True)


class TestReading:
    @pytest.mark.parametrize("press", [None, PRESS, KnormPress(0.2, 16, ())], ids=["full", "half", "fifth"])
    @pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "qwen3", "gemma3", "ministral-mixed", *LINEAR])
    def test_rows_of_a_batch_are_what_they_are_alone(self, family: str, press: KnormPress | None) -> None:
        model, text = tiny_model(family), haystack()
        cache = filled(model, text, press)
        shapes, handle = batches(model)
        with handle:
            together = read(model, text, cache)
        # Linear attention has no rows to repeat.
        assert shapes == ([(1, 7), (1, 9), (1, 5)] if family in LINEAR else [(3, 9)])
        alone = [read(model, replace(text, questions=(one,)), cache)[0] for one in text.questions]
        for one, row, single in zip(text.questions, together, alone, strict=True):
            assert row.nll == pytest.approx(nll(model, one, cache), abs=ROUNDING)
            assert single.nll == pytest.approx(row.nll, abs=ROUNDING)
            assert single.found == row.found

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_however_attention_is_computed(self, attention: str) -> None:
        model, text = tiny_model("llama", attention, torch.float32), haystack()
        cache = filled(model, text)
        for one, answer in zip(text.questions, read(model, text, cache), strict=True):
            assert answer.nll == pytest.approx(nll(model, one, cache), abs=1e-4)

    @pytest.mark.parametrize("press", [None, KnormPress(1.0)], ids=["full", "keep 1.0"])
    def test_found_is_what_generate_says(self, press: KnormPress | None) -> None:
        model, text = tiny_model(), haystack()
        cache, spoken = filled(model, text, press), []
        for one in text.questions:
            fed, own = torch.cat([text.ids, one.ids], dim=-1), copy.deepcopy(cache)
            out = model.generate(
                fed, attention_mask=torch.ones_like(fed), past_key_values=own, max_new_tokens=4, do_sample=False
            )
            spoken.append(out[0, fed.shape[-1] :])
        right = tuple(replace(one, answer=answer) for one, answer in zip(text.questions, spoken, strict=True))
        assert [answer.found for answer in read(model, haystack(*right), cache)] == [True] * 3
        for place in range(4):
            wrong = [one.answer.clone() for one in right]
            for answer in wrong:
                answer[place] = (answer[place] + 1) % VOCABULARY
            changed = [replace(one, answer=answer) for one, answer in zip(right, wrong, strict=True)]
            assert [answer.found for answer in read(model, haystack(*changed), cache)] == [False] * 3

    def test_found_behind_a_pruned_cache_is_what_its_logits_say(self) -> None:
        """Token by token, each behind the cache as the text left it."""
        model, text = tiny_model(), haystack()
        cache = filled(model, text, KnormPress(0.1, 16, ()))
        (one, *others) = text.questions
        spoken = one.answer[:0]
        for _ in range(3):
            fed = torch.cat([one.ids[0], spoken])
            spoken = torch.cat([spoken, log_probabilities(model, fed, cache)[-1:].argmax(-1)])
        assert not torch.equal(spoken, said(model, torch.cat([text.ids, one.ids], dim=-1), 3))
        found = [answer.found for answer in read(model, haystack(replace(one, answer=spoken), *others), cache)]
        assert found == [True, False, False]

    def test_an_answer_is_chosen_where_it_is_preferred_to_every_other_value(self) -> None:
        model, text = tiny_model(), haystack()
        cache = filled(model, text)
        (one, *_) = text.questions
        first, second = log_probabilities(model, one.ids[0], cache)[-1].argsort(descending=True)[:2].tolist()
        after = log_probabilities(model, torch.cat([one.ids[0], torch.tensor([first])]), cache)[-1]
        best, middle, worst = after.argsort(descending=True)[[0, 40, -1]].tolist()

        def chosen(answer: list[int], *others: list[int]) -> bool | None:
            changed = replace(one, answer=torch.tensor(answer), others=tuple(torch.tensor(each) for each in others))
            return read(model, haystack(changed, question(9, 2, seed=4)), cache)[0].chosen

        # Where the two part at once, what follows is no matter: neither is it likely.
        assert chosen([first, worst], [second, best]) is True
        assert chosen([second, best], [first, worst]) is False
        # Of two with the same beginning the next token decides.
        assert chosen([first, middle], [first, worst]) is True
        assert chosen([first, middle], [first, best]) is False
        # Every other value must be worse.
        assert chosen([first, middle], [first, worst], [second, best]) is True
        assert chosen([first, middle], [first, worst], [first, best]) is False
        assert chosen([first, middle], [first, best], [first, worst]) is False
        assert chosen([first, middle]) is None
        # What is not another value, as far as it goes, is no choice.
        assert chosen([first, middle], [first]) is None
        assert chosen([first], [second, best, middle]) is True

    @pytest.mark.parametrize("press", [None, PRESS], ids=["full", "half"])
    def test_in_turn_each_question_follows_the_answers_before(self, press: KnormPress | None) -> None:
        model, text = tiny_model(), haystack(in_turn=True)
        cache = filled(model, text, press)
        answers, own = read(model, text, cache), copy.deepcopy(cache)
        before = text.ids[0, :0]
        for one, answer in zip(text.questions, answers, strict=True):
            # A pass ends before the last token of the answer, which has nothing to say, and begins with the last one.
            fed = torch.cat([before, one.ids[0], one.answer[:-1]])
            with torch.inference_mode():
                logits = model(fed[None], past_key_values=own).logits[0, -len(one.answer) :]
            expected = -logits.log_softmax(-1)[range(len(one.answer)), one.answer].sum()
            assert answer.nll == pytest.approx(float(expected), abs=ROUNDING)
            assert answer.found == torch.equal(logits.argmax(-1), one.answer)
            before = one.answer[-1:]

    def test_in_turn_through_the_full_cache_is_one_long_text(self) -> None:
        model, text = tiny_model(), answered(tiny_model(), haystack(in_turn=True))
        answers = read(model, text, filled(model, text, None))
        assert [answer.found for answer in answers] == [True] * 3
        whole = torch.cat([text.ids[0], *(part for one in text.questions for part in (one.ids[0], one.answer))])
        with torch.inference_mode():
            found = model(whole[None]).logits[0].log_softmax(-1)
        end = len(text.ids[0])
        for one, answer in zip(text.questions, answers, strict=True):
            start = end + one.ids.shape[-1]
            end = start + len(one.answer)
            expected = -found[range(start - 1, end - 1), one.answer].sum()
            assert answer.nll == pytest.approx(float(expected), abs=ROUNDING)

    @pytest.mark.parametrize("in_turn", [False, True])
    @pytest.mark.parametrize("press", [None, PRESS], ids=["full", "half"])
    def test_the_cache_is_not_changed(self, press: KnormPress | None, in_turn: bool) -> None:
        model, text = tiny_model(), haystack(in_turn=in_turn)
        cache = filled(model, text, press)
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        first = read(model, text, cache)
        assert cache.get_seq_length() == LENGTH
        for layer, (keys, values) in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)
        assert read(model, text, cache) == first

    def test_a_cache_of_another_kind_is_asked_one_question_at_a_time(self) -> None:
        """It may have no rows to repeat, or mean something by them."""

        class Other(DynamicCache):
            def batch_repeat_interleave(self, repeats: int) -> None:
                raise AssertionError("not a batch")

        model, text = tiny_model(), haystack()
        cache = Other(config=model.config)
        with torch.inference_mode():
            prefill(model, text.ids, cache)
        shapes, handle = batches(model)
        with handle:
            answers = read(model, text, cache)
        assert shapes == [(1, 7), (1, 9), (1, 5)]
        assert cache.get_seq_length() == LENGTH
        expected = read(model, text, filled(model, text, None))
        assert [answer.nll for answer in answers] == pytest.approx([answer.nll for answer in expected], abs=ROUNDING)


@dataclass(frozen=True)
class Made:
    """A method that makes caches with ``make``, whatever it says that its policy is."""

    make: Callable[[PreTrainedModel], Cache]
    press: KnormPress | None = None

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[Callable[[], Cache]]:
        yield lambda: self.make(model)


def idle(model: PreTrainedModel) -> Cache:
    """Drops nothing."""
    return DynamicCache(config=model.config)


def poisoned(model: PreTrainedModel) -> Cache:
    """Gives values that are no numbers once it holds a text."""

    class Poisoned(DynamicCache):
        def update(self, *args: Any, **kwargs: Any) -> Any:
            keys, values = super().update(*args, **kwargs)
            return keys, values * math.nan if keys.shape[2] > LENGTH else values

    return Poisoned(config=model.config)


def unshared(model: PreTrainedModel) -> Cache:
    """A pruned cache that can't start from a full one."""
    cache = KnormCache(model, PRESS)
    cache.prefill_from = None  # type: ignore[assignment]
    return cache


def known(number: int = 0, task: str = "list") -> Haystack:
    """A text whose questions the full cache answers."""
    return answered(tiny_model(), haystack(number=number, task=task))


def measure(methods: list[Method], *texts: Haystack, **options: Any) -> list[Retrieval]:
    return measure_retrieval(tiny_model(), methods, texts, **options)


class TestMeasuring:
    def test_only_what_the_full_cache_answers_is_an_item(self) -> None:
        right, wrong = known(), haystack()
        mixed = replace(right, questions=(right.questions[0], wrong.questions[1], right.questions[2]))
        nothing, other = haystack(number=1), known(2, task="json")
        ticks: list[int] = []
        (found,) = measure([PRESS], mixed, nothing, other, after_text=lambda: ticks.append(1))
        assert found.asked == {"list": 6, "json": 3}
        assert [item.key for item in found.items] == [
            *(("list", 0, name) for name in ("1", "3")),
            *(("json", 2, name) for name in ("1", "2", "3")),
        ]
        assert all(item.full.found for item in found.items)
        assert {(item.length, item.depth, item.tokens) for item in found.items} == {(LENGTH, 0.5, 3)}
        assert len(ticks) == 3

    def test_each_methods_answers_are_those_of_its_own_cache(self) -> None:
        model, text = tiny_model(), known()
        presses = [PRESS, KnormPress(0.1, 16), PRESS]
        results = measure(list(presses), text)
        full = read(model, text, filled(model, text, None))
        for press, found in zip(presses, results, strict=True):
            expected = read(model, text, filled(model, text, press))
            assert [item.full.nll for item in found.items] == pytest.approx([one.nll for one in full], abs=ROUNDING)
            assert [item.candidate.nll for item in found.items] == pytest.approx(
                [one.nll for one in expected], abs=ROUNDING
            )
            assert [item.candidate.found for item in found.items] == [one.found for one in expected]
        assert results[0] == results[2] != results[1]
        assert results[1].share.found < results[1].share.known == 3

    @pytest.mark.parametrize("press", [KnormPress(1.0), KnormPress(1.0, 1, ())])
    def test_what_keeps_everything_answers_what_the_full_cache_does(self, press: KnormPress) -> None:
        (found,) = measure([press], known(), known(1))
        assert found.share.found == found.share.known == 6
        assert found.nll_rise == pytest.approx(0.0, abs=ROUNDING)

    def test_a_text_is_prefilled_once_and_its_questions_are_one_pass(self) -> None:
        texts = [known(), haystack(number=1), known(2)]
        shapes, handle = batches(tiny_model())
        with handle:
            shared = measure([PRESS, KnormPress(0.2, 16)], *texts)
            passes = list(shapes)
            shapes.clear()
            own = measure([Made(unshared)], *texts)
        # Whatever the full cache does not answer is not asked of the others.
        asked_all, text = (3, 11), (1, LENGTH)
        assert passes == [text, *[asked_all] * 3, text, (3, 9), text, *[asked_all] * 3]
        assert shapes.count(text) == 3 + 2
        assert [item.candidate.nll for item in own[0].items] == pytest.approx(
            [item.candidate.nll for item in shared[0].items], abs=1e-8
        )

    def test_a_prefill_in_chunks_prunes_in_between(self) -> None:
        model, text = tiny_model(), known()
        cache = KnormCache(model, PRESS)
        with torch.inference_mode():
            prefill(model, text.ids, cache, chunk=25)
        expected = read(model, text, cache)
        (found,), (whole,) = measure([PRESS], text, prefill_chunk=25), measure([PRESS], text)
        assert [item.candidate.nll for item in found.items] == pytest.approx(
            [one.nll for one in expected], abs=ROUNDING
        )
        assert found.nll_rise != pytest.approx(whole.nll_rise, abs=1e-3)

    @pytest.mark.parametrize(
        ("method", "policies"),
        [
            (Made(idle, PRESS), None),
            (Made(idle), [PRESS]),
            (FullCache(), [PRESS]),
            (KnormPress(0.5, prune_after=LENGTH + 1), None),
        ],
        ids=["its own", "given", "given for the full cache", "a short text"],
    )
    def test_a_method_that_should_drop_tokens_and_does_not_is_refused(
        self, method: Method, policies: list[KnormPress] | None
    ) -> None:
        with pytest.raises(KnormError, match=rf"dropped none of {LENGTH} tokens .*use a longer text") as caught:
            measure([method], known(), policies=policies)
        assert "\n" not in str(caught.value)

    def test_a_method_without_a_policy_may_keep_everything(self) -> None:
        (found,) = measure([Made(idle)], known())
        assert found.share.found == 3

    def test_logits_that_are_no_numbers_name_the_method(self) -> None:
        with pytest.raises(KnormError, match=r"NaN.*Made\(make=.*poisoned.*float32") as caught:
            measure([PRESS, Made(poisoned)], known())
        assert "\n" not in str(caught.value)
        model = AutoModelForCausalLM.from_config(tiny_model().config).eval()
        model.lm_head.weight.data.fill_(math.nan)
        with pytest.raises(KnormError, match="FullCache"):
            measure_retrieval(model, [PRESS], [haystack()])

    def test_without_a_text_or_a_method_nothing_is_found(self) -> None:
        (found,) = measure([PRESS])
        assert (found.asked, found.items, str(found.share)) == ({}, (), "0 of 0")
        assert measure([], known()) == []

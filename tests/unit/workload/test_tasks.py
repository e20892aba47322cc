"""Texts with something to find: that it can be found, where and in the tokens that are asked for, and no test leaks."""

from __future__ import annotations

import pydoc_data.topics
import re
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from knormpress.errors import KnormError
from knormpress.workload.bench import Bench
from knormpress.workload.corpora import load_corpus
from knormpress.workload.tasks.draft import Draft
from knormpress.workload.tasks.draw import FILLER, LENGTHS, Draw, Which
from knormpress.workload.tasks.haystack import DEFAULT_TASKS, TASKS, Haystack, haystacks, named_tasks

COUNT = 4
SETS: tuple[Which, ...] = ("calibration", "held-out")
LINES = [name for name, task in TASKS.items() if task.body == "lines"]
BODIED = [name for name in TASKS if name not in LINES]
PROSE = " ".join(pydoc_data.topics.topics.values())

# Their needles are data without a sentence: the form is the task, and only names and values differ between the sets.
FORMS = {"json", "variables", "common-word", "frequent-words"}

SPLITS: dict[str, Any] = {
    # A number is a token or a few, as in GPT-2.
    "numbers": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    # A digit is a token, as in SmolLM2.
    "digits": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    # Three digits from the left are a token, without the space before, as in Llama 3.
    "threes": [
        pre_tokenizers.Split(Regex(r"\d{1,3}| ?\p{L}+| ?[^\s\p{L}\d]+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


@cache
def trained(name: str) -> Any:
    """A tokenizer of bytes that were merged by how often they meet in prose, and in numbers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[name])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(
        [PROSE[:60_000], *(f"code {number}." for number in range(10_000, 40_000, 7))], trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def spaced() -> Any:
    """A space in front of each text, and a token a digit, as in Llama 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=sorted(set(PROSE)), show_progress=False)
    tokenizer.train_from_iterator([PROSE[:60_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def bytewise(model_folder: Path) -> Bench:
    """A token a byte, of which each text begins with a token of its own."""
    corpus = load_corpus(str(model_folder / "text.txt"))
    bench = Bench.open(str(model_folder), corpus, device=torch.device("cpu"), dtype="float32")
    return tokenised(bench, bench.tokenizer)


def tokenised(bench: Bench, tokenizer: Any, text: str = PROSE[:150_000], **changes: Any) -> Bench:
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return replace(bench, tokenizer=tokenizer, ids=torch.tensor(ids), **changes)


@pytest.fixture(scope="module", params=["bytes", *SPLITS, "spaced"])
def bench(request: pytest.FixtureRequest, bytewise: Bench) -> Bench:
    if request.param == "bytes":
        return bytewise
    tokenizer = spaced() if request.param == "spaced" else trained(request.param)
    return tokenised(bytewise, tokenizer, start=torch.tensor([], dtype=torch.long))


@pytest.fixture(scope="module")
def made(bench: Bench) -> list[Haystack]:
    """Texts of all tasks and both sets."""
    return [text for which in SETS for text in haystacks(bench, ("all",), count=COUNT, which=which)]


def places(text: list[int], part: list[int]) -> list[int]:
    """Where ``part`` begins in ``text``."""
    return [place for place in range(len(text) - len(part) + 1) if text[place : place + len(part)] == part]


def written(bench: Bench, ids: torch.Tensor) -> str:
    text: str = bench.tokenizer.decode(ids)
    return text


def parts_of(bench: Bench, answer: torch.Tensor) -> list[list[int]]:
    """The tokens of each part of an answer, which commas separate; what repeats in front of each is no part of it."""
    parts: list[list[int]] = [[]]
    for token in answer.tolist():
        if bench.tokenizer.decode([token]).strip() == ",":
            parts.append([])
        else:
            parts[-1].append(token)
    named = bench.tokenizer("x VAR", add_special_tokens=False).input_ids
    own = named[len(bench.tokenizer("x", add_special_tokens=False).input_ids) :]
    return [part[len(own) :] if part[: len(own)] == own and len(part) > len(own) else part for part in parts]


class TestTexts:
    def test_a_text_has_the_length_asked_for(self, bench: Bench, made: list[Haystack]) -> None:
        for which, texts in zip(SETS, (made[: len(made) // 2], made[len(made) // 2 :]), strict=True):
            lengths = {name: {text.ids.shape[-1] for text in texts if text.task == name} for name in TASKS}
            assert all(lengths[name] == set(LENGTHS[which]) for name in BODIED)
            assert all(len(lengths[name]) == COUNT for name in LINES)

    @pytest.mark.parametrize("length", [600, 2_000])
    def test_a_text_of_lines_is_nearly_as_long(self, bench: Bench, length: int) -> None:
        roomy = replace(bench, model=bench.model.__class__(bench.model.config.__class__(**SMALL)))
        for text in haystacks(roomy, LINES, count=2, lengths=[length]):
            assert length / 2 < text.ids.shape[-1] <= length, text.task

    def test_each_text_of_a_task_is_numbered_and_begins_as_the_models_texts_do(
        self, bytewise: Bench, bench: Bench, made: list[Haystack]
    ) -> None:
        numbers = Counter((text.task, text.number) for text in made)
        assert set(numbers) == {(name, number) for name in TASKS for number in range(COUNT)}
        if bench is bytewise:
            assert all(text.ids[0, 0] == 0 and 0 not in text.ids[0, 1:] for text in made)

    def test_the_same_call_makes_the_same_texts(self, bench: Bench, made: list[Haystack]) -> None:
        for old, new in zip(made[len(made) // 2 :], haystacks(bench, ("all",), count=COUNT), strict=True):
            assert torch.equal(old.ids, new.ids)
            for one, other in zip(old.questions, new.questions, strict=True):
                assert torch.equal(one.ids, other.ids)
                assert torch.equal(one.answer, other.answer)
                assert one.name == other.name

    def test_another_seed_makes_other_texts(self, bench: Bench, made: list[Haystack]) -> None:
        """Each task with one of 24 words may draw the same one again, but not four times."""
        same = Counter(
            old.task
            for old, new in zip(made[len(made) // 2 :], haystacks(bench, ("all",), count=COUNT, seed=1), strict=True)
            if torch.equal(old.ids, new.ids)
        )
        assert set(same) <= {"instruction"}
        assert same["instruction"] < COUNT

    def test_every_text_of_a_task_is_another(self, made: list[Haystack]) -> None:
        for texts in (made[: len(made) // 2], made[len(made) // 2 :]):
            for name in TASKS:
                own = [text for text in texts if text.task == name]
                assert len({tuple(text.ids[0].tolist()) for text in own}) == len(own), name

    def test_the_questions_are_asked_in_turn_where_the_task_says_so(self, made: list[Haystack]) -> None:
        assert {text.task for text in made if text.in_turn} == {"turns"}


SMALL = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
}


class TestAnswers:
    def test_each_stands_in_the_text_in_the_tokens_that_are_asked_for(self, bench: Bench, made: list[Haystack]) -> None:
        for text in made:
            for question in text.questions:
                for part in parts_of(bench, question.answer):
                    assert part
                    assert places(text.ids[0].tolist(), part), (text.task, written(bench, question.answer))

    def test_none_is_in_the_question_itself(self, bench: Bench, made: list[Haystack]) -> None:
        for text in made:
            for question in text.questions:
                asked = written(bench, question.ids[0])
                for part in parts_of(bench, question.answer):
                    assert bench.tokenizer.decode(part).strip() not in asked, text.task

    def test_question_and_answer_together_are_as_the_model_would_read_them(
        self, bench: Bench, made: list[Haystack]
    ) -> None:
        for text in made:
            for question in text.questions:
                together = torch.cat([question.ids[0], question.answer])
                again = bench.tokenizer(written(bench, together), add_special_tokens=False).input_ids
                assert again[-len(question.answer) :] == question.answer.tolist(), text.task

    def test_the_other_values_stand_in_the_text_too_and_are_other_values(
        self, bench: Bench, made: list[Haystack]
    ) -> None:
        choices = set()
        for text in made:
            for question in text.questions:
                for other in question.others:
                    choices.add(text.task)
                    assert places(text.ids[0].tolist(), other.tolist())
                    assert written(bench, other) != written(bench, question.answer)
        assert {"multikey-prose", "multikey-filler", "list", "json", "needle-lines", "uuid-lines"} < choices

    def test_an_answer_stands_about_as_deep_as_its_question_says(self, bench: Bench, made: list[Haystack]) -> None:
        """A needle of a sentence comes after the end of the nearest sentence; a list is longer."""
        for text in made:
            if text.task == "instruction" or text.task in ("common-word", "frequent-words"):
                continue
            ids = text.ids[0].tolist()
            near = 0.2 if text.task in ("list", "json", "uuid-lines", "passkey") else 0.12
            for question in text.questions:
                found = [place for part in parts_of(bench, question.answer) for place in places(ids, part)]
                distance = min(abs(place / len(ids) - question.depth) for place in found)
                assert distance < near, (text.task, question.name, question.depth, distance)

    def test_the_instruction_stands_at_the_start(self, bench: Bench, made: list[Haystack]) -> None:
        for text in made:
            if text.task == "instruction":
                ids, answer = text.ids[0].tolist(), text.questions[0].answer.tolist()
                assert max(places(ids, answer)) < 0.4 * len(ids)


def sentences(words: int, end: str) -> str:
    """Prose of sentences of so many words."""
    every_word = re.sub("[.!?]", "", PROSE[:80_000]).split()
    return " ".join(f"{' '.join(every_word[at : at + words])}{end}" for at in range(0, len(every_word), words))


@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize(("words", "end"), [(12, "."), (12, "?"), (200, ".\n"), (8, "\n")])
@pytest.mark.parametrize("name", ["single-prose", "multikey-prose", "list", "passkey"])
def test_a_needle_stands_between_sentences_or_else_lines_or_else_where_it_should(
    bytewise: Bench, name: str, words: int, end: str, which: Which
) -> None:
    bench = tokenised(bytewise, trained("digits"), sentences(words, end))
    for text in haystacks(bench, (name,), count=5, which=which):
        ids, whole = text.ids[0].tolist(), written(bench, text.ids[0])
        for question in text.questions:
            before = whole[: whole.index(written(bench, question.answer))]
            start = max(before.rfind(form) for form in (" The locker", " The phone", "\nPrice", "\nStock", "\nThe "))
            if words < 200 or name == "passkey":
                assert before[:start].rstrip(" ")[-1] in f".!?{end}", before[start - 20 :]
            place = places(ids, question.answer.tolist())[0] / len(ids)
            assert abs(place - question.depth) < (0.2 if name == "list" else 0.14)


def every(draw: Draw) -> dict[str, set[Any]]:
    """Everything that a text can be made of."""
    return {
        "names": set(draw.names(24)),
        "words": set(draw.words(24)),
        "codes": set(draw.codes(40)),
        "short codes": {code[:5].upper() for code in draw.codes(40)},
        "numbers": set(draw.numbers(400)),
        "uuids": set(draw.uuids(40)),
        "depths": {depth for count in range(1, 11) for depth in draw.depths(count)},
        "filler": {f"{part}." for part in draw.filler().strip().rstrip(".").split(". ")},
    }


numbers, seeds = st.integers(0, 500), st.integers(0, 50)


class TestDraws:
    @given(*[st.sampled_from(sorted(TASKS))] * 2, *[numbers] * 2, *[seeds] * 2)
    def test_the_sets_share_nothing(self, task: str, other: str, number: int, another: int, a: int, b: int) -> None:
        seen, unseen = every(Draw("calibration", task, number, a)), every(Draw("held-out", other, another, b))
        for name, values in seen.items():
            assert values
            assert not values & unseen[name], name

    def test_nor_lengths_and_sentences(self) -> None:
        assert not set(LENGTHS["calibration"]) & set(LENGTHS["held-out"])
        assert not set(FILLER["calibration"]) & set(FILLER["held-out"])

    @given(st.sampled_from(SETS), numbers, st.integers(1, 10), seeds)
    def test_depths_rise_and_of_several_the_first_is_in_the_first_tenth(
        self, which: Which, number: int, count: int, seed: int
    ) -> None:
        depths = Draw(which, "task", number, seed).depths(count)
        assert len(depths) == count
        assert all(0 < depth < 1 for depth in depths)
        assert depths == sorted(set(depths))
        if count > 1:
            assert depths[0] < 0.1
            assert depths[-1] > 0.97 - 1 / count

    @pytest.mark.parametrize("which", SETS)
    def test_of_each_four_single_needles_one_is_in_the_first_tenth(self, which: Which) -> None:
        """At each length in turn: else what is lost at a depth could not be told from what is lost at a length."""

        def shallow(seed: int) -> set[int]:
            return {number for number in range(16) if Draw(which, "task", number, seed).depths(1)[0] < 0.1}

        always = set.intersection(*map(shallow, range(40)))
        assert [number // 4 for number in sorted(always)] == [0, 1, 2, 3]
        assert {number % 4 for number in always} == {0, 1, 2, 3}

    @given(st.sampled_from(SETS), numbers, seeds)
    def test_values_have_their_form(self, which: Which, number: int, seed: int) -> None:
        draw = Draw(which, "task", number, seed)
        assert all(re.fullmatch(r"[1-9]\d{4}", value) for value in draw.numbers(20))
        assert all(re.fullmatch(r"[a-z]{6}", code) for code in draw.codes(20))
        assert all(uuid.UUID(value).version == 4 for value in draw.uuids(5))
        for values in (draw.numbers(300), draw.codes(100), draw.names(24), draw.words(24), draw.uuids(50)):
            assert len(set(values)) == len(values)


def drafts(name: str, which: Which, lines: int = 60) -> Iterator[Draft]:
    for number in range(12):
        yield TASKS[name].write(Draw(which, name, number), lambda _: lines)


KNOWN = "|".join(word for which in SETS for word in (*Draw(which, "", 0).names(24), *Draw(which, "", 0).words(24)))


def template(text: str) -> str:
    """``text`` with a mark in place of each value."""
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|\d+", "#", text)
    return re.sub(rf"\b({KNOWN})\b", "@", text)


class TestWording:
    @pytest.mark.parametrize("name", TASKS)
    def test_the_sets_share_no_question(self, name: str) -> None:
        seen, unseen = (
            {template(one.question) for draft in drafts(name, which) for one in draft.asked} for which in SETS
        )
        assert seen
        assert not seen & unseen

    @pytest.mark.parametrize("name", sorted(set(TASKS) - FORMS))
    def test_the_sets_share_no_needle_and_no_beginning(self, name: str) -> None:
        seen, unseen = (
            {
                template(part)
                for draft in drafts(name, which)
                for part in (draft.head, *(text for _, text in draft.needles))
            }
            - {""}
            for which in SETS
        )
        assert seen
        assert not seen & unseen


def told(draft: Draft) -> list[tuple[str, str]]:
    """Each name and value that a text tells, in the order of the text, however it tells them."""
    text = "".join(needle for _, needle in draft.needles)
    sentences = re.findall(r"(?:code for|number of|codes for|numbers of) (.+?) is (.+?)\.", text)
    rows = re.findall(r'^(\w+): (\d+)$|"(\w+)": "(\d+)"', text, re.MULTILINE)
    return sentences + [(one or other, value or another) for one, value, other, another in rows]


class TestMeaning:
    """An answer is what a reader of the text would say, who takes the question at its word."""

    @pytest.mark.parametrize("which", SETS)
    @pytest.mark.parametrize(
        "name",
        ["single-prose", "single-filler", "multikey-prose", "multikey-filler", "list", "json", "turns", *LINES[:2]],
    )
    def test_one_value_of_one_name(self, name: str, which: Which) -> None:
        for draft in drafts(name, which):
            values = dict(told(draft))
            assert len(values) == len(told(draft)) >= len(draft.asked) >= 1
            for one in draft.asked:
                assert one.name in one.question
                assert one.answer.strip() == values[one.name]
                assert {other.strip() for other in one.others} <= set(values.values()) - {values[one.name]}

    @pytest.mark.parametrize("which", SETS)
    def test_several_values(self, which: Which) -> None:
        for draft in drafts("multiquery-prose", which):
            (one,) = draft.asked
            keys = re.findall("|".join(dict(told(draft))), one.question)
            assert one.answer == " " + ", ".join(dict(told(draft))[key] for key in keys)
            assert len(keys) == 4
        for draft in drafts("multivalue-prose", which):
            (one,) = draft.asked
            assert {key for key, _ in told(draft)} == {one.name}
            assert one.answer == " " + ", ".join(value for _, value in told(draft))
            assert len(told(draft)) == 4

    @pytest.mark.parametrize("which", SETS)
    def test_variables(self, which: Which) -> None:
        for draft in drafts("variables", which):
            (one,), held = draft.asked, {}
            for name, what in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", "".join(needle for _, needle in draft.needles)):
                held[name] = held.get(what, what)
            assert set(held.values()) == {one.name}
            assert one.name in one.question
            assert one.question.endswith(" VAR")
            assert one.answer == " " + ", VAR ".join(held)
            assert len(held) == 5

    @pytest.mark.parametrize("which", SETS)
    def test_one_number_and_one_signature(self, which: Which) -> None:
        for draft in drafts("passkey", which):
            ((_, needle),), (one,) = draft.needles, draft.asked
            assert re.findall(r"\d+", needle) == [one.answer.strip()] * 2
            assert one.question.split()[-4:-1] == needle.split()[:3]
        for draft in drafts("instruction", which):
            assert len(draft.asked) == 3
            for one in draft.asked:
                assert draft.head.count(f"{one.question.split()[-1]}{one.answer}") == 2


@given(st.integers(8, 400), st.sampled_from(SETS), numbers)
def test_the_words_that_come_most_often_are_the_answer(lines: int, which: Which, number: int) -> None:
    """Whatever fits: an answer that two words could be is none."""
    draft = TASKS["common-word"].write(Draw(which, "common-word", number), lambda _: lines)
    (first, most), (_, next_most) = Counter(line.split()[1] for _, line in draft.needles).most_common(2)
    assert draft.asked[0].answer == f" {first}"
    assert most > next_most
    draft = TASKS["frequent-words"].write(Draw(which, "frequent-words", number), lambda _: lines)
    counts = Counter(text.strip() for _, text in draft.needles).most_common(4)
    assert draft.asked[0].answer == " " + ", ".join(word for word, _ in counts[:3])
    assert len({times for _, times in counts}) == 4


@pytest.mark.parametrize("name", LINES)
def test_a_long_text_of_lines_is_made_of_what_there_is(name: str) -> None:
    (*_, draft) = drafts(name, "held-out", lines=5_000)
    assert len(draft.needles) > 500
    assert draft.asked


class TestDocuments:
    @pytest.mark.parametrize(("seen", "unseen"), [(4, 4), (12, 3), (1, 8), (5, 2)])
    def test_the_sets_share_no_part_of_the_text(self, bytewise: Bench, seen: int, unseen: int) -> None:
        """Nor do two texts of a task, however many of each set there are."""
        marked = replace(bytewise, ids=torch.arange(1_000, 1_000 + 40_000))
        parts = [
            [
                set(text.ids[0].tolist()) - set(range(1_000))
                for text in haystacks(marked, ("single-prose",), count=count, which=which)
            ]
            for count, which in ((seen, SETS[0]), (unseen, SETS[1]))
        ]
        every_part = [part for own in parts for part in own]
        assert all(part for part in every_part)
        assert sum(map(len, every_part)) == len(set().union(*every_part))


class TestRefusals:
    def refused(self, bench: Bench, message: str, *names: str, **options: Any) -> None:
        with pytest.raises(KnormError, match=message) as caught:
            haystacks(bench, names or DEFAULT_TASKS, **options)
        assert "\n" not in str(caught.value)

    def test_a_task_that_is_not_there(self, bytewise: Bench) -> None:
        self.refused(bytewise, "no task 'needle'; wanted all, or some of single-prose,", "needle")

    @pytest.mark.parametrize("count", [0, -1])
    def test_no_texts(self, bytewise: Bench, count: int) -> None:
        self.refused(bytewise, f"got {count} texts .*wanted at least 1", count=count)

    def test_a_text_that_is_too_short_for_its_parts(self, bytewise: Bench) -> None:
        short = replace(bytewise, ids=bytewise.ids[:10_399])
        self.refused(short, r"10,399 tokens, but 4 texts of 1,300 tokens .*need 10,400; use a longer", "list")
        assert haystacks(replace(bytewise, ids=bytewise.ids[:10_400]), ("list",))
        # Filler needs no text at all.
        assert haystacks(replace(bytewise, ids=bytewise.ids[:0]), ("passkey",))

    @pytest.mark.parametrize("name", TASKS)
    def test_too_few_tokens_for_what_must_be_found(self, bytewise: Bench, name: str) -> None:
        self.refused(bytewise, f"30 tokens are too few for {name}; use longer texts", name, lengths=[30])

    @pytest.mark.parametrize("name", ["passkey", "turns"])
    def test_too_few_positions(self, bytewise: Bench, name: str) -> None:
        """Just so many are enough: questions that are asked in turn all need theirs."""
        text = haystacks(bytewise, (name,), count=1, lengths=[900])[0]
        needed = 900 + sum(one.ids.shape[-1] + len(one.answer) for one in text.questions)

        def of(positions: int) -> Bench:
            config = bytewise.model.config.__class__(**SMALL | {"max_position_embeddings": positions})
            return replace(bytewise, model=bytewise.model.__class__(config))

        assert haystacks(of(needed), (name,), count=1, lengths=[900])
        message = rf"{needed - 1} positions, but {name} takes {needed}; .*--tasks none.*--target-retrieval none"
        self.refused(of(needed - 1), message, name, count=1, lengths=[900])

    @pytest.mark.parametrize(
        "merges",
        [[(digit, ".") for digit in "13579"], [("s", "Ġ")]],
        ids=["text", "question"],
    )
    def test_a_tokenizer_that_joins_an_answer_with_what_is_beside_it(
        self, bytewise: Bench, merges: list[tuple[str, str]]
    ) -> None:
        """A number ends with a full stop in the text and not in the question, or begins in the question."""
        symbols = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
        tokenizer = Tokenizer(models.BPE(vocab={symbol: n for n, symbol in enumerate(symbols)}, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        joined = replace(bytewise, tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer))
        message = (
            r"splits '\d{5}' differently in text and question, so single-filler can't .*leave it out, or use another"
        )
        self.refused(joined, message, "single-filler")


def test_all_stands_for_every_task_and_none_is_named_twice() -> None:
    assert [task.name for task in named_tasks(("all",))] == list(TASKS)
    assert [task.name for task in named_tasks(("json", "list", "json"))] == ["json", "list"]
    assert named_tasks(("list", "all"))[0].name == "list"
    assert len(named_tasks(("list", "all"))) == len(TASKS)
    assert named_tasks(()) == ()

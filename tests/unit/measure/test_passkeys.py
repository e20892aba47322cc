"""The passkey test: prompts that are what they say, and answers judged as greedy decoding gives them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from knormpress.errors import KnormError
from knormpress.measure import passkeys
from knormpress.measure.passkeys import ask_passkeys, passkey_prompts, prompts_for, read_key, score_passkey
from knormpress.measure.prefill import prefill
from knormpress.methods.knorm import KnormPress
from knormpress.progress import Progress
from knormpress.workload.bench import Bench
from knormpress.workload.corpora import load_corpus

CPU = torch.device("cpu")
START = torch.tensor([0])


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def model(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder).eval()


def prompts(tokenizer, which, count=40):
    return passkey_prompts(tokenizer, START, count=count, which=which, device=CPU)


def test_the_text_holds_the_key_and_has_the_length_asked_for(tokenizer):
    for which, lengths in (("calibration", {580, 780, 980, 1180}), ("held-out", {660, 860, 1060, 1300})):
        made = prompts(tokenizer, which)
        assert {prompt.text.shape[-1] for prompt in made} == lengths
        for prompt in made:
            key = tokenizer.decode(prompt.key).strip()
            assert len(key) in (5, 6)
            assert tokenizer.decode(prompt.text[0]).count(key) == 2
            assert tokenizer.decode(prompt.question[0]).rstrip().endswith("The pass key is")
            assert prompt.text[0, 0] == 0


def test_the_two_sets_share_nothing(tokenizer):
    seen, unseen = prompts(tokenizer, "calibration"), prompts(tokenizer, "held-out")

    def of(made):
        keys = {tokenizer.decode(prompt.key) for prompt in made}
        texts = [tokenizer.decode(prompt.text[0]).partition("\n")[2] for prompt in made]
        # Without the cut ends at the depth of the key, and its own three sentences.
        filler = {part for text in texts for line in text.split("\n")[::2] for part in line.split(". ")[1:-1]}
        return keys, {prompt.text.shape[-1] for prompt in made}, filler

    for mine, theirs in zip(of(seen), of(unseen), strict=True):
        assert mine
        assert not mine & theirs


def test_the_same_call_gives_the_same_prompts(tokenizer):
    for a, b in zip(prompts(tokenizer, "held-out", 5), prompts(tokenizer, "held-out", 5), strict=True):
        assert torch.equal(a.text, b.text)
        assert torch.equal(a.key, b.key)


def test_a_text_may_begin_with_no_token_of_its_own(tokenizer):
    """And whatever the tokenizer merges, question and key together end with the number."""
    (prompt,) = passkey_prompts(tokenizer, torch.tensor([], dtype=torch.long), count=1, which="held-out", device=CPU)
    assert prompt.text.shape[-1] == 660
    assert tokenizer.decode(torch.cat([prompt.question[0], prompt.key])).split()[-1].isdigit()


def spelled(model, prompt, tokens):
    """What greedy decoding gives after the question."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        prefill(model, prompt.text, cache)
        token, out = prefill(model, prompt.question, cache).argmax(-1), []
        for _ in range(tokens):
            out.append(int(token))
            token = prefill(model, token[None], cache).argmax(-1)
    return torch.tensor(out)


def filled(model, prompt):
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        prefill(model, prompt.text, cache)
    return cache


def test_found_is_what_greedy_decoding_spells(model, tokenizer):
    (prompt,) = prompts(tokenizer, "held-out", 1)
    right = replace(prompt, key=spelled(model, prompt, 5))
    assert read_key(model, right, filled(model, right)).found
    for place in range(5):
        wrong = right.key.clone()
        wrong[place] = (wrong[place] + 1) % 200
        assert not read_key(model, replace(right, key=wrong), filled(model, right)).found


def test_the_likelihood_is_that_of_the_whole_key(model, tokenizer):
    (prompt,) = prompts(tokenizer, "held-out", 1)
    with torch.no_grad():
        whole = torch.cat([prompt.text, prompt.question, prompt.key[None]], dim=-1)
        log_probabilities = model(whole).logits[0].double().log_softmax(-1)[-len(prompt.key) - 1 : -1]
    by_hand = -log_probabilities.gather(-1, prompt.key[:, None]).sum()
    assert read_key(model, prompt, filled(model, prompt)).nll == pytest.approx(float(by_hand), rel=1e-4)


def test_a_pruned_cache_is_asked_behind_its_pruning(model, tokenizer):
    (prompt,) = prompts(tokenizer, "held-out", 1)
    full, (whole, pruned) = score_passkey(model, prompt, [KnormPress(1.0), KnormPress(0.1)])
    assert full == read_key(model, prompt, filled(model, prompt))
    assert whole.nll == pytest.approx(full.nll, abs=1e-4)
    assert abs(pruned.nll - full.nll) > 1e-3


@pytest.fixture(scope="module")
def bench(model_folder):
    return Bench.open(str(model_folder), load_corpus(str(model_folder / "text.txt")), device=CPU, dtype="float32")


def test_only_what_the_full_cache_answers_counts(bench, monkeypatch):
    first, second, third = prompts_for(bench, count=3, which="held-out")
    known = [replace(prompt, key=spelled(bench.model, prompt, 3)) for prompt in (first, third)]
    monkeypatch.setattr(passkeys, "prompts_for", lambda *_, **__: [known[0], second, known[1]])

    steps = []

    class Told(Progress):
        def step(self, done, total, doing):
            steps.append((done, total))

    whole, pruned = ask_passkeys(bench, [KnormPress(1.0), KnormPress(0.02)], 3, Told())
    assert whole == (2, 2)
    assert pruned[0] < pruned[1] == 2
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_without_a_method_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(passkeys, "prompts_for", lambda *_, **__: pytest.fail("asked"))
    assert ask_passkeys(None, [], 3) == []


def test_what_can_not_be_asked_is_refused(bench, tokenizer):
    with pytest.raises(KnormError, match="at least 1"):
        prompts(tokenizer, "held-out", 0)
    config = bench.model.config.__class__(**bench.model.config.to_dict() | {"max_position_embeddings": 1200})
    short = replace(bench, model=bench.model.__class__(config))
    assert len(prompts_for(short, count=3, which="held-out")) == 3
    with pytest.raises(KnormError, match=r"1200 positions.*--target-passkey none"):
        prompts_for(short, count=4, which="held-out")

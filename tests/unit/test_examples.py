"""The examples as they are run: what they print is true, and only what is new goes through the model."""

from __future__ import annotations

import io
import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaForCausalLM

from knormpress import KnormCache, KnormPress
from knormpress.cache.fingerprint import model_fingerprint
from knormpress.records.plan import Plan, PlannedModel, PlannedTargets, write_plan
from tests.tiny_folder import save_model

EXAMPLES = Path(__file__).parents[2] / "examples"
# As in ChatML: a turn's end is one token for the model here too, "~".
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}~{% endfor %}{% if add_generation_prompt %}[]{% endif %}"
)
NEW = 12
PRESS = KnormPress(0.5, prune_after=24)

Example = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_model(tmp_path_factory.mktemp("chatty"), positions=1024)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """The tokens of every forward pass."""
    seen: list[list[int]] = []
    sound = LlamaForCausalLM.forward

    def forward(self: Any, input_ids: torch.Tensor, **more: Any) -> Any:
        seen.append(input_ids[0].tolist())
        return sound(self, input_ids=input_ids, **more)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    return seen


@pytest.fixture
def example(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Example:
    """Runs an example with the tiny model and what is to be typed; returns its status, stdout and stderr."""

    def run(name: str, *arguments: str, typed: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
        status = main(["--model", str(folder), "--max-new-tokens", str(NEW), "--prune-after", "24", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def turns(passes: list[list[int]]) -> list[list[list[int]]]:
    """The passes of each turn: several tokens at once, then one at a time."""
    starts = [number for number, tokens in enumerate(passes) if len(tokens) > 1]
    return [passes[start:end] for start, end in zip(starts, [*starts[1:], len(passes)], strict=True)]


def size(count: int) -> str:
    assert count < 1e6
    return f"{count / 1e3:.1f} kB"


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def by_hand(model: Any, passes: list[list[int]], cache: Any) -> Any:
    """``cache`` after these passes."""
    with torch.inference_mode():
        for tokens in passes:
            model(torch.tensor([tokens]), past_key_values=cache)
    return cache


def test_the_chat_tells_the_truth_of_its_cache(model: Any, example: Example, passes: list[list[int]]) -> None:
    status, out, err = example("chat", "--keep-ratio", "0.5", typed="hello\n\n" + "and a second one " * 9)
    assert (status, err) == (0, "")
    told = re.findall(r"^seen (\d+), stored (\d+) a layer, (.+) \(full cache (.+)\)$", out, re.MULTILINE)
    sent = turns(list(passes))
    assert len(told) == len(sent) == 2
    for number, shown in enumerate(told, start=1):
        until_now = [tokens for turn in sent[:number] for tokens in turn]
        cache = by_hand(model, until_now, KnormCache(model, PRESS))
        full = by_hand(model, until_now, DynamicCache(config=model.config))
        stats = cache.stats()
        assert shown == (
            str(full.get_seq_length()),
            f"{sum(one.stored for one in stats) / len(stats):.0f}",
            size(cache.nbytes),
            size(sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)),
        )
    assert stats[1].stored < stats[0].stored == stats[0].seen


def test_a_second_turn_sends_what_is_new_and_nothing_else(
    folder: Path, example: Example, passes: list[list[int]]
) -> None:
    _, out, _ = example("chat", typed="hello\nand more\n")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first, second = turns(passes)
    assert tokenizer.decode(first[0]) == "[user]hello~[]"
    # The reply was cut short: its last token has not been through the model yet, and the turn has no end yet.
    assert len(second[0]) == 1 + len("~[user]and more~[]")
    assert tokenizer.decode(second[0][1:]) == "~[user]and more~[]"
    seen = sum(map(len, passes))
    assert f"seen {seen}, " in out.splitlines()[-2]


def test_the_end_of_a_reply_is_sent_once(
    folder: Path, example: Example, passes: list[list[int]], tmp_path: Path
) -> None:
    example("chat", typed="hello")
    prompt, *reply = passes
    assert reply[0] != reply[1]
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": reply[1]}))
    passes.clear()
    example("chat", "--model", str(copy), typed="hello\nand more\n")
    first, second = turns(passes)
    assert first == [prompt, reply[0]]
    assert AutoTokenizer.from_pretrained(folder).decode(second[0]) == "~[user]and more~[]"


def answers(out: str) -> list[str]:
    return re.findall(r"(?:^|\n)\n(.*?)\nfirst token after", out, re.DOTALL)


def test_questions_on_a_saved_document_need_it_no_more(
    model: Any, folder: Path, example: Example, passes: list[list[int]], tmp_path: Path
) -> None:
    document, save = tmp_path / "document.txt", tmp_path / "document.safetensors"
    document.write_text("a long document " * 20)
    questions = ["what is it?", "how long?"]
    status, out, err = example(
        "long_document_qa", "--keep-ratio", "0.5", "--document", str(document), "--save", str(save), *questions
    )
    assert (status, err) == (0, "")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    read, first, second = turns(list(passes))
    assert tokenizer.decode(read[0]) == "[user]" + "a long document " * 20 + "\n\n"
    assert len(read) == 1
    assert len(answers(out)) == 2
    assert [tokenizer.decode(turn[0]) for turn in (first, second)] == [f"{asked}~[]" for asked in questions]
    cache = by_hand(model, read, KnormCache(model, PRESS))
    # The room for the next tokens is not saved.
    nbytes = KnormCache.load(save, model).nbytes
    shown = f"cache {size(nbytes)} for {cache.log.seen} tokens seen, file {size(save.stat().st_size)}"
    assert nbytes <= cache.nbytes
    assert out.count(shown) == 2
    assert re.search(r"^first token after 0\.\d{3} s, ", out, re.MULTILINE)

    document.unlink()
    passes.clear()
    status, again, err = example("long_document_qa", "--save", str(save), *reversed(questions))
    assert (status, err) == (0, "")
    # Nor does one question see another.
    assert turns(passes) == [second, first]
    assert answers(again) == answers(out)[::-1]


@pytest.mark.parametrize("name", ["chat", "long_document_qa"])
def test_a_plan_is_followed(name: str, model: Any, example: Example, tmp_path: Path) -> None:
    plan, save = tmp_path / "plan.json", tmp_path / "cache"
    press = KnormPress(layer_keep_ratios=(1.0, 0.5, 0.25))
    planned = PlannedModel(name="tiny", dtype="float32", fingerprint=model_fingerprint(model))
    targets = PlannedTargets(ppl=5.0, retrieval=None)
    write_plan(Plan(press=press, model=planned, targets=targets, calibration={}, held_out={}), plan)
    (tmp_path / "text").write_text("x" * 94)
    if name == "chat":
        # 100 tokens with those of the template, and one of the reply.
        _, out, _ = example(name, "--plan", str(plan), "--max-new-tokens", "1", typed="x" * 91)
        assert "seen 100, stored 58 a layer" in out
    else:
        example(name, "--plan", str(plan), "--document", str(tmp_path / "text"), "--save", str(save), "why?")
        cache = KnormCache.load(save, model)
        assert cache.press == replace(press, prune_after=24)
        assert [stats.stored for stats in cache.stats()] == [102, 51, 26]


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("chat", ["--keep-ratio", "2"], "keep_ratio is 2.0"),
        ("chat", ["--keep-ratio", "x"], "--keep-ratio: invalid float value: 'x'"),
        ("chat", ["--model", "./not/there"], "not/there"),
        ("chat", ["--plan", "no-plan.json"], "no-plan.json"),
        ("chat", ["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        ("chat", ["--prune-after", "0"], "prune_after is 0"),
        ("long_document_qa", [], "required: questions"),
        ("long_document_qa", ["why?", "--save", "no-file"], "no-file"),
        ("long_document_qa", ["why?", "--document", "no-file"], "no-file"),
        ("long_document_qa", ["why?", "--document", str(EXAMPLES / "chat.py")], "1024 positions"),
    ],
)
def test_wrong_input_is_one_line(
    name: str, arguments: list[str], named: str, example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = example(name, *arguments, typed="hello")
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert named in line


def test_a_tokenizer_without_a_template_is_one_line(tmp_path: Path, example: Example) -> None:
    save_model(tmp_path)
    status, _, err = example("chat", "--model", str(tmp_path), typed="hello")
    assert status == 2
    line = err.splitlines()[-1]
    assert line.startswith("error: ")
    assert "chat template" in line


def test_ctrl_c_ends_a_chat_without_a_traceback(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LlamaForCausalLM, "forward", interrupt)
    assert example("chat", typed="hello")[::2] == (0, "")

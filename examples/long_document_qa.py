"""Read a document once, keep its pruned cache in a file, and ask questions without reading it again.

python examples/long_document_qa.py --document README.md --save readme.safetensors "What is TPOT?"
python examples/long_document_qa.py --save readme.safetensors "Which schedules are there?" "Who wrote the paper?"
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import TextStreamer

from knormpress import KnormCache, KnormError, KnormPress
from knormpress.measure.prefill import prefill
from knormpress.workload.devices import resolve
from knormpress.workload.models import load_model

# Where the document ends and a question begins in the template's text.
SEAM = "<<question>>"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise KnormError(f"{message} (see --help)")


class Clock(TextStreamer):
    """Prints the answer as it comes, and notes when its first token came."""

    first: float | None = None

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt and self.first is None:
            self.first = time.perf_counter()
        super().put(value)


def size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def template(tokenizer: Any, content: str) -> str:
    if not tokenizer.chat_template:
        raise KnormError("the model's tokenizer has no chat template; give a model that was trained to chat")
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids.to(model.device)


def read(model: Any, tokenizer: Any, press: KnormPress, document: Path, save: Path) -> None:
    """Fill a cache with the document and save it."""
    try:
        text = document.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KnormError(f"the document {document} can't be read ({error}); give a text file in UTF-8") from error
    start = time.perf_counter()
    cache = KnormCache(model, press)
    head = template(tokenizer, f"{text}\n\n{SEAM}").rpartition(SEAM)[0]
    ids, most = encode(model, tokenizer, head), model.config.max_position_embeddings
    if ids.shape[1] > most:
        raise KnormError(
            f"{document} has {ids.shape[1]} tokens, and the model {most} positions; give a shorter document"
        )
    with torch.inference_mode():
        prefill(model, ids, cache)
    cache.save(save)
    seconds = time.perf_counter() - start
    print(f"{document}: {cache.get_seq_length()} tokens read, pruned and saved to {save} in {seconds:.2f} s")


def answer(model: Any, tokenizer: Any, save: Path, question: str, max_new_tokens: int) -> None:
    """Answer on a cache of its own, so that no question sees another one."""
    start = time.perf_counter()
    cache = KnormCache.load(save, model)
    nbytes, seen = cache.nbytes, cache.get_seq_length()
    new = encode(model, tokenizer, question + template(tokenizer, SEAM).partition(SEAM)[2])
    clock = Clock(tokenizer, skip_prompt=True, skip_special_tokens=True)
    print(f"\n{question}")
    # A mask longer than the tokens tells generate() that these are the new ones alone.
    mask = torch.ones(1, seen + new.shape[1], dtype=torch.long, device=model.device)
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id or 0}
    model.generate(new, attention_mask=mask, past_key_values=cache, streamer=clock, **settings)
    print(f"first token after {(clock.first or start) - start:.3f} s, loading the cache included; ", end="")
    print(f"cache {size(nbytes)} for {seen} tokens seen, file {size(save.stat().st_size)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("questions", nargs="+", help="each is answered on a fresh copy of the saved cache")
    parser.add_argument("--document", type=Path, help="a text file to read first; without it, --save is there already")
    parser.add_argument("--save", type=Path, default=Path("document.safetensors"), help="the file of the cache")
    parser.add_argument("--model", help="hub id or local folder; SmolLM2-135M-Instruct unless given")
    parser.add_argument("--keep-ratio", type=float, default=0.7, help="share of the document's tokens to keep")
    parser.add_argument("--plan", help="a plan of knormpress tune, in place of --keep-ratio")
    parser.add_argument("--prune-after", type=int, help="tokens a layer must have seen before it is pruned")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens of an answer at most")
    try:
        given = parser.parse_args(arguments)
        press = KnormPress(given.keep_ratio)
        if given.max_new_tokens < 1:
            raise KnormError(f"--max-new-tokens is {given.max_new_tokens}; wanted at least 1")
        loaded = load_model(given.model, device=resolve("auto"))
        model, tokenizer = loaded.model, loaded.tokenizer
        if given.document is not None:
            press = press if given.plan is None else KnormPress.from_plan(given.plan, model)
            press = press if given.prune_after is None else replace(press, prune_after=given.prune_after)
            read(model, tokenizer, press, given.document, given.save)
        for question in given.questions:
            answer(model, tokenizer, given.save, question, given.max_new_tokens)
    except KnormError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

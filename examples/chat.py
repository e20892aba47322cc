"""Chat through a pruned cache: every turn sends only its own tokens, and tells what the cache has seen and still holds.

python examples/chat.py --keep-ratio 0.5 --prune-after 256
python examples/chat.py --plan results/plan.json < questions.txt
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from transformers import TextStreamer

from knormpress import KnormCache, KnormError, KnormPress
from knormpress.cache.layer import KnormLayer
from knormpress.workload.devices import resolve
from knormpress.workload.models import load_model

# Stands for the replies so far when a later turn is put into the template: the cache holds them already.
REPLY = "<<reply>>"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise KnormError(f"{message} (see --help)")


def turn_text(tokenizer: Any, question: str, *, is_first: bool) -> str:
    """What the chat template puts between the last reply and the next one."""
    if not tokenizer.chat_template:
        raise KnormError("the model's tokenizer has no chat template; give a model that was trained to chat")
    before = [] if is_first else [{"role": "user", "content": "-"}, {"role": "assistant", "content": REPLY}]
    messages = [*before, {"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text if is_first else text.partition(REPLY)[2]


def size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def describe(cache: KnormCache) -> str:
    """The cache in one line: its bytes with their spare room, and those of the tokens that a full cache would hold."""
    full = 0
    for layer, stats in zip(cache.layers, cache.stats(), strict=True):
        token = layer.keys[:, :, :1].nbytes + layer.values[:, :, :1].nbytes
        full += stats.seen * token if isinstance(layer, KnormLayer) else stats.nbytes
    stored = statistics.fmean(stats.stored for stats in cache.stats())
    return f"seen {cache.get_seq_length()}, stored {stored:.0f} a layer, {size(cache.nbytes)} (full cache {size(full)})"


def chat(model: Any, tokenizer: Any, press: KnormPress, max_new_tokens: int) -> None:
    cache = KnormCache(model, press)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    unsent = torch.empty(1, 0, dtype=torch.long, device=model.device)
    while True:
        question = input("you: " if sys.stdin.isatty() else "").strip()
        if not question:
            continue
        seen = cache.get_seq_length()
        text = turn_text(tokenizer, question, is_first=seen == 0)
        new = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
        new = torch.cat([unsent, new], dim=1)
        # A mask longer than the tokens tells generate() that these are the new ones alone.
        mask = torch.ones(1, seen + new.shape[1], dtype=torch.long, device=model.device)
        tokens = model.generate(
            new,
            attention_mask=mask,
            past_key_values=cache,
            streamer=streamer,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
        # The last token never went through the model; one that ends the turn is in the next turn's text.
        unsent = tokens[:, cache.get_seq_length() - seen :]
        unsent = unsent[:, : 0 if int(tokens[0, -1]) in ends else None]
        print(describe(cache), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", help="hub id or local folder; SmolLM2-135M-Instruct unless given")
    parser.add_argument("--keep-ratio", type=float, default=0.7, help="share of the seen tokens to keep")
    parser.add_argument("--plan", help="a plan of knormpress tune, in place of --keep-ratio")
    parser.add_argument("--prune-after", type=int, help="tokens a layer must have seen before it is pruned")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="tokens of a reply at most")
    try:
        given = parser.parse_args(arguments)
        press = KnormPress(given.keep_ratio)
        if given.max_new_tokens < 1:
            raise KnormError(f"--max-new-tokens is {given.max_new_tokens}; wanted at least 1")
        loaded = load_model(given.model, device=resolve("auto"))
        press = press if given.plan is None else KnormPress.from_plan(given.plan, loaded.model)
        press = press if given.prune_after is None else replace(press, prune_after=given.prune_after)
        chat(loaded.model, loaded.tokenizer, press, given.max_new_tokens)
    except KnormError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (EOFError, KeyboardInterrupt):
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())

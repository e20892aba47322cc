"""A tiny random model with a tokenizer of bytes, and a text for it, as files for ``--model`` and ``--corpus``."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

START = "<s>"


def save_model(folder: Path, *, layers: int = 3, positions: int = 512) -> Path:
    """A Llama of three layers in float32; its tokenizer takes a token a byte and begins each text with ``<s>``."""
    set_seed(0)
    vocabulary = {START: 0} | {
        symbol: n for n, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=1)
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=positions,
            bos_token_id=0,
            eos_token_id=None,
        )
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=START).save_pretrained(folder)
    return folder


def save_text(path: Path, *, characters: int = 4000, seed: int = 0) -> Path:
    """So many characters, and so tokens, of made-up words."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefghijklmnop", k=chance.randint(2, 9))) for _ in range(characters)]
    path.write_text(" ".join(words)[:characters], encoding="ascii")
    return path

"""The options that several commands share, and how what is typed between commas is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from knormpress.errors import KnormError

__all__ = [
    "CorpusText",
    "Device",
    "Dtype",
    "Fresh",
    "Json",
    "Model",
    "NewTokens",
    "Output",
    "Precision",
    "PrefillChunk",
    "PromptTokens",
    "Rounds",
    "Samples",
    "Seconds",
    "number",
    "numbers",
    "words",
]

_Number = TypeVar("_Number", int, float)

Model = Annotated[str | None, typer.Option(help="Hub id or local folder; SmolLM2-135M-Instruct unless given.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps or xpu; several separated by commas.")]
Dtype = Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")]
CorpusText = Annotated[
    str | None,
    typer.Option("--corpus", help="wikitext, prose, or a text file; unless given, WikiText-2 where it can be had."),
]
PromptTokens = Annotated[str, typer.Option(help="Prompt lengths, separated by commas.")]
NewTokens = Annotated[int, typer.Option(help="Tokens to generate in each timed run, at least 2.")]
PrefillChunk = Annotated[int | None, typer.Option(help="Send prompts in chunks of so many tokens; whole unless given.")]
Samples = Annotated[
    int, typer.Option("--num-wikitext-samples", "--samples", help="Documents on which perplexity is measured.")
]
Rounds = Annotated[int, typer.Option(help="Timed pairs of runs for each cell at least.")]
Precision = Annotated[float, typer.Option(help="Half width in % of the timings' intervals at which no more are timed.")]
Seconds = Annotated[float, typer.Option(help="Beyond --rounds, no pair of a cell is begun after so many seconds.")]
Output = Annotated[Path, typer.Option(help="Folder of the results.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure everything anew; the earlier results are renamed.")]
Json = Annotated[bool, typer.Option("--json", help="Print what was found as JSON, and nothing else, to stdout.")]


def words(text: str) -> tuple[str, ...]:
    """What stands between the commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def number(option: str, text: str) -> float:
    """The one number that ``--option`` takes.

    Raises:
        KnormError: it is none.
    """
    try:
        return float(text)
    except ValueError:
        raise KnormError(f"--{option} is {text!r}; wanted one number") from None


def numbers(option: str, text: str, kind: Callable[[str], _Number]) -> tuple[_Number, ...]:
    """The numbers between the commas of ``--option``.

    Raises:
        KnormError: there are none, or something else.
    """
    found = words(text)
    if not found:
        raise KnormError(f"--{option} is empty; wanted numbers separated by commas")
    try:
        return tuple(kind(word) for word in found)
    except ValueError:
        wanted = "whole numbers" if kind is int else "numbers"
        raise KnormError(f"--{option} is {text!r}; wanted {wanted} separated by commas") from None

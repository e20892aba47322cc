"""Tasks that need many places of a text at once: following variables, and counting words.

After RULER (arXiv 2404.06654). Answers must have one right form here, as they are scored token by token: of the common
words only the most common is asked for, and the others are asked for in a stated order.
"""

from __future__ import annotations

from knormpress.workload.tasks.draft import Asked, Draft, Fits
from knormpress.workload.tasks.draw import Draw

__all__ = ["common_word", "frequent_words", "variables"]

_HOPS = 4
# Fewer words don't tell the third most frequent one from the fourth.
_LEAST_WORDS = 22


def variables(draw: Draw, _: Fits) -> Draft:
    """A chain of assignments of four hops; the variables that hold the value are asked for, in order."""
    names = [code[:5].upper() for code in draw.codes(_HOPS + 1)]
    (value,), depths = draw.numbers(1), draw.depths(_HOPS + 1)
    assigned = [value, *(f"VAR {name}" for name in names[:-1])]
    needles = tuple(
        (depth, f"\nVAR {name} = {what}\n") for depth, name, what in zip(depths, names, assigned, strict=True)
    )
    question = draw.pick(
        f"\nList every variable that holds {value}, the first one first. They are VAR",
        f"\nWhich variables have the value {value}, in the order of the text? The variables are VAR",
    )
    return Draft((Asked(value, question, " " + ", VAR ".join(names), depth=depths[0]),), needles)


def common_word(draw: Draw, fits: Fits) -> Draft:
    """A numbered list of words, one of which comes ten times as often as each other."""
    words = draw.words(12)
    common, others = words[0], words[1:]
    count = fits("100. umbrella ")
    often = max(4, count // 2)
    rows = [common] * often + [others[index % len(others)] for index in range(count - often)]
    lines = [f"{number}. {word} " for number, word in enumerate(draw.shuffled(rows), 1)]
    question = draw.pick(
        "\nOf all words in the list, this one comes most often:", "\nThe word that comes most often in the list is:"
    )
    asked = Asked("the most common word", question, f" {common}", tuple(f" {other}" for other in others[:3]))
    return Draft((asked,), tuple((row / len(lines), line) for row, line in enumerate(lines)))


def frequent_words(draw: Draw, fits: Fits) -> Draft:
    """Words without a meaning, where the n-th comes 1 / n^2 as often as the first; the first three are asked for."""
    codes = draw.codes(20)
    count = max(_LEAST_WORDS, fits(f" {codes[0]}"))
    weights = [1 / rank**2 for rank in range(1, len(codes) + 1)]
    times = [max(1, round(count * weight / sum(weights))) for weight in weights]
    rows = draw.shuffled([code for code, often in zip(codes, times, strict=True) for _ in range(often)])
    question = draw.pick(
        "\nThe three words that come most often, the most frequent first:",
        "\nWhat are the three most frequent words, the most frequent first? They are",
    )
    asked = Asked("the three most frequent words", question, " " + ", ".join(codes[:3]))
    return Draft((asked,), tuple((row / len(rows), f" {code}") for row, code in enumerate(rows)))

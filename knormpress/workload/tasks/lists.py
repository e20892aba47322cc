"""Lists of names and values: in the middle of a text, or filling it. One of the values is asked for.

A list and a JSON object in prose are what users put into prompts. A text of nothing but needles is RULER's multi-key 2,
and with UUIDs for keys and values its multi-key 3 (arXiv 2404.06654).
"""

from __future__ import annotations

from knormpress.workload.tasks.draft import Asked, Draft, Fits
from knormpress.workload.tasks.draw import Draw

__all__ = ["json_object", "lines_of_needles", "lines_of_uuids", "listed"]

_ROWS = 8
_ASKED = 4


def listed(draw: Draw, _: Fits) -> Draft:
    """Eight lines ``name: value`` at one depth."""
    names, values, (depth,) = draw.words(_ROWS), draw.numbers(_ROWS), draw.depths(1)
    block = "\n" + draw.pick("Stock list", "Price list") + "\n"
    block += "".join(f"{name}: {value}\n" for name, value in zip(names, values, strict=True))
    form = draw.pick("\nOne line of the stock list:\n{}:", "\nFrom the price list, this line:\n{}:")
    rows = [(name, value, depth) for name, value in zip(names, values, strict=True)]
    return Draft(_some(draw, rows, form, " {}"), ((depth, block),))


def json_object(draw: Draw, _: Fits) -> Draft:
    """An object of eight names and values at one depth."""
    names, values, (depth,) = draw.words(_ROWS), draw.numbers(_ROWS), draw.depths(1)
    pairs = ", ".join(f'"{name}": "{value}"' for name, value in zip(names, values, strict=True))
    form = draw.pick('\nOne entry of the JSON object: {{"{}": "', '\nFrom the JSON object, this entry: {{"{}": "')
    rows = [(name, value, depth) for name, value in zip(names, values, strict=True)]
    return Draft(_some(draw, rows, form, "{}"), ((depth, f"\n{{{pairs}}}\n"),))


def lines_of_needles(draw: Draw, fits: Fits) -> Draft:
    """Every line is a needle with a word for a key and a number for a value."""
    form = draw.pick("The phone code for {} is {}.\n", "The locker number of {} is {}.\n")
    count = fits(form.format("quarter yellow", "48213"))
    keys = [f"{first} {second}" for first in draw.words(24) for second in draw.names(24)]
    chosen = draw.shuffled(keys)[:count]
    return _lines(draw, form, chosen, draw.numbers(len(chosen)))


def lines_of_uuids(draw: Draw, fits: Fits) -> Draft:
    """Every line is a needle with UUIDs for key and value."""
    form = draw.pick("The phone code for {} is {}.\n", "The locker number of {} is {}.\n")
    count = fits(form.format(*[draw.uuids(1)[0]] * 2))
    return _lines(draw, form, draw.uuids(count), draw.uuids(count))


def _lines(draw: Draw, form: str, keys: list[str], values: list[str]) -> Draft:
    depths = [round(line / len(keys), 2) for line in range(len(keys))]
    lines = [form.format(key, value) for key, value in zip(keys, values, strict=True)]
    ask = draw.pick(
        "\nTell the phone code for {0}. The phone code for {0} is",
        "\nWhat is the locker number of {0}? The locker number of {0} is",
    )
    rows = list(zip(keys, values, depths, strict=True))
    return Draft(_some(draw, rows, ask, " {}"), tuple(zip(depths, lines, strict=True)))


def _some(draw: Draw, rows: list[tuple[str, str, float]], question: str, answer: str) -> tuple[Asked, ...]:
    """Four questions, spread over the rows (name, value, depth); the values of the others are the wrong choices."""
    first = draw.number % len(rows)
    asked = [rows[(part * len(rows) + first) // _ASKED % len(rows)] for part in range(_ASKED)]
    written = [answer.format(value) for _, value, _ in asked]
    return tuple(
        Asked(name, question.format(name), own, tuple(other for other in written if other != own), depth)
        for (name, _, depth), own in zip(asked, written, strict=True)
    )

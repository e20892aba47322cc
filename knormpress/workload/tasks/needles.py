"""Needles in a text: facts of one sentence each, and questions for one of them or for several.

After RULER's needle tasks (Hsieh et al., arXiv 2404.06654; ``synthetic.yaml``): one needle; four keys, one asked
(multi-key); four values of one key (multi-value); four keys, all asked (multi-query).
"""

from __future__ import annotations

from knormpress.workload.tasks.draft import Asked, Draft, Fits
from knormpress.workload.tasks.draw import Draw

__all__ = ["multi_key", "multi_query", "multi_value", "passkey", "single"]

_COUNT = 4


def single(draw: Draw, _: Fits) -> Draft:
    """One needle."""
    return _one_each(draw, 1)


def multi_key(draw: Draw, _: Fits) -> Draft:
    """Four needles with different keys; each key is asked for."""
    return _one_each(draw, _COUNT)


def multi_query(draw: Draw, _: Fits) -> Draft:
    """Four needles with different keys, all asked for in one question."""
    keys, values, depths = draw.names(_COUNT), draw.numbers(_COUNT), draw.depths(_COUNT)
    asked_keys = ", ".join(draw.shuffled(keys))
    by_key = dict(zip(keys, values, strict=True))
    question = draw.pick(
        f"\nTell the phone codes for {asked_keys}. In this order, the phone codes are",
        f"\nWhat are the locker numbers of {asked_keys}? In this order, the locker numbers are",
    )
    answer = " " + ", ".join(by_key[key] for key in asked_keys.split(", "))
    return Draft((Asked(asked_keys, question, answer, depth=depths[0]),), _needles(draw, keys, values, depths))


def multi_value(draw: Draw, _: Fits) -> Draft:
    """Four needles with the same key, whose values are asked for in the order of the text."""
    (key,), values, depths = draw.names(1), draw.numbers(_COUNT), draw.depths(_COUNT)
    form = draw.pick(" One of the phone codes for {} is {}.", " One of the locker numbers of {} is {}.")
    question = draw.pick(
        f"\nTell all phone codes for {key}, the first one first. The phone codes for {key} are",
        f"\nWhat are all the locker numbers of {key}, in the order of the text? The locker numbers of {key} are",
    )
    needles = tuple((depth, form.format(key, value)) for depth, value in zip(depths, values, strict=True))
    return Draft((Asked(key, question, " " + ", ".join(values), depth=depths[0]),), needles)


def passkey(draw: Draw, _: Fits) -> Draft:
    """A number in idle sentences, told twice (Mohtashami and Jaggi, arXiv 2305.16300)."""
    (key,), (depth,) = draw.numbers(1), draw.depths(1)
    head = draw.pick(
        "One number is hidden in the idle sentences of this text. Look for it, for you will be asked to tell it.\n",
        "Somewhere in this long and idle text stands a number that matters. Find it and keep it in mind.\n",
    )
    needle = draw.pick(
        f"\nThe secret number is {key}. Don't forget it. {key} is the secret number.\n",
        f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n",
    )
    question = draw.pick("\nTell the secret number. The secret number is", "\nWhat is the pass key? The pass key is")
    asked = Asked("pass key", question, f" {key}", depth=depth)
    return Draft((asked,), ((depth, needle),), head)


def _one_each(draw: Draw, count: int) -> Draft:
    keys, values, depths = draw.names(count), draw.numbers(count), draw.depths(count)
    form = draw.pick(
        "\nTell the phone code for {0}. The phone code for {0} is",
        "\nWhat is the locker number of {0}? The locker number of {0} is",
    )
    asked = tuple(
        Asked(key, form.format(key), f" {value}", tuple(f" {other}" for other in values if other != value), depth)
        for key, value, depth in zip(keys, values, depths, strict=True)
    )
    return Draft(asked, _needles(draw, keys, values, depths))


def _needles(draw: Draw, keys: list[str], values: list[str], depths: list[float]) -> tuple[tuple[float, str], ...]:
    form = draw.pick(" The phone code for {} is {}.", " The locker number of {} is {}.")
    return tuple((depth, form.format(key, value)) for depth, key, value in zip(depths, keys, values, strict=True))

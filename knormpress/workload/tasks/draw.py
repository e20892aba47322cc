"""What a task's text is drawn from: names, values, depths and lengths, in two sets that share none of them."""

from __future__ import annotations

import random
import uuid
from typing import Literal, TypeAlias

__all__ = ["FILLER", "LENGTHS", "Draw", "Which"]

Which: TypeAlias = Literal["calibration", "held-out"]
"""Calibration is what a search for a plan sees; held-out is what everything is measured on."""

LENGTHS: dict[Which, tuple[int, ...]] = {"calibration": (580, 780, 980, 1180), "held-out": (660, 860, 1060, 1300)}
"""Lengths in tokens of the texts with something to find."""

FILLER: dict[Which, tuple[str, ...]] = {
    "calibration": (
        "The river is wide.",
        "The dog is asleep.",
        "A cart goes by.",
        "The bread is warm.",
        "Snow lies on the hill.",
        "The door is open.",
        "We walk home.",
        "The lamp is lit.",
        "Rain falls again.",
        "The road is long.",
    ),
    "held-out": (
        "The grass is green.",
        "The sky is blue.",
        "The sun is yellow.",
        "Here we go.",
        "There and back again.",
        "A boat comes in.",
        "The field is empty.",
        "The wind is cold.",
        "Leaves turn red.",
        "The moon is up.",
    ),
}
"""Idle sentences, in place of prose."""

_NAMES: dict[Which, str] = {
    "calibration": (
        "Oslo Cairo Lima Delhi Quito Hanoi Dublin Athens Lagos Sofia Tunis Prague Berlin Madrid Havana Kyoto "
        "Boston Naples Geneva Austin Denver Moscow Ankara Baghdad"
    ),
    "held-out": (
        "Paris Tokyo Rome Vienna Lisbon Seoul Nairobi Warsaw Sydney Toronto Chicago Dallas Milan Zurich "
        "Bogota Manila Jakarta Tehran Riga Helsinki Munich Seattle Phoenix Venice"
    ),
}

_WORDS: dict[Which, str] = {
    "calibration": (
        "apple bridge candle desert engine forest garden hammer island jacket kitchen ladder market needle "
        "orange pencil quarter ribbon saddle ticket umbrella valley window yellow"
    ),
    "held-out": (
        "anchor basket carpet dragon eagle feather guitar harbor insect jungle kettle lemon mirror napkin "
        "oven pillow rabbit shovel temple tunnel velvet wagon whistle zebra"
    ),
}

# Steps of depth; the sets take turns at them.
_STEPS = 50
_SHALLOW = 4


class Draw:
    """Draws for one text; the same arguments give the same draws.

    Args:
        which: the set.
        task: the task's name.
        number: the text's number in its task.
        seed: another seed gives other texts.
    """

    def __init__(self, which: Which, task: str, number: int, seed: int = 0) -> None:
        self.which, self.number = which, number
        self._random = random.Random(f"{which} {task} {number} {seed}")

    def pick(self, calibration: str, held_out: str) -> str:
        """The wording of the set."""
        return calibration if self.which == "calibration" else held_out

    def names(self, count: int) -> list[str]:
        """Different names of places."""
        return self._random.sample(_NAMES[self.which].split(), count)

    def words(self, count: int) -> list[str]:
        """Different everyday words."""
        return self._random.sample(_WORDS[self.which].split(), count)

    def codes(self, count: int) -> list[str]:
        """Different words without a meaning, of six letters; those of calibration begin with a vowel."""
        firsts, rest = ("aeiou", "bcdfghjklmnprstvz"), "abcdefghijklmnoprstuvz"
        first = firsts[self.which == "held-out"]
        drawn: dict[str, None] = {}
        while len(drawn) < count:
            drawn["".join((self._random.choice(first), *self._random.choices(rest, k=5)))] = None
        return list(drawn)

    def numbers(self, count: int) -> list[str]:
        """Different numbers of five digits; those of calibration are even, those that are held out odd."""
        odd = self.which == "held-out"
        return [str(2 * half + odd) for half in self._random.sample(range(5_000, 50_000), count)]

    def uuids(self, count: int) -> list[str]:
        """Different UUIDs (version 4)."""
        return [str(uuid.UUID(int=self._random.getrandbits(128), version=4)) for _ in range(count)]

    def depths(self, count: int) -> list[float]:
        """Ascending depths as shares of the text, one in each of ``count`` equal parts.

        The first of several lies in the first tenth, and so does that of one in four texts with one, each time at
        another of four lengths: a method that keeps the newest nine tokens of ten must lose something.
        """
        parts = [(part * _STEPS // count, (part + 1) * _STEPS // count) for part in range(count)]
        if count > 1 or (self.number + self.number // 4) % 4 == 0:
            parts[0] = (1, 1 + _SHALLOW)
        odd = self.which == "calibration"
        return [(2 * self._random.randrange(max(1, low), high - (high == _STEPS)) + odd) / 100 for low, high in parts]

    def shuffled(self, values: list[str]) -> list[str]:
        """``values`` in another order."""
        return self._random.sample(values, len(values))

    def filler(self) -> str:
        """Six idle sentences, which repeat."""
        return " ".join(self._random.sample(FILLER[self.which], 6)) + " "

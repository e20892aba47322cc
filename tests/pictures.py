"""What tests ask of pictures: their size, and whether all that is written stands apart and inside."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

Drawn = dict[Figure, list[tuple[str, Bbox]]]


def size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def faults(drawn: Drawn) -> list[str]:
    found = []
    for figure, texts in drawn.items():
        width, height = figure.get_size_inches() * figure.dpi
        for text, box in texts:
            if box.x0 < 4 or box.y0 < 2 or box.x1 > width - 4 or box.y1 > height - 2:
                found.append(f"{text!r} is not inside: {box.extents}")
        for (one, box), (other, second) in combinations(texts, 2):
            shared = Bbox.intersection(box, second)
            if shared is not None and shared.width > 1 and shared.height > 1:
                found.append(f"{one!r} and {other!r} overlap: {shared.extents}")
    return found

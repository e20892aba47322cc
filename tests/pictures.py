"""What tests ask of pictures: their size, and whether all that is written stands apart and inside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

Drawn = dict[Figure, list[tuple[str, Bbox]]]

# Of two boxes (x0, y0, x1, y1), where the part that they share begins and ends.
_SHARED = ((np.maximum, slice(0, 2)), (np.minimum, slice(2, 4)))


def size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG in pixels."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def faults(drawn: Drawn) -> list[str]:
    """Texts that reach out of their picture, and pairs of texts that overlap by more than a pixel."""
    found = []
    for figure, texts in drawn.items():
        width, height = figure.get_size_inches() * figure.dpi
        boxes = np.array([box.extents for _, box in texts])
        for (text, _), (x0, y0, x1, y1) in zip(texts, boxes, strict=True):
            if x0 < 4 or y0 < 2 or x1 > width - 4 or y1 > height - 2:
                found.append(f"{text!r} is not inside: {x0, y0, x1, y1}")
        low, high = (reach(boxes[:, None, ends], boxes[None, :, ends]) for reach, ends in _SHARED)
        for one, other in np.argwhere(np.triu((high - low > 1).all(axis=2), 1)):
            found.append(f"{texts[one][0]!r} and {texts[other][0]!r} overlap: {low[one, other]} to {high[one, other]}")
    return found

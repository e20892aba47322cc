"""Plans as ``knormpress tune`` would write them, of figures that a test chooses."""

from __future__ import annotations

from typing import Any

from knormpress import KnormPress
from knormpress.records.plan import KeptTokens, Plan, Point, Sensitivities

LAYERS = 6
TUNED = KnormPress(layer_keep_ratios=(0.9, 0.1, 0.2, 0.4, 0.3, 0.5), keep_recent=64)
TOKENS = ("The", " tower", " is", " 324", " met", "res", " tall", ".", "\n\n", " It", " was", " the", " first", ".")


def make_point(
    name: str, mean_keep: float, ppl: float, found: tuple[int, int] | None = None, press: KnormPress | None = None
) -> Point:
    """A point whose interval reaches 40 % of ``ppl`` to both sides."""
    reach = 0.4 * abs(ppl)
    press = press or KnormPress(mean_keep)
    interval = (ppl, ppl - reach, ppl + 2 * reach)
    return Point(name=name, press=press, mean_keep=mean_keep, ppl=interval, kl=ppl / 100, found=found)


POINTS = (
    # Another method under the plan's own policy, first, must not be taken for the plan.
    make_point("keydiff", 0.4, 5.2, (30, 40), press=TUNED),
    make_point("uniform", 0.5, 16.7, (30, 40)),
    make_point("uniform", 0.9, 1.25, (40, 40)),
    make_point("uniform", 0.7, 6.4, (38, 40)),
    make_point("tuned", 0.65, 0.4, (40, 40)),
    make_point("tuned", 0.4, 2.9, (36, 40), press=TUNED),
    make_point("tuned", 0.25, 8.0),
    make_point("random", 0.5, 140.0, (18, 40)),
)


def make_plan(**parts: Any) -> Plan:
    """A whole plan of six layers, with ``parts`` in place of its own."""
    text = tuple(tuple(0.02 / (layer + 1) / ratio - 0.01 for ratio in (0.1, 0.5)) for layer in range(LAYERS))
    answers = tuple((0.5 - 0.2 * layer, 0.0) for layer in range(LAYERS))
    kept = tuple(tuple((layer + token) % 4 / 3 for token in range(len(TOKENS))) for layer in range(LAYERS))
    whole: dict[str, Any] = {
        "press": TUNED,
        "model": {"name": "SmolLM2-135M-Instruct", "dtype": "float32", "fingerprint": "0123abcd"},
        "targets": {"ppl": 5.0, "retrieval": 0.9},
        "calibration": {"text": "WikiText-2 validation, first half", "documents": 6, "texts": 8},
        "held_out": {
            "text": "WikiText-2 validation, second half",
            "documents": 12,
            "texts": 16,
            "scored": 256,
            "context": 1024,
        },
        "frontier": POINTS,
        "sensitivities": Sensitivities(ratios=(0.1, 0.5), text=text, answers=answers),
        "kept": KeptTokens(tokens=TOKENS, layers=kept),
        "made": {"created": "2026-11-24T13:48:18+00:00", "knormpress": "0.1.0"},
    }
    return Plan(**{**whole, **parts})

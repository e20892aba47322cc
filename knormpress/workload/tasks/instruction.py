"""An instruction at the start of a text that must still be followed at its end.

"The Pitfalls of KV Cache Compression" (arXiv 2510.00231) shows that instructions are lost unevenly.
"""

from __future__ import annotations

from knormpress.workload.tasks.draft import Asked, Draft, Fits
from knormpress.workload.tasks.draw import Draw

__all__ = ["instruction"]

_ANSWERED = {
    "calibration": (("How many legs has a dog?", "Four"), ("What do bees make?", "Honey"), ("Is ice cold?", "Yes")),
    "held-out": (("What colour is snow?", "White"), ("What do cows drink?", "Water"), ("Is fire hot?", "Yes")),
}


def instruction(draw: Draw, _: Fits) -> Draft:
    """Sign every answer with a given word; the answers are given, and the word must follow."""
    (signature,) = draw.words(1)
    head = draw.pick(
        f"Each answer is followed by the signature of captain {signature}.\n"
        f"Question: What is two plus two?\nAnswer: Four, says captain {signature}.\n\n",
        f"Instruction: sign every answer with the name of doctor {signature}.\n"
        f"Question: What day comes after Monday?\nAnswer: Tuesday, signed by doctor {signature}.\n\n",
    )
    sign = draw.pick("says captain", "signed by doctor")
    asked = tuple(
        Asked(question, f"\n\nQuestion: {question}\nAnswer: {answer}, {sign}", f" {signature}")
        for question, answer in _ANSWERED[draw.which]
    )
    return Draft(asked, head=head)

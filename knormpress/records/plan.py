"""The complete plan file: a policy with one ratio per layer, its model, and the measurements of its search.

JSON, written by ``knormpress tune``. ``policy.plan`` reads only what pruning needs, without this module's libraries.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, Field, FiniteFloat, NonNegativeInt, ValidationError, model_validator
from pydantic.functional_serializers import PlainSerializer

from knormpress.errors import KnormError
from knormpress.files import replacing
from knormpress.policy.plan import FORMAT, expect_model, read_plan_file
from knormpress.policy.policy import Policy
from knormpress.records.figures import Quality, Strict
from knormpress.records.jsonl import fault
from knormpress.records.retrieval import Retrieval
from knormpress.stats.intervals import Change

__all__ = ["KeptTokens", "Plan", "PlannedModel", "PlannedTargets", "Point", "Sensitivities", "read_plan", "write_plan"]

_Policy = Annotated[Policy, PlainSerializer(Policy.as_dict)]


class PlannedModel(Strict):
    """The model that a plan was tuned for; ``fingerprint`` as in ``cache.fingerprint``."""

    name: str
    dtype: str
    fingerprint: str


class PlannedTargets(Strict):
    """The user's targets: ``ppl``, a rise of perplexity in %, and ``retrieval``, a share of the items, or None."""

    ppl: FiniteFloat
    retrieval: FiniteFloat | None = Field(validation_alias=AliasChoices("retrieval", "passkey"))


class Point(Strict):
    """A method under one policy, measured on held-out documents and items.

    Args:
        name: ``"tuned"``, ``"tuned for perplexity"``, ``"uniform"``, or the name of another method.
        press: the policy.
        mean_keep: mean of the layers' keep ratios.
        ppl: change of perplexity in %, and the ends of its 95 % interval.
        kl: mean divergence from the full cache's predictions, in nats.
        found: how many items were found, and how many the full cache finds; None if none were asked.
        ends: the ends of the 95 % interval of their share; None in plans of earlier versions.
    """

    name: str
    press: _Policy
    mean_keep: FiniteFloat
    ppl: tuple[FiniteFloat, FiniteFloat, FiniteFloat]
    kl: FiniteFloat
    found: tuple[NonNegativeInt, NonNegativeInt] | None = Field(
        default=None, validation_alias=AliasChoices("found", "passkeys")
    )
    ends: tuple[FiniteFloat, FiniteFloat] | None = None

    @classmethod
    def of(
        cls, name: str, press: Policy, quality: Quality, *, layers: int, retrieval: Retrieval | None = None
    ) -> Point:
        """The point of a scored method; ``layers`` is the model's number of layers."""
        ratios = press.ratios(layers)
        ppl = (quality.ppl.percent, *quality.ppl.ends)
        mean_keep = sum(ratios) / len(ratios)
        found = ends = None
        # Where the full cache finds nothing, nothing can be lost.
        if retrieval is not None and retrieval.share.known:
            share = retrieval.share
            found, ends = (share.found, share.known), (share.low, share.high)
        return cls(name=name, press=press, mean_keep=mean_keep, ppl=ppl, kl=quality.kl, found=found, ends=ends)

    @property
    def change(self) -> Change:
        """The change of perplexity with its interval."""
        return Change(*self.ppl)

    @property
    def share(self) -> float:
        """The share of the full cache's items that were found; NaN if there are none."""
        found, known = self.found or (0, 0)
        return found / known if known else float("nan")


class Sensitivities(Strict):
    """The damage of pruning one layer alone, on the calibration text: ``text[i][j]`` for layer i at ``ratios[j]``.

    ``text`` is the mean of the divergence and of the rise of the negative log-likelihood, in nats per token;
    ``answers`` is the rise of an answer's negative log-likelihood, in nats. Both are of the layer's best score.
    """

    ratios: tuple[FiniteFloat, ...]
    text: tuple[tuple[FiniteFloat, ...], ...]
    answers: tuple[tuple[FiniteFloat, ...], ...] = Field(validation_alias=AliasChoices("answers", "passkey"))

    @model_validator(mode="after")
    def _rows_are_alike(self) -> Sensitivities:
        if not self.ratios or any(len(row) != len(self.ratios) for row in (*self.text, *self.answers)):
            raise ValueError("the sensitivities of the layers differ in length")
        return self


class KeptTokens(Strict):
    """Some tokens of a text and, for each layer, the share of the key-value heads that keep each token."""

    tokens: tuple[str, ...]
    layers: tuple[tuple[FiniteFloat, ...], ...]

    @model_validator(mode="after")
    def _rows_are_alike(self) -> KeptTokens:
        if not self.layers or any(len(row) != len(self.tokens) for row in self.layers):
            raise ValueError("the kept tokens and their shares differ in number")
        return self


class Plan(Strict):
    """A policy for one model, and how it was found.

    Args:
        press: the policy.
        model: the model that it is for.
        targets: the user's targets.
        calibration, held_out: text, documents and tasks that the search used, and those that ``frontier`` was
            measured on; ``numbers`` are the documents used, out of ``cut_into``.
        frontier: the plan and what it is compared with, measured on data that the search did not use.
        sensitivities: see ``Sensitivities``.
        kept: see ``KeptTokens``.
        made: the time, and the version of KnormPress.
    """

    press: _Policy
    model: PlannedModel
    targets: PlannedTargets
    calibration: dict[str, Any]
    held_out: dict[str, Any]
    frontier: tuple[Point, ...] = ()
    sensitivities: Sensitivities | None = None
    kept: KeptTokens | None = None
    made: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _says_what_the_frontier_was_measured_on(self) -> Plan:
        needed: Sequence[str] = ("documents", "scored", "context") if self.frontier else ()
        missing = [name for name in needed if not isinstance(self.held_out.get(name), int)]
        if missing:
            raise ValueError(f"held_out.{missing[0]} is not a number")
        return self

    @property
    def mean_keep(self) -> float:
        """Mean of the layers' keep ratios."""
        return self.press.mean_keep

    @property
    def items(self) -> str:
        """What was asked for, in a word: in plans of earlier versions passkeys."""
        return "passkeys" if "passkeys" in self.held_out else "items"

    def is_own(self, point: Point) -> bool:
        """Whether ``point`` is the plan itself, not something that it is compared with."""
        return point.name == "tuned" and point.press == self.press

    def expect(self, fingerprint: str, where: str) -> None:
        """Check that the plan is for the model with ``fingerprint``.

        Raises:
            KnormError: the plan is for another model.
        """
        expect_model(self.model.model_dump(), fingerprint, where)


def write_plan(plan: Plan, path: Path) -> None:
    """Write ``plan`` to ``path``, which is never left half written.

    Raises:
        KnormError: the file can't be written.
    """
    values = {"format": FORMAT, **plan.model_dump(mode="json")}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(values, allow_nan=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise KnormError(f"the plan can't be written to {path} ({error.strerror}); use another --output") from error


def read_plan(path: str | Path) -> Plan:
    """Read a plan that ``write_plan`` wrote.

    Raises:
        KnormError: the file is missing, or is not a plan in this format.
    """
    try:
        # For JSON, strict mode accepts a list as a tuple, but not a text as a number.
        return Plan.model_validate_json(json.dumps(read_plan_file(path)), strict=True)
    except (ValidationError, TypeError) as error:
        reason = fault(error) if isinstance(error, ValidationError) else error
        raise KnormError(f"{path} is not a complete plan ({reason}); make it again: knormpress tune") from error

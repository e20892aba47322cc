"""The plan file: a policy with one ratio per layer, the model it is for, and what was measured on the way to it.

JSON, written by ``knormpress tune`` and read by ``KnormPress.from_plan`` and ``--plan``. Needs neither torch nor numpy.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from knormpress.errors import KnormError
from knormpress.files import replacing
from knormpress.press import KnormPress

__all__ = ["FORMAT", "KeptTokens", "Plan", "Point", "Sensitivities", "read_plan", "write_plan"]

FORMAT = "knormpress-plan-1"
"""The version of the file format: a file of any other is refused."""


@dataclass(frozen=True)
class Point:
    """A method under one policy, measured on held-out documents and passkeys.

    Args:
        name: ``"tuned"``, ``"tuned for perplexity"``, ``"uniform"``, or the name of another method.
        press: the policy.
        mean_keep: mean of the layers' keep ratios.
        ppl: change of perplexity in %, and the ends of its 95 % interval.
        kl: mean divergence from the full cache's predictions, in nats.
        passkeys: how many were found, of how many that the full cache finds; None where it was not tried.
    """

    name: str
    press: KnormPress
    mean_keep: float
    ppl: tuple[float, float, float]
    kl: float
    passkeys: tuple[int, int] | None = None


@dataclass(frozen=True)
class Sensitivities:
    """What pruning one layer alone does, on the calibration text: ``text[i][j]`` of layer i at ``ratios[j]``.

    ``text`` is in nats a token: the mean of the divergence and of the rise of the negative log-likelihood; ``passkey``
    the rise of a key's negative log-likelihood, in nats.
    """

    ratios: tuple[float, ...]
    text: tuple[tuple[float, ...], ...]
    passkey: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class KeptTokens:
    """A stretch of text and, for each layer, the share of the key-value heads that keep each of its tokens."""

    tokens: tuple[str, ...]
    layers: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Plan:
    """A policy for one model, and how it was found.

    Args:
        press: the policy.
        model: ``name``, ``dtype`` and ``fingerprint`` (see ``fingerprints.model_fingerprint``) of the model.
        targets: what was asked for: ``ppl`` in %, ``passkey`` as a share, or None.
        calibration, held_out: text, documents and passkeys that the search saw, and those that ``frontier`` was
            measured on: of ``cut_into`` documents those of the given ``numbers``.
        frontier: the plan and what it is compared with, measured on what the search did not see.
        sensitivities: see there.
        kept: see ``KeptTokens``.
        made: when and by what.
    """

    press: KnormPress
    model: dict[str, str]
    targets: dict[str, float | None]
    calibration: dict[str, Any]
    held_out: dict[str, Any]
    frontier: tuple[Point, ...] = ()
    sensitivities: Sensitivities | None = None
    kept: KeptTokens | None = None
    made: dict[str, str] = field(default_factory=dict)

    @property
    def mean_keep(self) -> float:
        """Mean of the layers' keep ratios."""
        return statistics.fmean(self.press.layer_keep_ratios or (self.press.keep_ratio,))

    def expect(self, fingerprint: str, where: str) -> None:
        """Check that the plan is for the model with ``fingerprint``.

        Raises:
            KnormError: it is for another one.
        """
        if self.model["fingerprint"] != fingerprint:
            raise KnormError(
                f"{where} is a plan for {self.model['name']} in {self.model['dtype']} (fingerprint "
                f"{self.model['fingerprint']}), not for this model ({fingerprint}); tune one for it: knormpress tune"
            )


def write_plan(plan: Plan, path: Path) -> None:
    """Write ``plan`` to ``path``: beside it, then renamed over it.

    Raises:
        KnormError: the file can't be written.
    """
    values = {"format": FORMAT, **asdict(plan)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_text(json.dumps(values, allow_nan=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise KnormError(f"the plan can't be written to {path} ({error.strerror}); choose another --output") from error


def read_plan(path: str | Path) -> Plan:
    """The plan that ``write_plan`` wrote.

    Raises:
        KnormError: the file is missing or no plan of this format.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise KnormError(f"no plan can be read from {path} ({error.strerror}); make one: knormpress tune") from error
    except (ValueError, RecursionError) as error:
        raise KnormError(f"{path} is no plan: it is not whole JSON ({error}); make one: knormpress tune") from error
    found = values.pop("format", None) if isinstance(values, dict) else None
    if found != FORMAT:
        raise KnormError(f"{path} has format {found!r}; wanted {FORMAT!r}, as knormpress tune writes it")
    try:
        plan = Plan(
            press=KnormPress(**_tuples(values.pop("press"))),
            frontier=tuple(map(_point, values.pop("frontier"))),
            sensitivities=_made(Sensitivities, values.pop("sensitivities")),
            kept=_made(KeptTokens, values.pop("kept")),
            **values,
        )
        _check(plan)
    except (KeyError, TypeError, AttributeError) as error:
        raise KnormError(f"{path} is no whole plan ({error}); make it again: knormpress tune") from error
    return plan


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _deep_tuple(value) for name, value in values.items()}


def _point(values: dict[str, Any]) -> Point:
    return Point(**_tuples(values | {"press": KnormPress(**_tuples(values["press"]))}))


def _deep_tuple(value: Any) -> Any:
    return tuple(map(_deep_tuple, value)) if isinstance(value, list) else value


def _made(kind: Any, values: dict[str, Any] | None) -> Any:
    return None if values is None else kind(**_tuples(values))


def _check(plan: Plan) -> None:
    """See that everything is of the type that tables and pictures need; raises TypeError or KeyError."""
    for name in ("name", "dtype", "fingerprint"):
        _wanted(isinstance(plan.model[name], str), f"model.{name} is no text")
    _wanted(_is_figure(plan.targets["ppl"]), "targets.ppl is no number")
    _wanted(plan.targets["passkey"] is None or _is_figure(plan.targets["passkey"]), "targets.passkey is no number")
    for part in ("calibration", "held_out", "made"):
        _wanted(isinstance(getattr(plan, part), dict), f"{part} is no object")
    for name in ("documents", "scored", "context") if plan.frontier else ():
        _wanted(_is_figure(plan.held_out[name]), f"held_out.{name} is no number")
    for point in plan.frontier:
        _wanted(isinstance(point.name, str), "a name of its frontier is no text")
        _wanted(_are_figures(point.ppl, 3), "a figure of its frontier is not finite")
        _wanted(_are_figures((point.kl, point.mean_keep), 2), "a figure of its frontier is not finite")
        _wanted(point.passkeys is None or _are_figures(point.passkeys, 2), "the passkeys of its frontier are no pair")
    if plan.sensitivities is not None:
        ratios, rows = plan.sensitivities.ratios, (*plan.sensitivities.text, *plan.sensitivities.passkey)
        alike = all(_are_figures(row, len(ratios)) for row in (ratios, *rows))
        _wanted(len(ratios) > 0 and alike, "its sensitivities differ in length")
    if plan.kept is not None:
        tokens, shares = plan.kept.tokens, plan.kept.layers
        _wanted(all(isinstance(token, str) for token in tokens), "its kept tokens are no text")
        alike = all(_are_figures(row, len(tokens)) for row in shares)
        _wanted(len(shares) > 0 and alike, "its kept tokens differ from their shares")


def _wanted(right: bool, fault: str) -> None:
    if not right:
        raise TypeError(fault)


def _is_figure(value: Any) -> bool:
    # Not isfinite(): it can't take a whole number that no float holds.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _are_figures(values: Any, count: int) -> bool:
    return isinstance(values, tuple) and len(values) == count and all(map(_is_figure, values))

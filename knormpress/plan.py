"""The plan file: a policy with one ratio per layer, the model it is for, and what was measured on the way to it.

JSON, written by ``knormpress tune`` and read by ``KnormPress.from_plan`` and ``--plan``. Needs neither torch nor numpy.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from knormpress.errors import KnormError
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
        model: ``name``, ``dtype`` and ``fingerprint`` (see ``saving.fingerprint``) of the model.
        targets: what was asked for: ``ppl`` in %, ``passkey`` as a share, or None.
        calibration, held_out: text, documents and passkeys that the search saw, and those that ``frontier`` was
            measured on.
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
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(values, allow_nan=False, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise KnormError(f"the plan can't be written to {path} ({error.strerror}); choose another --output") from error
    finally:
        beside.unlink(missing_ok=True)


def read_plan(path: str | Path) -> Plan:
    """The plan that ``write_plan`` wrote.

    Raises:
        KnormError: the file is missing or no plan of this format.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise KnormError(f"no plan can be read from {path} ({error.strerror}); make one: knormpress tune") from error
    except ValueError as error:
        raise KnormError(f"{path} is no plan: it is not whole JSON ({error}); make one: knormpress tune") from error
    found = values.pop("format", None) if isinstance(values, dict) else None
    if found != FORMAT:
        raise KnormError(f"{path} has format {found!r}; wanted {FORMAT!r}, as knormpress tune writes it")
    try:
        return Plan(
            press=KnormPress(**_tuples(values.pop("press"))),
            frontier=tuple(map(_point, values.pop("frontier"))),
            sensitivities=_made(Sensitivities, values.pop("sensitivities")),
            kept=_made(KeptTokens, values.pop("kept")),
            **_with_model(values),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise KnormError(f"{path} is no whole plan ({error}); make it again: knormpress tune") from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _deep_tuple(value) for name, value in values.items()}


def _point(values: dict[str, Any]) -> Point:
    point = Point(**_tuples(values | {"press": KnormPress(**_tuples(values["press"]))}))
    if not all(math.isfinite(number) for number in (*point.ppl, point.kl, point.mean_keep)):
        raise TypeError("a figure of its frontier is not finite")
    return point


def _deep_tuple(value: Any) -> Any:
    return tuple(map(_deep_tuple, value)) if isinstance(value, list) else value


def _made(kind: Any, values: dict[str, Any] | None) -> Any:
    return None if values is None else kind(**_tuples(values))


def _with_model(values: dict[str, Any]) -> dict[str, Any]:
    for name in ("name", "dtype", "fingerprint"):
        if not isinstance(values["model"][name], str):
            raise TypeError(f"model.{name} is no text")
    return values

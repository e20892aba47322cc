"""The part of a plan file that pruning needs: the policy, and the model that it was tuned for.

A plan file is JSON, written by ``knormpress tune``. ``records.plan`` reads and writes the complete file. Plans for some
models come with the package, in ``knormpress/plans``; they are found by the fingerprint of the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from knormpress.errors import KnormError
from knormpress.policy.policy import Policy

__all__ = ["FORMAT", "expect_model", "planned_policy", "read_plan_file", "shipped_plan"]

FORMAT = "knormpress-plan-1"
"""The version of the file format; a file with another version is refused."""

_SHIPPED = Path(__file__).parents[1] / "plans"


def read_plan_file(path: str | Path) -> dict[str, Any]:
    """The JSON values in a plan file; only the file's format is checked.

    Raises:
        KnormError: the file can't be read, or is not a plan in this format.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise KnormError(f"no plan can be read from {path} ({error.strerror}); make one: knormpress tune") from error
    except (ValueError, RecursionError) as error:
        raise KnormError(
            f"{path} is not a plan: it is not complete JSON ({error}); make a plan: knormpress tune"
        ) from error
    file_format = values.pop("format", None) if isinstance(values, dict) else None
    if file_format != FORMAT:
        raise KnormError(f"{path} has format {file_format!r}; wanted {FORMAT!r}; make a plan: knormpress tune")
    return dict(values)


def planned_policy(path: str | Path, fingerprint: str) -> Policy:
    """The policy in the plan file at ``path``.

    Args:
        path: the plan file.
        fingerprint: the fingerprint of the model to prune, see ``cache.fingerprint``.

    Raises:
        KnormError: there is no plan at ``path``, or it is for another model.
    """
    values = read_plan_file(path)
    try:
        policy = Policy(**values["press"])
        expect_model(values["model"], fingerprint, str(path))
    except (KeyError, TypeError) as error:
        raise KnormError(f"{path} is not a complete plan ({error}); make it again: knormpress tune") from error
    return policy


def shipped_plan(fingerprint: str, scores: Sequence[str] | None = None) -> Path | None:
    """The file of the plan that comes with the package for a model; None if there is none.

    Args:
        fingerprint: the fingerprint of the model, see ``cache.fingerprint``.
        scores: the only scores that the plan may use, such as ``("knorm",)``; any unless given.

    Returns:
        Of several plans that of the lowest mean keep ratio.
    """
    fitting = []
    for path in sorted(_SHIPPED.glob("*.json")):
        values = read_plan_file(path)
        policy = Policy(**values["press"])
        allowed = scores is None or set(policy.layer_scores or ("knorm",)) <= set(scores)
        if allowed and values["model"]["fingerprint"] == fingerprint:
            fitting.append((policy.mean_keep, path))
    return min(fitting)[1] if fitting else None


def expect_model(model: Mapping[str, str], fingerprint: str, where: str) -> None:
    """Check that a plan is for the model with ``fingerprint``.

    Args:
        model: ``name``, ``dtype`` and ``fingerprint`` of the model that the plan was tuned for.
        fingerprint: the fingerprint of the model to prune.
        where: where the plan comes from, for the message.

    Raises:
        KnormError: the models differ.
    """
    if model["fingerprint"] != fingerprint:
        raise KnormError(
            f"{where} is a plan for {model['name']} in {model['dtype']} (fingerprint {model['fingerprint']}), not for "
            f"this model ({fingerprint}); make a plan for this model: knormpress tune"
        )

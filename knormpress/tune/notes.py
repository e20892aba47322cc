"""Store the measured damage of policies in a file at once, so that a stopped search can continue."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from knormpress.errors import KnormError
from knormpress.files import replacing
from knormpress.policy.policy import Policy

__all__ = ["Damage", "Notes"]


@dataclass(frozen=True)
class Damage:
    """The average loss of a policy, compared with the full cache.

    Args:
        kl: divergence from the full cache's predictions, in nats per token.
        nll: rise of the text's negative log-likelihood, in nats per token.
        answer_nll: rise of an answer's negative log-likelihood, in nats per answer.
        found: share of the full cache's items that are found.
    """

    kl: float
    nll: float
    answer_nll: float
    found: float

    @property
    def text(self) -> float:
        """Mean of ``kl`` and ``nll``: ``kl`` has less noise, ``nll`` is what perplexity measures.

        A fall of ``nll`` counts as 0, since on few documents it is chance.
        """
        return (self.kl + max(self.nll, 0.0)) / 2


class Notes:
    """Measured damages in a JSON Lines file. Its first line identifies the search; each other line has a hash of it.

    By the hash, two searches that write to the same file at once can tell their lines apart.

    Args:
        path: the file, created if it is missing.
        identity: JSON-ready values that identify the search; a file with other values is replaced.
        fresh: replace the file in any case.

    Raises:
        KnormError: the file can't be written.
    """

    def __init__(self, path: Path, identity: dict[str, Any], *, fresh: bool = False) -> None:
        self.path, self._known = path, {}
        first = json.dumps(identity, sort_keys=True)
        self._owner = hashlib.sha256(first.encode()).hexdigest()[:16]
        with self._one_line_errors():
            use_file = path.exists() and not fresh
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if use_file else []
        self.goes_on = bool(lines) and lines[0] == first
        for line in lines[1:] if self.goes_on else []:
            try:
                owner, press, damage = json.loads(line)
                if owner == self._owner:
                    self._known[press] = Damage(**damage)
            except (ValueError, TypeError):  # incomplete, since the search was stopped
                continue
        with self._one_line_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:  # stored damages must survive if the process is killed
                temporary.write_text("\n".join([first, *map(self._line, self._known), ""]), encoding="utf-8")

    def get(self, press: Policy, *, few: bool) -> Damage | None:
        """The stored damage of ``press``, measured on all texts or on a ``few``; None if there is none."""
        return self._known.get(self._name(press, few))

    def note(self, press: Policy, damage: Damage, *, few: bool) -> None:
        """Store the damage of ``press``."""
        name = self._name(press, few)
        self._known[name] = damage
        with self._one_line_errors(), self.path.open("a", encoding="utf-8") as file:
            file.write(self._line(name) + "\n")

    def _line(self, name: str) -> str:
        return json.dumps([self._owner, name, asdict(self._known[name])])

    @contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise KnormError(
                f"the search can't store its measurements in {self.path} ({error.strerror}); use another --output"
            ) from error

    @staticmethod
    def _name(press: Policy, few: bool) -> str:
        return json.dumps({**press.as_dict(), "few texts": few}, sort_keys=True)

"""The method of this package: prune by key norms, under a policy.

Devoto et al., EMNLP 2024 (arXiv 2406.11430): the tokens whose key vectors have the lowest L2 norm are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from knormpress.errors import KnormError
from knormpress.policy.plan import planned_policy, shipped_plan
from knormpress.policy.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from knormpress.cache.cache import KnormCache

__all__ = ["KnormPress"]


class KnormPress(Policy):
    """Keep the cached tokens whose key vectors have the lowest L2 norm.

    The method of Devoto et al., EMNLP 2024 (arXiv 2406.11430). A press is a value: frozen, validated when made,
    hashable, and independent of torch. Called with a model, it gives a context manager in which every ``generate()``
    of that model gets a fresh pruned cache.

    Args:
        keep_ratio: share r in (0, 1] of the tokens seen that a pruned layer keeps.
        prune_after: tokens (>= 1) a layer must have seen before it is pruned for the first time.
        skip_layers: layers that are never pruned; negative indices count from the last layer.
        layer_keep_ratios: one ratio per layer; where given it replaces ``keep_ratio`` and ``skip_layers``.
        layer_scores: the name of each layer's score, see ``cache.scores.named``; key norms for all unless given.
        keep_recent: the newest tokens (>= 0) that are never dropped.
        prune_interval: while decoding one token at a time, a layer is pruned again once it holds this many tokens
            (>= 1) above its budget.
        schedule: ``"proportional"`` keeps ceil(r * seen); ``"iterative"`` keeps ceil(r * stored) whenever
            stored >= prune_after, the rule of the paper's evaluation script.

    Raises:
        KnormError: a value is out of its range.
    """

    def __call__(
        self, model: PreTrainedModel, *, prefill_chunk: int | None = None
    ) -> AbstractContextManager[Callable[[], KnormCache]]:
        """Give every ``generate()`` of ``model`` a fresh pruned cache inside the context.

        With ``prefill_chunk``, a prompt is sent in chunks of at most so many tokens. The cache is pruned after each, so
        that later chunks attend to less: a long prompt takes less time, and the cache never holds all of it.

        Yields a function that makes such a cache, for your own loop.

        Raises:
            KnormError: ``model`` is not a loaded model, or ``prefill_chunk`` is below 1.
        """
        from knormpress.cache.generation import pruned_generation

        if isinstance(model, str):
            raise KnormError(f"the press got {model!r}; wanted a loaded model, not its name")
        return pruned_generation(model, self, prefill_chunk=prefill_chunk)

    @classmethod
    def of(cls, policy: Policy) -> KnormPress:
        """The press that prunes by key norms under ``policy``."""
        return cls(**policy.as_dict())

    @classmethod
    def for_model(cls, model: PreTrainedModel, *, scores: Sequence[str] | None = None) -> KnormPress:
        """The plan that comes with KnormPress for ``model``.

        Args:
            model: the model, in the dtype that the plan was tuned with.
            scores: the only scores that the plan may use, such as ``("knorm",)`` for the paper's; any unless given.

        Raises:
            KnormError: there is no such plan.
        """
        from knormpress.cache.fingerprint import model_fingerprint

        path = shipped_plan(model_fingerprint(model), scores)
        if path is None:
            by = "" if scores is None else f" by {', '.join(scores)} alone"
            raise KnormError(
                f"no plan{by} comes with KnormPress for this {type(model).__name__} in {model.dtype}; make one with "
                "knormpress tune, or use a keep ratio"
            )
        return cls.from_plan(path, model)

    @classmethod
    def from_plan(cls, path: str | Path, model: PreTrainedModel) -> KnormPress:
        """The policy that ``knormpress tune`` found for ``model``.

        Args:
            path: the plan file.
            model: the model, in the dtype that the plan was tuned with.

        Raises:
            KnormError: there is no plan at ``path``, or it is for another model.
        """
        from knormpress.cache.fingerprint import model_fingerprint

        return cls.of(planned_policy(path, model_fingerprint(model)))

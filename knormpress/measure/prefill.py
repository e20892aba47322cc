"""Fill a cache with a prompt, the first step of every measurement.

A candidate may take the prompt in another *way* than the full cache does: in chunks, or for the most part from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from knormpress.cache.cache import KnormCache
from knormpress.cache.layer import KnormLayer
from knormpress.cache.score import Score
from knormpress.errors import KnormError
from knormpress.methods.method import Method, caches_of, describe_method
from knormpress.policy.policy import Policy, share

__all__ = [
    "Way",
    "begun",
    "can_be_reused",
    "decode",
    "expect_pruned",
    "expect_within_policy",
    "filled_cache",
    "prefill",
    "slots_of",
]


@dataclass(frozen=True)
class Way:
    """How a prompt gets into a cache.

    Args:
        chunk: the most tokens in one forward pass; None sends the prompt in one pass.
        question: only this many tokens at the end of the prompt (>= 1) are computed; a ``KnormCache`` with those before
            them, the context, was saved and is loaded. None computes all of them.
    """

    chunk: int | None = None
    question: int | None = None


def prefill(model: PreTrainedModel, prompt: Tensor, cache: Cache, *, chunk: int | None = None) -> Tensor:
    """Send ``prompt`` through ``model`` into ``cache``, whole or in chunks.

    Args:
        model: any causal language model of transformers.
        prompt: (B, n) token ids on the model's device, n >= 1.
        cache: takes the prompt, after the tokens that it holds already.
        chunk: the most tokens in one forward pass; None sends the prompt in one pass.

    Returns:
        (B, V) logits after the last token of the prompt.

    Raises:
        KnormError: ``chunk`` is below 1.
    """
    if chunk is not None and chunk < 1:
        raise KnormError(f"prefill_chunk is {chunk}; wanted at least 1, or no value to send the prompt in one pass")
    for part in prompt.split(chunk or prompt.shape[-1], dim=-1):
        logits: Tensor = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1]


def decode(model: PreTrainedModel, ids: Tensor, cache: Cache) -> None:
    """Send known tokens through ``model`` as when they are decoded, in few passes where that is the same.

    A full cache takes them all in one pass, and a ``KnormCache`` those that come before a pruning. The token after
    which a layer prunes comes alone. Other caches get one token in a pass.

    Args:
        model, cache: as for ``prefill``.
        ids: (1, n) token ids on the model's device; n may be 0.
    """
    while left := ids.shape[-1]:
        most = left if type(cache) is DynamicCache else 1
        with cache.as_single_tokens(left) if isinstance(cache, KnormCache) else nullcontext(most + 1) as count:
            fed = ids[:, : max(1, count - 1)]
            prefill(model, fed, cache)
        ids = ids[:, fed.shape[-1] :]


@contextmanager
def begun(model: PreTrainedModel, method: Method, prompt: Tensor, way: Way) -> Iterator[tuple[Method, Tensor]]:
    """Yield a method whose caches begin with the part of ``prompt`` that ``way`` reuses, and the tokens left to send.

    The context is computed, pruned by ``method`` and saved once, in a temporary folder; each new cache is loaded from
    there. Where nothing is reused, these are ``method`` and ``prompt`` themselves.

    Raises:
        KnormError: the prompt has no context before the question, or the method's cache can't be saved.
    """
    if way.question is None:
        yield method, prompt
        return
    context, question = prompt[:, : -way.question], prompt[:, -way.question :]
    if not 0 < question.shape[-1] < prompt.shape[-1]:
        raise KnormError(
            f"a prompt of {prompt.shape[-1]} tokens has no context before a question of {way.question}; "
            "wanted at least 1 token of each"
        )
    with _folder() as folder:
        yield _computed(model, method, context, way, folder), question


def _computed(model: PreTrainedModel, method: Method, context: Tensor, way: Way, folder: Path) -> _Saved:
    """Compute, prune and save ``context``. Nobody holds the cache afterwards: only a loaded one counts as memory."""
    with torch.inference_mode(), caches_of(method, model) as new_cache:
        cache = new_cache()
        prefill(model, context, cache, chunk=way.chunk)
    return _save(cache, method, folder)


@dataclass(frozen=True)
class _Saved:
    """A method whose caches are loaded from a file."""

    path: Path
    score: Score | None

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[Callable[[], Cache]]:
        yield lambda: KnormCache.load(self.path, model, self.score)


@contextmanager
def _folder() -> Iterator[Path]:
    # Where a loaded cache still maps its file, Windows does not delete it.
    with TemporaryDirectory(prefix="knormpress-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _save(cache: Cache, method: Method, folder: Path) -> _Saved:
    if not isinstance(cache, KnormCache):
        raise KnormError(
            f"the cache of {describe_method(method)} is a {type(cache).__name__}; wanted a KnormCache to save"
        )
    path = folder / "context.safetensors"
    cache.save(path)
    return _Saved(path, cache.score)


def can_be_reused(model: PreTrainedModel, method: Method) -> bool:
    """Whether the caches of ``method`` can be saved and loaded; those with layers of linear attention can't."""
    with caches_of(method, model) as new_cache:
        cache = new_cache()
    return isinstance(cache, KnormCache) and all(
        isinstance(layer, KnormLayer | DynamicSlidingWindowLayer) for layer in cache.layers
    )


@contextmanager
def filled_cache(
    model: PreTrainedModel, method: Method, prompt: Tensor, full: Cache, *, way: Way | None = None
) -> Iterator[Cache]:
    """Yield a cache of ``method`` that holds ``prompt``, inside the method's context.

    If the method's cache supports it and the result is the same, the prompt is taken from ``full``; else it is sent
    through the model.

    Args:
        model, prompt: as for ``prefill``.
        method: makes the cache.
        full: a full cache that holds the same prompt; it is not changed.
        way: how the prompt gets in; in one pass unless given. Where it reuses a context, that is all of ``prompt``, and
            what the caller feeds is the question: the cache is saved and loaded.
    """
    way = way or Way()
    one_pass = way.chunk is None and all(type(layer) is DynamicLayer for layer in full.layers)
    with caches_of(method, model) as new_cache:
        cache = new_cache()
        prefill_from = getattr(cache, "prefill_from", None)
        if one_pass and prefill_from is not None:
            prefill_from(full)
        else:
            prefill(model, prompt, cache, chunk=way.chunk)
        if way.question is None:
            yield cache
            return
        with _folder() as folder:
            saved = _save(cache, method, folder)
            del cache
            with caches_of(saved, model) as load:
                yield load()


def slots_of(cache: Cache) -> list[int]:
    """How many slots each layer stores; 0 where a layer has no keys."""
    keys_of_layers = (getattr(layer, "keys", None) for layer in cache.layers)
    return [0 if keys is None else keys.shape[-2] for keys in keys_of_layers]


def expect_pruned(method: Method, policy: Policy | None, cache: Cache, full: list[int]) -> None:
    """Check that a method whose policy drops tokens holds fewer than the full cache.

    Args:
        method: the method that made the cache.
        policy: the policy that it should follow; None if it has none.
        cache: the method's cache, filled.
        full: ``slots_of`` the full cache with the same tokens.

    Raises:
        KnormError: it holds as many.
    """
    if policy is None or not policy.drops or slots_of(cache) != full:
        return
    raise KnormError(
        f"text too short to be pruned: {describe_method(method)} dropped none of {max(full)} tokens at keep_ratio "
        f"{policy.keep_ratio}, prune_after {policy.prune_after}, skip_layers {policy.skip_layers}; use a longer text "
        "or a smaller prune_after"
    )


def expect_within_policy(method: Method, cache: Cache) -> None:
    """Check that each layer of a ``KnormCache`` holds at most an interval more than its budget.

    A cache that is pruned behind the prompt alone passes that bound while decoding. An iterative policy has none.

    Args:
        method: made the cache.
        cache: the cache, filled; one of another kind is not checked.

    Raises:
        KnormError: a layer holds more.
    """
    for layer in cache.layers:
        if not isinstance(layer, KnormLayer) or layer.press.schedule != "proportional" or layer.ratio == 1.0:
            continue
        most = max(share(layer.ratio, layer.seen), layer.press.keep_recent) + layer.press.prune_interval - 1
        if layer.seen > layer.press.prune_after and layer.stored > most:
            raise KnormError(
                f"layer {layer.index} of {describe_method(method)} holds {layer.stored:,} tokens of {layer.seen:,}, "
                f"and its policy at most {most:,}; check that the method prunes while decoding"
            )

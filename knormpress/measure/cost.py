"""Count what a prefill and a decoded token cost, in place of timing them.

The same code with the same torch, transformers and kind of device gives the same counts on every machine and in every
run, so that a change of half a percent can be decided in one run, on a busy machine too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from knormpress.cache.cache import KnormCache
from knormpress.cache.hooks import is_attention
from knormpress.errors import KnormError
from knormpress.measure.operators import OperatorCounter
from knormpress.measure.prefill import decode, expect_within_policy, prefill
from knormpress.methods.full import FullCache
from knormpress.methods.method import Method, caches_of
from knormpress.policy.policy import Policy, share
from knormpress.records.figures import Cost, Counts

__all__ = ["Prefilled", "can_count", "count_full_prefill", "measure_cost"]

# A token of the default model takes 0.1 to 0.2 s while it is counted.
_WINDOW = 8

# A pruning that is further away than this is not waited for.
_FARTHEST = 2_048

# Models make some tensors in their first call only.
_WARM_UP_TOKENS = 4


def can_count(model: PreTrainedModel) -> bool:
    """Whether a model's operators are dispatched one by one; those of compiled code, as of flex attention, are not."""
    flex = model.config.get_text_config(decoder=True)._attn_implementation == "flex_attention"
    return not flex and not hasattr(model, "_orig_mod")


class Prefilled(NamedTuple):
    """A cache that holds a prompt, what its prefill took, and the token (1, 1) that comes next."""

    counts: Counts
    cache: Cache
    token: Tensor


def count_full_prefill(model: PreTrainedModel, prompt: Tensor, *, prefill_chunk: int | None = None) -> Prefilled:
    """Count the prefill of the full cache, once for all methods that are compared with it behind the same prompt."""
    with caches_of(FullCache(), model) as new_cache:
        return _prefill(model, prompt, new_cache, prefill_chunk)


def measure_cost(
    model: PreTrainedModel,
    method: Method,
    prompt: Tensor,
    *,
    full: Prefilled | None = None,
    new_tokens: int | None = None,
    prefill_chunk: int | None = None,
) -> Cost:
    """Count a prefill and decoded tokens, with the method's cache and with the full cache.

    As many decoded tokens are counted as lie between two prunings of the cache's policy, with a pruning in their
    middle; of more than 8, the 8 around it. Tokens before them are decoded without counting. The counted ones are
    chosen greedily, and each is read by the host. They are computed on one thread, as the number of threads decides how
    their attention is divided; so is a prompt in chunks.

    Args:
        model: a model on the device to count on.
        method: makes the candidate's cache.
        prompt: (1, n) token ids on the model's device.
        full: the full cache behind ``prompt``, from ``count_full_prefill``; it is counted here unless given.
        new_tokens: count this many decoded tokens instead.
        prefill_chunk: the most tokens in one forward pass; None sends the prompt in one pass.

    Raises:
        KnormError: the prompt is empty, ``new_tokens`` is below 1, or the model is compiled; or the cache does not keep
            to its policy while decoding.
    """
    if not can_count(model):
        raise KnormError("compiled code, as of flex attention, can't be counted; load the model with sdpa or eager")
    if prompt.numel() == 0 or (new_tokens is not None and new_tokens < 1):
        raise KnormError(
            f"got a prompt of {prompt.numel()} tokens and {new_tokens} new tokens to count; wanted at least 1 of each"
        )
    full = full or count_full_prefill(model, prompt, prefill_chunk=prefill_chunk)
    with caches_of(method, model) as new_cache:
        before, counted = _window(model, new_cache(), prompt.shape[-1], new_tokens)
        own = _prefill(model, prompt, new_cache, prefill_chunk)
        _extend(model, own.cache, prompt, before)
        decoded = _decode(model, own, tokens=counted)
        # To do without a pruning costs less, but not for long.
        expect_within_policy(method, own.cache)
    longer = copy.deepcopy(full.cache)
    _extend(model, longer, prompt, before)
    return Cost(
        baseline_prefill=full.counts,
        candidate_prefill=own.counts,
        baseline_decode=_decode(model, full._replace(cache=longer), tokens=counted),
        candidate_decode=decoded,
        tokens_before=before,
        tokens=counted,
    )


def _prefill(model: PreTrainedModel, prompt: Tensor, new_cache: Callable[[], Cache], chunk: int | None) -> Prefilled:
    with torch.no_grad():
        # Outside of inference mode all operators are dispatched one by one.
        prompt = prompt.clone()
        prefill(model, prompt[:, :_WARM_UP_TOKENS], new_cache())
        # The last chunk may be a single token.
        with nullcontext() if chunk is None else _one_thread(), _counted(model, prompt.device) as counter:
            cache = new_cache()
            token = _step(model, prompt, cache, chunk)
        return Prefilled(counter.take(), cache, token)


def _extend(model: PreTrainedModel, cache: Cache, prompt: Tensor, tokens: int) -> None:
    """Decode ``tokens`` tokens, those of ``prompt`` again and again, without counting."""
    repeats = -(-tokens // prompt.shape[-1])
    layers = [layer for layer in cache.layers if type(layer) is DynamicLayer]
    if tokens and type(cache) is DynamicCache and len(layers) == len(cache.layers):
        # What a full cache costs depends on how many tokens it holds, and not on which.
        for index, layer in enumerate(layers):
            assert layer.keys is not None
            assert layer.values is not None
            keys, values = (part.repeat(1, 1, repeats, 1)[:, :, :tokens] for part in (layer.keys, layer.values))
            cache.update(keys, values, index)
        return
    with torch.no_grad():
        decode(model, prompt.clone().repeat(1, repeats)[:, :tokens], cache)


def _decode(model: PreTrainedModel, filled: Prefilled, *, tokens: int) -> Counts:
    """What ``tokens`` decoded tokens take."""
    with torch.no_grad():
        token = filled.token
        with _one_thread(), _counted(model, token.device) as counter:
            for _ in range(tokens):
                token = _step(model, token, filled.cache)
        return counter.take()


def _step(model: PreTrainedModel, ids: Tensor, cache: Cache, chunk: int | None = None) -> Tensor:
    token = prefill(model, ids, cache, chunk=chunk).argmax(dim=-1, keepdim=True)
    token.item()
    return token


def _window(model: PreTrainedModel, cache: Cache, prompt: int, new_tokens: int | None) -> tuple[int, int]:
    """How many tokens to decode without counting, and then with."""
    policy = cache.press if isinstance(cache, KnormCache) else None
    config = model.config.get_text_config(decoder=True)
    if policy is None or not policy.drops:
        return 0, new_tokens or _WINDOW
    distance, interval = _prunings(policy, min(policy.ratios(config.num_hidden_layers)), prompt)
    tokens = new_tokens or min(interval, _WINDOW)
    room = (getattr(config, "max_position_embeddings", None) or math.inf) - prompt - tokens
    before = distance - (tokens + 1) // 2
    return int(max(0, before)) if before <= min(_FARTHEST, room) else 0, tokens


def _prunings(policy: Policy, ratio: float, prompt: int) -> tuple[int, int]:
    """How many tokens after the prompt a layer is pruned next, and how many lie between that pruning and the next."""
    if ratio == 1.0:
        return 0, _WINDOW
    pruned = max(prompt, policy.prune_after)
    if policy.schedule == "iterative":
        interval = max(1, policy.prune_after - share(ratio, pruned))
    else:
        kept = share(ratio, pruned)
        interval = next(n for n in count(1) if kept + n - share(ratio, pruned + n) >= policy.prune_interval)
    return (policy.prune_after - prompt if prompt < policy.prune_after else interval), interval


@contextmanager
def _counted(model: PreTrainedModel, device: torch.device) -> Iterator[OperatorCounter]:
    """Count calls of attention modules too."""
    counter = OperatorCounter(device)

    def called(*_: Any) -> None:
        counter.sums["attention"] += 1

    with ExitStack() as hooks:
        for module in filter(is_attention, model.modules()):
            hooks.callback(module.register_forward_pre_hook(called).remove)
        with counter:
            yield counter


@contextmanager
def _one_thread() -> Iterator[None]:
    """The attention of a single token to those before it is divided among all threads, with operators of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

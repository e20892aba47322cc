"""Count what a prefill and a decoded token cost, in place of timing them.

The same code with the same torch, transformers and kind of device gives the same counts on every machine and in every
run, so that a change of half a percent can be decided in one run, on a busy machine too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from knormpress.cache.cache import KnormCache
from knormpress.cache.hooks import is_attention
from knormpress.errors import KnormError
from knormpress.measure.operators import OperatorCounter
from knormpress.measure.prefill import decode, prefill
from knormpress.methods.full import FullCache
from knormpress.methods.method import Method, caches_of
from knormpress.policy.policy import Policy, share
from knormpress.records.figures import Cost, Counts

__all__ = ["can_count", "measure_cost"]

# A token of the default model takes 0.1 to 0.2 s while it is counted.
_WINDOW = 16

# A pruning that is further away than this is not waited for.
_FARTHEST = 2_048

# Models make some tensors in their first call only.
_WARM_UP_TOKENS = 4


def can_count(model: PreTrainedModel) -> bool:
    """Whether a model's operators are dispatched one by one; those of compiled code, as of flex attention, are not."""
    flex = model.config.get_text_config(decoder=True)._attn_implementation == "flex_attention"
    return not flex and not hasattr(model, "_orig_mod")


def measure_cost(
    model: PreTrainedModel,
    method: Method,
    prompt: Tensor,
    *,
    new_tokens: int | None = None,
    prefill_chunk: int | None = None,
    after_run: Callable[[], None] = lambda: None,
) -> Cost:
    """Count a prefill and decoded tokens, with the method's cache and with the full cache.

    As many decoded tokens are counted as lie between two prunings of the cache's policy, with a pruning in their
    middle; of more than 16, the 16 around it. Tokens before them are decoded without counting. The counted ones are
    chosen greedily, and each is read by the host. The number of threads may decide how work is divided, so one is used.

    Args:
        model: a model on the device to count on.
        method: makes the candidate's cache.
        prompt: (1, n) token ids on the model's device.
        new_tokens: count this many decoded tokens instead.
        prefill_chunk: the most tokens in one forward pass; None sends the prompt in one pass.
        after_run: called after each of the two caches.

    Raises:
        KnormError: the prompt is empty, ``new_tokens`` is below 1, or the model is compiled.
    """
    if not can_count(model):
        raise KnormError("compiled code, as of flex attention, can't be counted; load the model with sdpa or eager")
    if prompt.numel() == 0 or (new_tokens is not None and new_tokens < 1):
        raise KnormError(
            f"got a prompt of {prompt.numel()} tokens and {new_tokens} new tokens to count; wanted at least 1 of each"
        )
    with caches_of(method, model) as new_cache:
        before, counted = _window(model, new_cache(), prompt.shape[-1], new_tokens)
    sides = []
    for which in (FullCache(), method):
        sides.append(_counts_of(model, which, prompt, chunk=prefill_chunk, before=before, tokens=counted))
        after_run()
    (full_prefill, full_decode), (prefill_, decode_) = sides
    return Cost(
        baseline_prefill=full_prefill,
        candidate_prefill=prefill_,
        baseline_decode=full_decode,
        candidate_decode=decode_,
        tokens_before=before,
        tokens=counted,
    )


def _counts_of(
    model: PreTrainedModel, method: Method, prompt: Tensor, *, chunk: int | None, before: int, tokens: int
) -> tuple[Counts, Counts]:
    """What the prefill takes, and ``tokens`` decoded tokens after the first ``before``."""
    with _on_one_thread(), torch.no_grad(), caches_of(method, model) as new_cache:
        # Outside of inference mode all operators are dispatched one by one.
        prompt = prompt.clone()
        prefill(model, prompt[:, :_WARM_UP_TOKENS], new_cache())
        counter = OperatorCounter(prompt.device)

        def step(ids: Tensor, cache: Cache, chunk: int | None = None) -> Tensor:
            token = prefill(model, ids, cache, chunk=chunk).argmax(dim=-1, keepdim=True)
            token.item()
            return token

        with _attention_watched(model, counter):
            with counter:
                cache = new_cache()
                token = step(prompt, cache, chunk)
            of_prompt = counter.take()
            decode(model, prompt.repeat(1, -(-before // prompt.shape[-1]))[:, :before], cache)
            counter.take()
            with counter:
                for _ in range(tokens):
                    token = step(token, cache)
            return of_prompt, counter.take()


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
def _on_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _attention_watched(model: PreTrainedModel, counter: OperatorCounter) -> Iterator[None]:
    def called(*_: Any) -> None:
        counter.sums["attention"] += 1

    with ExitStack() as hooks:
        for module in filter(is_attention, model.modules()):
            hooks.callback(module.register_forward_pre_hook(called).remove)
        yield

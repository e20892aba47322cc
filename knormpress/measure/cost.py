"""Count what a prefill and a decoded token cost: operators, bytes, FLOPs and reads of the host, in place of time.

The same code with the same torch, transformers and kind of device gives the same counts on every machine and in every
run, so that a change of half a percent can be decided in one run, on a busy machine too.

Two of torch's modes watch: one sees every operator that is dispatched, the other the methods that read a tensor on the
CPU without an operator. Neither sees what happens inside an operator (its scratch memory, what it skips), Python's and
numpy's own work, kernels that are started past torch's dispatcher, or memory that is read by its address.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import Cache, PreTrainedModel

from knormpress.cache.cache import KnormCache
from knormpress.cache.hooks import is_attention
from knormpress.errors import KnormError
from knormpress.measure.prefill import decode, prefill
from knormpress.methods.full import FullCache
from knormpress.methods.method import Method, caches_of
from knormpress.policy.policy import Policy, share
from knormpress.records.figures import Cost, Counts

__all__ = ["OperatorCounter", "measure_cost"]

# A token of the default model takes about 0.1 s while it is counted.
_WINDOW = 64

# A pruning that is further away than this is not waited for.
_FARTHEST = 2_048

# Models make some tensors in their first call only.
_WARM_UP_TOKENS = 4

_aten = torch.ops.aten

# They read as much of their first tensor as they return.
_PICK = {_aten.embedding, _aten.gather, _aten.index, _aten.index_select, _aten.take}

# They don't read what they write to.
_OVERWRITE = {_aten.copy_, _aten.fill_, _aten.zero_, _aten.scatter_, _aten.index_put_, _aten.index_copy_}

_EMPTY = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}

# torch has formulas for the attention of other devices.
_CPU_ATTENTION = getattr(_aten, "_scaled_dot_product_flash_attention_for_cpu", None)

# On the CPU they dispatch no operator.
_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}


class OperatorCounter:
    """While its context lasts, counts what this thread has computed on ``device``; ``take`` returns the sums.

    A read of the host is a tensor of ``device`` that becomes numbers for Python or numpy, a copy from another device to
    the CPU, or an operator whose result has a size that the host waits for, such as ``nonzero``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # A read that is counted already may dispatch operators that look like reads.
        self.reading = False
        self._sums: Counter[str] = Counter()
        self._modes = ExitStack()

    def __enter__(self) -> OperatorCounter:
        self._modes.enter_context(_Operators(self))
        self._modes.enter_context(_Reads(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._modes.close()

    def take(self) -> Counts:
        """The sums since the last ``take``."""
        sums, self._sums = self._sums, Counter()
        return Counts(**{name: sums[name] for name in Counts.model_fields})

    def add(self, **counts: int) -> None:
        """Add to the sums."""
        self._sums.update(counts)


class _Reads(TorchFunctionMode):
    def __init__(self, counter: OperatorCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _READS or args[0].device.type != self.counter.device.type:
            return func(*args, **(kwargs or {}))
        self.counter.add(host_reads=1)
        self.counter.reading = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.counter.reading = False


class _Operators(TorchDispatchMode):
    def __init__(self, counter: OperatorCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # In inference mode an operator that is made of others arrives whole.
        if func.namespace == "aten" and _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        name = func.overloadpacket
        given, made = _tensors((args, kwargs)), _tensors(out)
        known = {tensor.untyped_storage()._cdata for tensor in given}
        new = {s._cdata: s.nbytes() for s in (tensor.untyped_storage() for tensor in made) if s._cdata not in known}
        is_view = bool(made) and not new and not func._schema.is_mutable
        self.counter.add(
            ops=1,
            moved=0 if is_view or name in _EMPTY else _read(func, args, kwargs, made) + sum(map(_bytes, made)),
            flops=_flops(name, out, args, kwargs),
            allocated=sum(new.values()),
            host_reads=int(not self.counter.reading and _waits(func, args, given, made)),
        )
        return out


def _is_composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """The bytes of the elements of ``tensor``; those that repeat one element in memory count once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size if step or not size else 1 for size, step in sizes)


def _read(func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> int:
    """The bytes that an operator reads."""
    name, sources = func.overloadpacket, list(args)
    if name in _OVERWRITE:
        sources = sources[1:]
    picked = 0
    if name in _PICK and made:
        picked, sources = sum(map(_bytes, made)), sources[1:]
    written = {argument.name for argument in func._schema.arguments if argument.is_out}
    named = [value for key, value in kwargs.items() if key not in written]
    return picked + sum(map(_bytes, _tensors((sources, named))))


def _flops(name: Any, out: Any, args: Any, kwargs: Any) -> int:
    """Floating-point operations of matrix products, by the formulas of ``torch.utils.flop_counter``."""
    if name is _CPU_ATTENTION:
        query, key, value = args[:3]
        return int(2 * query[..., 0].numel() * key.shape[-2] * (key.shape[-1] + value.shape[-1]))
    return int(flop_registry[name](*args, **kwargs, out_val=out)) if name in flop_registry else 0


def _waits(func: Any, args: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    """Whether the host waits for what the operator computes, or computed before."""
    if func.overloadpacket in (_aten.index, _aten.index_put_):
        return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1]))
    if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.intersection(func.tags):
        return True
    devices = {tensor.device.type for tensor in given} - {"cpu"}
    return bool(devices) and bool(made) and all(tensor.device.type == "cpu" for tensor in made)


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

    The decoded tokens are one pruning interval of the cache's policy, or 64 tokens with a pruning in their middle where
    the interval is longer; the tokens before them are decoded without counting. They are chosen greedily, and each is
    read by the host. Counted on one thread: how the work is divided may depend on the number of threads.

    Args:
        model: a model on the device to count on.
        method: makes the candidate's cache.
        prompt: (1, n) token ids on the model's device.
        new_tokens: count this many decoded tokens instead.
        prefill_chunk: the most tokens in one forward pass; None sends the prompt in one pass.
        after_run: called after each of the two caches.

    Raises:
        KnormError: the prompt is empty, or ``new_tokens`` is below 1.
    """
    if prompt.numel() == 0 or (new_tokens is not None and new_tokens < 1):
        raise KnormError(
            f"got a prompt of {prompt.numel()} tokens and {new_tokens} new tokens to count; wanted at least 1 of each"
        )
    with caches_of(method, model) as new_cache:
        before, counted = _window(model, new_cache(), prompt.shape[-1], new_tokens)
    sides = []
    for which in (FullCache(), method):
        sides.append(_counts_of(model, which, prompt, prefill_chunk, before, counted))
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
    model: PreTrainedModel, method: Method, prompt: Tensor, chunk: int | None, before: int, tokens: int
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
    with ExitStack() as hooks:
        for module in filter(is_attention, model.modules()):
            hooks.callback(module.register_forward_pre_hook(lambda *_: counter.add(attention=1)).remove)
        yield

"""Count what torch's operators do: how many there are, bytes, FLOPs, and reads of the host.

Two of torch's modes watch: one sees every operator that is dispatched, the other the methods that read a tensor on the
CPU without an operator. Neither sees what happens inside an operator (its scratch memory, what it skips), Python's and
numpy's own work, kernels that are started past torch's dispatcher, or memory that is read by its address.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from knormpress.records.figures import Counts

__all__ = ["OperatorCounter"]

_aten = torch.ops.aten

# They read as much of their first tensor as they return.
_PICK = {_aten.embedding, _aten.gather, _aten.index, _aten.index_select, _aten.take}

# They don't read what they write to.
_OVERWRITE = {_aten.copy_, _aten.fill_, _aten.zero_, _aten.index_put_, _aten.index_copy_, _aten.scatter_}

# They find out how many elements a mask has, where one is given.
_BY_MASK = {_aten.index, _aten.index_put, _aten.index_put_}

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
        self.sums: Counter[str] = Counter()
        self._modes = ExitStack()

    def __enter__(self) -> OperatorCounter:
        self._modes.enter_context(_Operators(self))
        self._modes.enter_context(_Reads(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._modes.close()

    def take(self) -> Counts:
        """The sums since the last ``take``."""
        sums, self.sums = self.sums, Counter()
        return Counts(**{name: sums[name] for name in Counts.model_fields})


class _Reads(TorchFunctionMode):
    def __init__(self, counter: OperatorCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _READS or args[0].device.type != self.counter.device.type:
            return func(*args, **(kwargs or {}))
        self.counter.sums["host_reads"] += 1
        self.counter.reading = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.counter.reading = False


class _Operators(TorchDispatchMode):
    def __init__(self, counter: OperatorCounter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Questions about a tensor, such as its device.
        if func.namespace == "prim":
            return func(*args, **kwargs)
        operator = _operator(func)
        # In inference mode an operator that is made of others arrives whole.
        if operator.is_composite:
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        given, made = [*_tensors(args), *_tensors(kwargs.values())], list(_tensors((out,)))
        known = {tensor.untyped_storage()._cdata for tensor in given}
        new = {s._cdata: s.nbytes() for s in (tensor.untyped_storage() for tensor in made) if s._cdata not in known}
        is_view = bool(made) and not new and not operator.is_mutable
        moved = 0 if is_view or operator.name in _EMPTY else _read(operator, args, kwargs, made) + _bytes(made)
        sums = self.counter.sums
        sums["ops"] += 1
        sums["moved"] += moved
        sums["allocated"] += sum(new.values())
        sums["flops"] += 0 if operator.flops is None else int(operator.flops(*args, **kwargs, out_val=out))
        sums["host_reads"] += not self.counter.reading and _waits(operator, args, given, made)
        return out


class _Operator(NamedTuple):
    name: Any
    is_composite: bool
    is_mutable: bool
    out: frozenset[str]
    flops: Callable[..., int] | None
    waits: bool


@functools.cache
def _operator(func: Any) -> _Operator:
    """What is known of an operator before it is called."""
    name, schema = func.overloadpacket, func._schema
    return _Operator(
        name=name,
        is_composite=bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")),
        is_mutable=schema.is_mutable,
        out=frozenset(argument.name for argument in schema.arguments if argument.is_out),
        flops=_cpu_attention_flops if name is _CPU_ATTENTION else flop_registry.get(name),
        waits=bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.intersection(func.tags)),
    )


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _bytes(values: Iterable[Any]) -> int:
    """The bytes of the elements of all tensors in ``values``; those that repeat one element in memory count once."""
    total = 0
    for tensor in _tensors(values):
        shape = tensor.shape
        if 0 in tensor.stride():
            shape = torch.Size(
                size if step or not size else 1 for size, step in zip(shape, tensor.stride(), strict=True)
            )
        total += math.prod(shape) * tensor.element_size()
    return total


def _read(operator: _Operator, args: Any, kwargs: Any, made: list[Tensor]) -> int:
    """The bytes that an operator reads."""
    named = _bytes(value for name, value in kwargs.items() if name not in operator.out)
    if operator.name in _PICK:
        return named + _bytes(made) + _bytes(args[1:])
    return named + _bytes(args[1:] if operator.name in _OVERWRITE else args)


def _cpu_attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return 2 * query[..., 0].numel() * key.shape[-2] * (key.shape[-1] + value.shape[-1])


def _waits(operator: _Operator, args: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    """Whether the host waits for what the operator computes, or computed before."""
    if operator.name in _BY_MASK:
        return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1:2]))
    if operator.waits or not made:
        return operator.waits
    return made[0].device.type == "cpu" and any(tensor.device.type != "cpu" for tensor in given)

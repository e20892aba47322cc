"""What is counted is exact, the same in every run, and rises with each fault that costs something."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from knormpress import KnormCache, KnormPress
from knormpress.cache import attention, layer
from knormpress.cache.layer import KnormLayer
from knormpress.cache.tape import Tape
from knormpress.compare.verdicts import THRESHOLDS, judge
from knormpress.errors import KnormError
from knormpress.measure import cost as counting
from knormpress.measure.cost import measure_cost
from knormpress.measure.memory import measure_memory
from knormpress.measure.operators import OperatorCounter
from knormpress.measure.prefill import prefill
from knormpress.methods.full import FullCache
from knormpress.methods.method import Method
from knormpress.records.figures import Cost, Counts
from tests.entry_factory import make_entry
from tests.strategies import tiny_model, tokens

CPU = torch.device("cpu")
PRESS = KnormPress(0.5, prune_after=16, prune_interval=8, skip_layers=())


def counted(work: Callable[[], object], device: torch.device = CPU) -> Counts:
    with torch.no_grad(), OperatorCounter(device) as counter:
        work()
    return counter.take()


def cost(method: Method = PRESS, prompt: int = 40, **how: Any) -> Cost:
    return measure_cost(tiny_model(), method, tokens(prompt), **how)


A, B = torch.ones(4, 6), torch.ones(6, 5)


@pytest.mark.parametrize(
    ("work", "moved", "flops", "allocated"),
    [
        (lambda: A @ B, 4 * (24 + 30 + 20), 2 * 4 * 6 * 5, 4 * 20),
        (lambda: A.view(24), 0, 0, 0),
        (A.contiguous, 0, 0, 0),
        (lambda: A.expand(9, 4, 6).sum(), 4 * (24 + 1), 0, 4),
        (lambda: A.new_empty(7), 0, 0, 28),
        (A.clone, 2 * 4 * 24, 0, 4 * 24),
        (lambda: A[0].copy_(A[1]), 2 * 4 * 6, 0, 0),
        (lambda: A.index_select(0, torch.tensor([1])), 2 * 4 * 6 + 8, 0, 4 * 6),
        (lambda: torch.add(A, A, out=torch.empty(4, 6)), 3 * 4 * 24, 0, 4 * 24),
        (lambda: torch.cat([A, A]), 4 * 4 * 24, 0, 2 * 4 * 24),
    ],
)
def test_bytes_and_flops_of_single_operators(work: Any, moved: int, flops: int, allocated: int) -> None:
    found = counted(work)
    assert (found.moved, found.flops, found.allocated) == (moved, flops, allocated)


def test_views_are_free_but_dispatched() -> None:
    assert counted(lambda: A.view(24).view(2, 12)).ops == 2
    assert counted(lambda: A.t().contiguous()).ops == 2


@pytest.mark.parametrize(
    "read",
    [
        A.tolist,
        A[0, 0].tolist,
        A[0, 0].item,
        A.numpy,
        lambda: np.asarray(A),
        lambda: np.from_dlpack(A),
        lambda: bool(A.all()),
        lambda: float(A[0, 0]),
        lambda: int(A[0, 0]),
        lambda: [7, 8][torch.tensor(1)],
        lambda: f"{A[0, 0]:.1f}",
        lambda: 1.0 in A,
        A.nonzero,
        lambda: A[A > 2],
        lambda: A.clone().__setitem__(A > 2, 0.0),
        lambda: A.masked_select(A > 2),
        lambda: torch.equal(A, A),
        A.unique,
    ],
)
def test_a_read_of_the_host_counts_once(read: Any) -> None:
    assert counted(read).host_reads == 1


@pytest.mark.parametrize(
    "work",
    [
        lambda: A + 1,
        lambda: A[torch.tensor([0, 1])],
        lambda: A.shape[0],
        lambda: torch.tensor([1, 2]),
        lambda: torch.from_numpy(np.ones(3)),
        lambda: A.masked_fill(A > 2, 0.0),
    ],
)
def test_what_reads_nothing_counts_no_read(work: Any) -> None:
    assert counted(work).host_reads == 0


def test_a_copy_to_the_cpu_is_a_read_and_what_is_read_there_is_none() -> None:
    """Tensors of another device that hold no numbers: only the operators are seen."""
    with FakeTensorMode():
        far = torch.empty(3, device="xpu")
        assert counted(far.cpu, far.device).host_reads == 1
        assert counted(lambda: torch.empty(3).copy_(far), far.device).host_reads == 1
        assert counted(lambda: far + far, far.device).host_reads == 0
    assert counted(A.tolist, far.device).host_reads == 0


def test_what_cannot_be_seen() -> None:
    """Memory read by its address, numpy's own work, and what an operator needs inside."""
    address, numbers = A.data_ptr(), A.numpy()
    unseen = counted(lambda: (ctypes.c_float.from_address(address).value, np.partition(numbers, 3)))
    assert unseen == Counts(ops=0, moved=0, flops=0, allocated=0, host_reads=0, attention=0)
    states = torch.ones(1, 1, 64, 8)
    found = counted(lambda: torch.nn.functional.scaled_dot_product_attention(states, states, states))
    # The scores alone are 64 x 64.
    assert found.allocated < 4 * 64 * 64


def test_inference_mode_hides_nothing() -> None:
    def inside() -> None:
        with torch.inference_mode():
            torch.nn.functional.linear(A, A).reshape(16).tolist()

    assert counted(inside) == counted(lambda: torch.nn.functional.linear(A, A).reshape(16).tolist())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_flops_are_those_of_the_formulas(implementation: str) -> None:
    ids = tokens(40)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        eager = tiny_model(attention="eager")
        prefill(eager, ids, DynamicCache(config=eager.config))
    found = measure_cost(tiny_model(attention=implementation), FullCache(), ids, new_tokens=1)
    assert found.baseline_prefill.flops == pytest.approx(flops.get_total_flops(), rel=1e-3)


def test_every_run_and_every_number_of_threads_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_PIECE", 4)
    fresh, chunked = cost(), cost(prefill_chunk=39)
    assert cost() == fresh
    torch.set_num_threads(3)
    try:
        # A control: what is counted does depend on the threads.
        with torch.no_grad():
            cache = KnormCache(tiny_model(), PRESS)
            prefill(tiny_model(), tokens(40), cache)
            split = counted(lambda: prefill(tiny_model(), tokens(1), cache)).ops
            torch.set_num_threads(1)
            assert split != counted(lambda: prefill(tiny_model(), tokens(1), cache)).ops
            torch.set_num_threads(3)
        assert cost() == fresh
        assert cost(prefill_chunk=39) == chunked
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_the_full_cache_against_itself_costs_the_same() -> None:
    found = cost(FullCache())
    assert found.candidate_prefill == found.baseline_prefill
    assert found.candidate_decode == found.baseline_decode
    assert found.baseline_decode.attention == 3 * found.tokens
    assert found.baseline_prefill.host_reads == 1
    assert found.full("decode", "host_reads") == 1.0


@pytest.mark.parametrize("prompt", [5, 40])
@pytest.mark.parametrize(
    "press",
    [
        PRESS,
        KnormPress(0.9, prune_after=16, prune_interval=8),
        KnormPress(0.5, prune_after=16, prune_interval=1),
        KnormPress(layer_keep_ratios=(1.0, 0.8, 0.3), prune_after=16),
        KnormPress(0.5, prune_after=16, schedule="iterative"),
    ],
)
def test_a_pruning_is_among_the_counted_tokens(press: KnormPress, prompt: int) -> None:
    found = cost(press, prompt)
    assert 1 <= found.tokens <= 16
    assert found.candidate_decode.host_reads > found.baseline_decode.host_reads == found.tokens


def test_a_full_cache_costs_the_same_whichever_tokens_come_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made longer without a forward pass."""
    press = KnormPress(0.9, prune_after=16, prune_interval=8)
    made_longer = cost(press)
    assert made_longer.tokens_before > 40
    monkeypatch.setattr(counting, "DynamicLayer", object)
    assert cost(press) == made_longer


def test_how_many_tokens_are_counted_can_be_chosen() -> None:
    found = cost(new_tokens=3)
    assert (found.tokens, found.candidate_decode.attention) == (3, 9)
    for wrong in ({"new_tokens": 0}, {"prompt": 0}):
        with pytest.raises(KnormError, match="wanted at least 1"):
            cost(**wrong)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt-neox", "qwen3-next"])
def test_other_families_are_counted(family: str) -> None:
    method = KnormPress(0.5, prune_after=16, prune_interval=2)
    found = measure_cost(tiny_model(family), method, tokens(40))
    assert found.candidate_decode.attention == found.baseline_decode.attention > 0
    assert found.candidate_decode.flops < found.baseline_decode.flops


def test_compiled_attention_is_refused_in_one_line() -> None:
    with pytest.raises(KnormError, match="compiled code, as of flex attention, can't be counted"):
        measure_cost(tiny_model(attention="flex_attention"), PRESS, tokens(40))


def named(before: Cost, now: Cost) -> dict[str, str]:
    """The metrics that the verdict says have regressed, with the reasons."""
    first, second = (make_entry(parts=("cost",)).model_copy(update={"cost": each}) for each in (before, now))
    findings = judge([first], [second], THRESHOLDS, "").findings
    return {finding.metric: finding.reason for finding in findings if finding.word == "regressed"}


SOUND_UPDATE, SOUND_KEEP, SOUND_BUDGET = KnormLayer.update, KnormLayer._keep, layer.budget
SOUND_MASK = KnormCache.mask_for


def copied_by_cat(self: Tape, states: Tensor, most_spare: float = 0) -> Tensor:
    return self.replace(states if self._store is None else torch.cat([self.view, states], dim=2))


def made_contiguous(self: KnormLayer, *states: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    keys, values = SOUND_UPDATE(self, *states, **kwargs)
    return keys.transpose(1, 2).contiguous().transpose(1, 2), values


def read_by_the_host(self: KnormLayer, *states: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    states[0][0, 0, -1].tolist()
    return SOUND_UPDATE(self, *states, **kwargs)


def pruned_twice(self: KnormLayer, budgets: list[int]) -> None:
    SOUND_KEEP(self, budgets)
    SOUND_KEEP(self, budgets)


def not_while_decoding(*arguments: Any, stored: int, new: int, **named: Any) -> int:
    return stored if new == 1 else SOUND_BUDGET(*arguments, stored=stored, new=new, **named)


def with_a_mask(self: KnormCache, module: Any, mask: Any, batch: int, new: int) -> tuple[Any, bool]:
    own, plain = SOUND_MASK(self, module, mask, batch, new)
    stored = self.layers[module.layer_idx].stored
    return torch.ones(batch, 1, new, stored + new, dtype=torch.bool).tril(stored) if own is None else own, plain


def masks_again(self: KnormCache, *arguments: Any) -> tuple[Any, bool]:
    self._passes.clear()
    return SOUND_MASK(self, *arguments)


@pytest.mark.parametrize(
    ("place", "name", "fault", "metrics", "phase"),
    [
        (Tape, "append", copied_by_cat, {"moved", "allocated"}, "decode"),
        (KnormLayer, "update", made_contiguous, {"ops", "moved", "allocated"}, "decode"),
        (KnormLayer, "update", read_by_the_host, {"host_reads"}, "decode"),
        (KnormLayer, "_keep", pruned_twice, {"ops", "moved"}, "decode"),
        (layer, "budget", not_while_decoding, {"flops"}, "decode"),
        (KnormCache, "mask_for", with_a_mask, {"ops", "allocated"}, "decode"),
        (KnormCache, "mask_for", masks_again, {"ops", "host_reads"}, "prefill"),
    ],
)
def test_a_fault_that_costs_something_is_named(
    monkeypatch: pytest.MonkeyPatch, place: Any, name: str, fault: Any, metrics: set[str], phase: str
) -> None:
    """At keep 0.9, which saves least, and with a prompt in two chunks, as the second has a mask."""
    how: dict[str, Any] = {
        "method": KnormPress(0.9, prune_after=16, prune_interval=16, skip_layers=()),
        "prefill_chunk": 100,
        "prompt": 200,
    }
    before = cost(**how)
    assert named(before, cost(**how)) == {}
    monkeypatch.setattr(place, name, fault)
    # A cache of one's own is not asked whether it keeps to a policy.
    monkeypatch.setattr(counting, "expect_within_policy", lambda *_: None)
    found = named(before, cost(**how))
    assert metrics <= found.keys()
    assert all(phase in found[metric] for metric in metrics)


def test_a_cache_that_never_prunes_while_decoding_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    (sound,) = measure_memory(tiny_model(), [PRESS], tokens(40), decoded_tokens=60)
    monkeypatch.setattr(layer, "budget", not_while_decoding)
    with pytest.raises(KnormError, match="holds 80 tokens of 100, and its policy at most 57"):
        measure_memory(tiny_model(), [PRESS], tokens(40), decoded_tokens=60)
    # Counting needs no reference either, nor more tokens than it counts.
    with pytest.raises(KnormError, match=r"holds \d+ tokens of \d+, and its policy at most \d+"):
        cost()
    # A policy without such a bound, and a cache of one's own, are compared with their past.
    monkeypatch.setattr("knormpress.measure.memory.expect_within_policy", lambda *_: None)
    (grown,) = measure_memory(tiny_model(), [PRESS], tokens(40), decoded_tokens=60)
    first, second = (make_entry(parts=("memory",)).model_copy(update={"memory": each}) for each in (sound, grown))
    found = {finding.metric: finding.word for finding in judge([first], [second], THRESHOLDS, "").findings}
    assert found == {"bytes": "ok", "decoded_bytes": "regressed"}

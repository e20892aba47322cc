"""How much a cache does beside the model: operators for each token, and how often the host waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from knormpress import KnormCache, KnormPress
from knormpress.cache import masks, pruning
from knormpress.cache.layer import KnormLayer, TokenLog
from knormpress.cache.score import StoredTokens, key_norms
from knormpress.measure.operators import OperatorCounter
from tests.fake_accelerator import DEVICE, AcceleratorTensor, FakeAccelerator
from tests.oracle import position_ids
from tests.strategies import left_padding, tokens

LAYERS = 4
PLAN = {"layer_keep_ratios": (1.0, 0.7, 0.5, 0.3), "layer_scores": ("knorm", "keydiff-128", "leverage", "knorm")}
# Behind a prompt of 400 tokens, spare room is 8 slots; each layer is pruned once more.
DECODE = [400, *[1] * 18]
CHUNKS = [200, 200, 200]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count as where the host would wait for each number that it reads; on a CPU there are fewer operators."""
    for module in (pruning, masks):
        monkeypatch.setattr(module, "is_at_hand", lambda tensor: False)


@dataclass(frozen=True)
class Pass:
    """What one forward pass cost, and what became of the layers: which were pruned, and whether one was copied."""

    ops: int
    reads: int
    pruned: int
    copied: bool


def run(model: PreTrainedModel, cache: Cache, sizes: list[int], left: list[int]) -> list[Pass]:
    """Count passes of ``sizes`` tokens; row i has ``left[i]`` tokens of padding before them."""
    total, made = sum(sizes), []
    ids, mask = tokens(total, len(left)), left_padding(total, *left)
    positions, end = position_ids(mask), 0
    with torch.no_grad():
        for size in sizes:
            start, end = end, end + size
            padding = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]} if any(left) else {}
            before = [(held(layer), address(layer)) for layer in cache.layers]
            with OperatorCounter(torch.device("cpu")) as counter:
                model(ids[:, start:end], past_key_values=cache, **padding)
            counts = counter.take()
            after = [(held(layer), address(layer)) for layer in cache.layers]
            pruned = sum(now < was + size for (was, _), (now, _) in zip(before, after, strict=True))
            copied = any(now != was for (_, was), (_, now) in zip(before, after, strict=True))
            made.append(Pass(counts.ops, counts.host_reads, pruned, copied))
    return made


def held(layer: Any) -> int:
    return 0 if layer.keys is None else layer.keys.shape[2]


def address(layer: Any) -> int:
    return 0 if layer.keys is None else layer.keys.data_ptr()


def compare(model: PreTrainedModel, case: tuple[KnormPress, list[int]], sizes: list[int]) -> list[tuple[Pass, Pass]]:
    """Passes through ``KnormCache``, each beside the full cache's."""
    press, left = case
    full = run(model, DynamicCache(config=model.config), sizes[:3], left)
    # What the full cache does depends on no length.
    full += full[-1:] * (len(sizes) - 3)
    return list(zip(run(model, KnormCache(model, press), sizes, left), full, strict=True))


def press(**how: Any) -> KnormPress:
    return KnormPress(**{"keep_ratio": 0.5, "prune_after": 64, "prune_interval": 8, **how})


DECODED = {
    "keep 0.5": (press(), [0]),
    "keep 1.0": (press(keep_ratio=1.0), [0]),
    "all layers": (press(skip_layers=()), [0]),
    "iterative": (press(schedule="iterative", prune_after=210), [0]),
    "plan": (press(**PLAN), [0]),
    "8 rows": (press(), [0] * 8),
}
PADDED = {
    "three rows": (press(), [0, 30, 90]),
    "8 rows": (press(), [0, 10, 20, 30, 40, 50, 60, 70]),
    "plan": (press(**PLAN), [0, 30, 90]),
}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("case", DECODED)
def test_a_decoded_token_without_padding(model, case):
    _, *decoded = compare(model, DECODED[case], DECODE)
    for ours, full in decoded:
        assert ours.reads - full.reads == bool(ours.pruned)
        # Spare room is made by a copy, as the full cache makes one for each token; here that is once in 9 tokens.
        assert ours.ops - full.ops <= (4 if ours.copied else 2) * LAYERS + (82 if case == "plan" else 42) * ours.pruned
    assert sum(ours.copied and not ours.pruned for ours, _ in decoded) < len(decoded) / 3
    assert any(ours.pruned for ours, _ in decoded) == (case != "keep 1.0")


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("case", PADDED)
def test_a_decoded_token_of_a_padded_batch(model, case):
    _, *decoded = compare(model, PADDED[case], DECODE)
    for ours, full in decoded:
        assert ours.reads - full.reads == bool(ours.pruned)
        if not ours.copied:
            assert ours.ops <= 1.10 * full.ops
        assert ours.ops - full.ops <= 0.10 * full.ops + 2 * LAYERS + (106 if case == "plan" else 60) * ours.pruned
    assert any(ours.pruned for ours, _ in decoded)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(("case", "most"), [("keep 0.5", 36), ("8 rows", 36), ("plan", 66)])
def test_a_prefill_in_chunks(model, case, most):
    (ours, full), *chunks = compare(model, DECODED[case], CHUNKS)
    assert ours.reads - full.reads == 1  # whether all scores are finite
    assert ours.ops - full.ops <= most * ours.pruned
    for ours, full in chunks:
        assert ours.pruned == LAYERS - 1
        assert ours.reads - full.reads == 2  # what the mask hides, too
        # On a CPU, attention to past and new tokens in two parts is 13 operators more than one with a mask.
        assert ours.ops - full.ops <= 13 * LAYERS + (10 + most) * ours.pruned


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(("case", "most"), [("three rows", 76), ("8 rows", 76), ("plan", 106)])
def test_a_padded_prefill_in_chunks(model, case, most):
    (ours, full), *chunks = compare(model, PADDED[case], CHUNKS)
    assert ours.reads - full.reads == 3  # what the mask hides, which tokens are padding, and whether scores are finite
    assert ours.ops - full.ops <= most * ours.pruned
    for ours, full in chunks:
        assert ours.reads - full.reads == 2
        assert ours.ops - full.ops <= most * ours.pruned


@pytest.mark.parametrize("passes", [[2_000], [2_000] + [1] * 200], ids=["behind a prompt", "while decoding"])
def test_the_bytes_of_one_prune_and_of_the_token_behind_it(passes):
    """Each kept byte is read and written once, and the keys are read to be ranked: as much again, at keep 0.5.

    The token behind it finds room for itself. To make it then would read and write each kept byte once more.
    """
    layer = KnormLayer(1, press(prune_interval=100), 0.5, key_norms, TokenLog())
    with torch.no_grad(), OperatorCounter(torch.device("cpu")) as counter:
        for size in [*passes, 1]:
            states = [torch.randn(1, 2, size, 64) for _ in range(2)]
            before, kept = counter.take().moved, 2 * layer.keys.nbytes if layer.seen else 0
            layer.update(*states)
    assert layer.seen - layer.pruned_at == 1
    assert before + counter.take().moved < 3.5 * kept


_READS = ["item", "tolist", "numpy", "cpu", "nonzero", "unique", "masked_select", "equal"]
READS = {*_READS, "__bool__", "__int__", "__float__", "__index__", "__contains__"}


class Waits(FakeAccelerator):
    """Counts how often the host waits for the accelerator: to read from it, or to send it something.

    The counts above are taken on the CPU, where other functions find the threshold of a score than elsewhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, far = getattr(function, "__name__", ""), any(isinstance(each, AcceleratorTensor) for each in args)
        targets = [str(each) for each in (*args[1:], *kwargs.values()) if isinstance(each, str | torch.device)]
        sends = str(DEVICE) in targets and ((name == "tensor" and args[0] != []) or (name == "to" and not far))
        reads = far and (name in READS or (name == "to" and "cpu" in targets))
        by_mask = far and name == "__getitem__" and isinstance(args[1], Tensor) and args[1].dtype == torch.bool
        self.waits += reads or by_mask or (sends and not kwargs.get("non_blocking"))
        return super().__torch_function__(function, types, args, kwargs)


def waits(model: PreTrainedModel, make: Callable[[PreTrainedModel], Cache], left: list[int]) -> list[int]:
    """The waits of each pass, of a prompt and of tokens decoded behind it up to the next pruning."""
    sizes, found, end = [100, *[1] * 16], [], 0
    mask = left_padding(sum(sizes), *left)
    with Waits() as device, torch.no_grad():
        cache = make(placed := device.place_model(model))
        ids, positions = (device.place(each) for each in (tokens(sum(sizes), len(left)), position_ids(mask)))
        mask = device.place(mask)
        for size in sizes:
            start, end, device.waits = end, end + size, 0
            padding = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]} if any(left) else {}
            placed(ids[:, start:end], past_key_values=cache, **padding)
            found.append(device.waits)
    return found


def by_reading(held: StoredTokens) -> Tensor:
    return key_norms(held) + 0 * held.keys.sum().item()


def by_sending(held: StoredTokens) -> Tensor:
    return key_norms(held) + torch.tensor([0.0], device=held.keys.device)


@pytest.fixture(scope="module", params=[[0], [0] * 8, [0, 30, 50]], ids=["one row", "8 rows", "padded"])
def beside_the_full_cache(request, model) -> tuple[list[int], list[int]]:
    """The padding of each row, and the waits of the full cache, which has no scores."""
    return request.param, waits(model, lambda placed: DynamicCache(config=placed.config), request.param)


@pytest.mark.parametrize(
    ("score", "more"), [(None, 0), (by_reading, 3), (by_sending, 3)], ids=["sound", "read", "sent"]
)
def test_how_often_the_host_waits_for_another_device(model, beside_the_full_cache, score, more):
    """The scores that wait are controls, and do so in each of the three layers that are pruned."""
    left, full = beside_the_full_cache
    ours = waits(model, lambda placed: KnormCache(placed, press(), score), left)
    prompt, *decoded = (mine - theirs for mine, theirs in zip(ours, full, strict=True))
    assert prompt == (3 if any(left) else 1) + more
    # The rows of a padded batch are pruned within two tokens.
    assert set(decoded) == {0, 1 + more}
    assert decoded.count(0) >= len(decoded) - (2 if any(left) else 1)

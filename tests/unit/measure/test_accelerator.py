"""On an accelerator: every clock reading follows a synchronise of it, and the CPU would keep the same tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import knormpress
from knormpress import KnormCache, KnormPress
from knormpress.cache.score import StoredTokens
from knormpress.measure import calibration, latency
from knormpress.measure.memory import measure_memory
from knormpress.measure.prefill import prefill
from knormpress.records.figures import Reading
from knormpress.workload import devices
from tests.fake_accelerator import CPU, DEVICE, FakeAccelerator, TwoDevices
from tests.quality.test_kept_tokens import wrongly_kept
from tests.strategies import tiny_model, tokens

PRESS = KnormPress(0.5, prune_after=8, skip_layers=())
VECTOR_NORM = torch.linalg.vector_norm


class Readings:
    """How much was in the accelerator's queue at each reading of a clock."""

    def __init__(self, accelerator: FakeAccelerator) -> None:
        self.accelerator, self.queued, self.true = accelerator, list[int](), time.perf_counter

    def __call__(self) -> float:
        self.queued.append(self.accelerator.queued)
        return self.true()


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAccelerator]:
    with FakeAccelerator() as fake:
        monkeypatch.setattr(torch.cuda, "synchronize", fake.synchronize)
        yield fake


@pytest.fixture
def model(accelerator: FakeAccelerator) -> PreTrainedModel:
    return accelerator.place_model(tiny_model(dtype=torch.float32))


@pytest.fixture
def readings(accelerator: FakeAccelerator, monkeypatch: pytest.MonkeyPatch) -> Readings:
    watched = Readings(accelerator)
    monkeypatch.setattr(time, "perf_counter", watched)
    return watched


@pytest.fixture
def prompt(accelerator: FakeAccelerator) -> Tensor:
    return accelerator.place(tokens(200, seed=5))


@pytest.fixture(autouse=True)
def _few_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the accelerator is under test, and not how steady its speed is."""
    monkeypatch.setattr(calibration, "_LOOPS", 2)
    monkeypatch.setattr(calibration, "_COPIED", 2**10)
    monkeypatch.setattr(calibration, "_WIDTH", 2**5)


def in_turn(model: PreTrainedModel, prompt: Tensor, rounds: int = 1, **how: Any) -> None:
    latency.measure_latency(model, [PRESS], prompt, new_tokens=2, rounds=rounds, **how)


def cold(model: PreTrainedModel, prompt: Tensor) -> None:
    latency._process_is_cold = True
    assert latency.cold_ttft(model, prompt, prefill_chunk=None) is not None


CLOCKED: dict[str, Callable[[PreTrainedModel, Tensor], object]] = {
    "one generation": lambda model, ids: latency.time_generation(
        model, ids, lambda: KnormCache(model, PRESS), new_tokens=4
    ),
    "in turn": in_turn,
    "in turn, against the clock": lambda model, ids: in_turn(model, ids, precision=0.0, seconds=0.02),
    "cold": cold,
    "the weights": latency.weights_tpot,
    "calibration": lambda model, ids: calibration.calibrate(ids.device),
}


def test_the_tensors_are_the_accelerators_and_the_results_the_cpus(
    accelerator: FakeAccelerator, model: PreTrainedModel, prompt: Tensor
) -> None:
    assert model.device == prompt.device == torch.arange(2, device=DEVICE).device == DEVICE
    cache = KnormCache(model, PRESS)
    logits = prefill(model, prompt, cache)
    assert logits.device == cache.layers[0].positions.device == DEVICE
    assert accelerator.queued > 0
    accelerator.synchronize(torch.device("cuda:0"))
    assert accelerator.queued > 0
    accelerator.synchronize(DEVICE)
    assert accelerator.queued == 0
    on_cpu = tiny_model(dtype=torch.float32)
    assert torch.equal(logits.cpu(), prefill(on_cpu, prompt.cpu(), KnormCache(on_cpu, PRESS)))


@pytest.mark.parametrize("measured", CLOCKED)
def test_every_clock_is_read_when_the_accelerator_is_done(
    measured: str, model: PreTrainedModel, prompt: Tensor, readings: Readings
) -> None:
    CLOCKED[measured](model, prompt)
    assert len(readings.queued) >= 2
    assert max(readings.queued) == 0


@pytest.mark.parametrize("measured", CLOCKED)
@pytest.mark.parametrize("fault", ["none", "another device"])
def test_control_a_clock_that_does_not_wait_is_seen(
    measured: str, fault: str, model: PreTrainedModel, prompt: Tensor, readings: Readings, monkeypatch: Any
) -> None:
    def wrong(device: torch.device) -> None:
        if fault == "another device":
            devices.synchronize(torch.device("cuda:0"))

    for module in (latency, calibration):
        monkeypatch.setattr(module, "synchronize", wrong)
    CLOCKED[measured](model, prompt)
    assert max(readings.queued) > 0


def test_pytest_benchmarks_clock_too(
    benchmark: Any, model: PreTrainedModel, prompt: Tensor, readings: Readings
) -> None:
    benchmark._timer = readings
    in_turn(model, prompt, 2, repeat=lambda before, run: benchmark.pedantic(run, setup=before, rounds=3))
    assert len(readings.queued) > 2 * 3
    assert max(readings.queued) == 0


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoDevices]:
    with TwoDevices() as fake:
        for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
        yield fake


@pytest.mark.parametrize("measured", [name for name in CLOCKED if name != "calibration"])
@pytest.mark.parametrize("waits_for", ["each", "that of the prompt"])
def test_on_several_devices_a_clock_waits_for_each(
    measured: str, waits_for: str, two_devices: TwoDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's first layer and its output are on the CPU."""
    model, ids = two_devices.split(tiny_model(dtype=torch.float32)), tokens(200, seed=5)
    assert devices.devices_of(model) == (CPU, DEVICE)
    readings = Readings(two_devices)
    monkeypatch.setattr(time, "perf_counter", readings)
    if waits_for != "each":
        monkeypatch.setattr(latency, "devices_of", lambda model: (ids.device,))
    CLOCKED[measured](model, ids)
    assert (max(readings.queued) == 0) == (waits_for == "each")


def test_on_several_devices_the_memory_of_each_is_read(two_devices: TwoDevices) -> None:
    (memory,) = measure_memory(two_devices.split(tiny_model(dtype=torch.float32)), [PRESS], tokens(200, seed=5))
    of_cpu, of_device = memory.candidate_device
    assert of_cpu.name.startswith("process peak RSS")
    assert of_cpu.name.endswith(" (cpu)")
    assert of_device == Reading(name="device peak allocated (cuda:1)", bytes=two_devices.PEAK)
    assert two_devices.reset


def test_no_clock_is_read_elsewhere() -> None:
    """A module that reads a clock belongs in the tests above, unless it only asks how long the user has waited."""
    folder = Path(knormpress.__file__).parent
    clocks = ("perf_counter", "monotonic", "process_time", "time.time(")
    found = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        if any(clock in path.read_text(encoding="utf-8") for clock in clocks)
    }
    waited = {"compare/commits.py", "measure/pairs.py", "tune/search.py"}
    # One makes a method slower, the other says at most so often how far it is; both time nothing.
    waited |= {"measure/losses.py", "cluster/worker.py"}
    assert found - waited == {"measure/calibration.py", "measure/latency.py"}


def kept_and_keys(model: PreTrainedModel, prompt: Tensor) -> list[tuple[Tensor, Tensor]]:
    seen: list[Tensor] = []

    def norms(tokens: StoredTokens) -> Tensor:
        seen.append(tokens.keys.cpu())
        return torch.linalg.vector_norm(tokens.keys, dim=-1, dtype=torch.float32)

    cache = KnormCache(model, PRESS, norms)
    prefill(model, prompt, cache)
    return [(layer.positions, keys) for layer, keys in zip(cache.layers, seen, strict=True)]


def last_digits_off(*args: Any, **kwargs: Any) -> Tensor:
    """Sums in another order, as another device may."""
    norms = VECTOR_NORM(*args, **kwargs)
    return norms * (1 + torch.finfo(torch.float32).eps * (torch.arange(norms.shape[-1]) % 3 - 1))


def half_precision(keys: Tensor, **how: Any) -> Tensor:
    """Norms that a device takes in bfloat16 whatever it is asked for."""
    return VECTOR_NORM(keys.bfloat16(), dim=how["dim"]).float()


@pytest.mark.parametrize(("fault", "right"), [(VECTOR_NORM, True), (last_digits_off, True), (half_precision, False)])
def test_the_cpu_would_keep_the_same_tokens(
    fault: Callable[..., Tensor], right: bool, accelerator: FakeAccelerator, model: PreTrainedModel, prompt: Tensor
) -> None:
    accelerator.faults[VECTOR_NORM] = fault
    found = kept_and_keys(model, prompt)
    assert len(found) == 3
    wrong = [told for positions, keys in found for told in wrongly_kept(positions, keys)]
    assert (wrong == []) == right


def test_control_a_broken_sort_is_seen(accelerator: FakeAccelerator, model: PreTrainedModel, prompt: Tensor) -> None:
    """Prune by norms that the device puts in the wrong order."""
    accelerator.faults[VECTOR_NORM] = lambda keys, **how: -VECTOR_NORM(keys, **how)
    assert any(wrongly_kept(positions, keys) for positions, keys in kept_and_keys(model, prompt))

"""Devices: which are usable and why others are not, waiting for them, their names, and peak memory."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from knormpress import KnormError
from knormpress.records.figures import Reading
from knormpress.workload import devices
from knormpress.workload.devices import PeakMemory, describe_devices, device_name, resolve, synchronize, usable

MIB = 2**20
CPU = torch.device("cpu")


class FakeAccelerator:
    """A stand-in for ``torch.cuda``, ``torch.xpu`` and ``torch.mps`` that remembers what it was asked, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.allocated = 0

    def synchronize(self, device: Any = None) -> None:
        self.calls.append(("synchronize", device))

    def reset_peak_memory_stats(self, device: Any) -> None:
        self.calls.append(("reset", device))

    def max_memory_allocated(self, device: Any) -> int:
        self.calls.append(("peak", device))
        return 123

    def current_allocated_memory(self) -> int:
        return self.allocated

    def get_device_name(self, device: Any) -> str:
        return f"Fake {device}"

    def device_count(self) -> int:
        return 2


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> FakeAccelerator:
    fake = FakeAccelerator()
    for kind in ("cuda", "xpu", "mps"):
        monkeypatch.setattr(torch, kind, fake)
    return fake


@pytest.mark.parametrize("device", ["meta", "warp", "cuda:", "cpu:7", ""])
def test_what_is_no_device_of_ours_is_refused_with_a_reason_of_one_line(device: str) -> None:
    reason = usable(device)
    assert reason
    assert "\n" not in reason
    with pytest.raises(KnormError) as caught:
        resolve(device)
    assert repr(device) in str(caught.value)
    assert reason in str(caught.value)


def test_the_cpu_is_usable() -> None:
    assert usable("cpu") is None
    assert resolve("cpu") == CPU


def test_a_cuda_device_that_does_not_exist_is_not_usable(
    monkeypatch: pytest.MonkeyPatch, accelerator: FakeAccelerator
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "no CUDA device 2; the last one is 1" in str(usable("cuda:2"))


def test_a_driver_that_says_available_but_fails_is_not_usable(
    monkeypatch: pytest.MonkeyPatch, accelerator: FakeAccelerator
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def broken(*shape: int, device: torch.device) -> None:
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with `TORCH_USE_CUDA_DSA`")

    monkeypatch.setattr(torch, "ones", broken)
    assert str(usable("cuda")).endswith("cuda failed: CUDA error: no kernel image is available")


def test_a_device_that_computes_wrong_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.full(shape, 2.0, device=device))
    assert "cpu gave a wrong result" in str(usable("cpu"))


@pytest.mark.parametrize(
    ("working", "chosen"),
    [({"cpu"}, "cpu"), ({"cpu", "xpu"}, "xpu"), ({"cpu", "xpu", "mps"}, "mps"), ({"cpu", "cuda", "mps"}, "cuda")],
)
def test_auto_takes_the_first_usable_kind(monkeypatch: pytest.MonkeyPatch, working: set[str], chosen: str) -> None:
    monkeypatch.setattr(devices, "usable", lambda device: None if device in working else "broken")
    assert resolve("auto") == torch.device(chosen)


def test_describe_devices_gives_a_name_or_a_reason_and_never_both() -> None:
    states = describe_devices()
    assert [state.device for state in states] == ["cuda", "mps", "xpu", "cpu"]
    assert all((state.name is None) != (state.reason is None) for state in states)
    assert states[-1].name == device_name(CPU)


def test_device_name_is_the_makers(accelerator: FakeAccelerator) -> None:
    assert device_name(torch.device("cuda:1")) == "Fake cuda:1"
    assert device_name(torch.device("xpu:1")) == "Fake xpu:1"
    assert device_name(torch.device("mps")) == f"{device_name(CPU)} GPU (MPS)"


@pytest.mark.parametrize(("device", "asked"), [("cuda:1", "cuda:1"), ("xpu:1", "xpu:1"), ("mps", None), ("cpu", "")])
def test_synchronize_waits_for_exactly_that_device(
    accelerator: FakeAccelerator, device: str, asked: str | None
) -> None:
    synchronize(torch.device(device))
    assert accelerator.calls == ([] if device == "cpu" else [("synchronize", asked and torch.device(asked))])


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_an_accelerators_peak_is_reset_before_the_section_and_read_when_it_is_done(
    accelerator: FakeAccelerator, kind: str
) -> None:
    device = torch.device(kind, 1)
    with PeakMemory(device) as peak:
        accelerator.calls.append(("section", None))
    assert peak.readings == (Reading(name="device peak allocated", bytes=123),)
    assert accelerator.calls == [
        ("synchronize", device),
        ("reset", device),
        ("section", None),
        ("synchronize", device),
        ("peak", device),
    ]


def test_mps_gives_the_largest_allocation_that_was_seen_inside_or_on_exit(accelerator: FakeAccelerator) -> None:
    """A second section starts anew."""
    peak = PeakMemory(torch.device("mps"))
    for inside, on_exit in ((700, 300), (100, 500), (0, 200)):
        accelerator.allocated = 0
        with peak:
            accelerator.allocated = inside
            peak.sample()
            accelerator.allocated = on_exit
        assert peak.readings == (Reading(name="device allocated, largest sample", bytes=max(inside, on_exit)),)


def test_a_section_that_fails_keeps_its_error_and_has_no_reading(accelerator: FakeAccelerator) -> None:
    peak = PeakMemory(torch.device("cuda"))
    with pytest.raises(ZeroDivisionError), peak:
        raise ZeroDivisionError
    assert peak.readings == ()


def peak_of_a_section(mebibytes: int) -> Reading:
    with PeakMemory(CPU) as peak:
        # Written to, or the kernel would never give it memory.
        held = bytearray(b"x") * (mebibytes * MIB)
        del held
    (reading,) = peak.readings
    return reading


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can reset its high-water mark")
def test_the_cpus_peak_is_that_of_the_section_not_of_the_process() -> None:
    large = peak_of_a_section(256)
    small = peak_of_a_section(1)
    if large.name != "process peak RSS of the section":
        pytest.skip("this kernel does not let a process reset its high-water mark")
    assert large.bytes is not None
    assert small.bytes is not None
    assert 200 * MIB < large.bytes - small.bytes < 300 * MIB


@pytest.mark.skipif(sys.platform == "win32", reason="there is no getrusage")
def test_where_the_mark_cant_be_reset_the_reading_says_since_when(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "_CLEAR_REFS", tmp_path / "no-such-folder" / "clear_refs")
    peak_of_a_section(256)
    later = peak_of_a_section(1)
    assert later.name == "process peak RSS since it began"
    assert later.bytes is not None
    # ru_maxrss is in kilobytes or in bytes by system; the wrong one of the two is off by a factor of 1,024.
    assert 256 * MIB < later.bytes < 256 * MIB * 256


def test_the_processor_is_named_from_proc_or_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(devices, "_CPUINFO", cpuinfo)
    monkeypatch.setattr(devices, "platform", SimpleNamespace(processor=lambda: "", machine=lambda: "riscv64"))
    assert device_name(CPU) == "riscv64"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Abacus 9000\nprocessor\t: 1\nmodel name\t: Abacus 9000\n")
    assert device_name(CPU) == "Abacus 9000"

"""What differs between kinds of devices: whether one really works, how to wait for it, what memory it reports.

A model may be on several, see ``devices_of``.

The CUDA, MPS and XPU parts follow torch's documentation of ``torch.cuda``, ``torch.mps`` and ``torch.xpu``.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from knormpress.cache.hooks import device_of
from knormpress.errors import KnormError
from knormpress.records.figures import Reading

__all__ = [
    "DeviceState",
    "PeakMemory",
    "describe_devices",
    "describe_map",
    "device_name",
    "devices_of",
    "input_device",
    "resolve",
    "synchronize",
    "usable",
]

# "auto" tries them in this order.
_KINDS = ("cuda", "mps", "xpu", "cpu")

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_CPUINFO = Path("/proc/cpuinfo")


class DeviceState(NamedTuple):
    """A kind of device, with its ``name`` if it is usable, or else the ``reason`` why not."""

    device: str
    name: str | None
    reason: str | None


def usable(device: str) -> str | None:
    """None if ``device`` (such as ``"cuda:1"``) really works, else the reason why not, in one line.

    It is tried with an allocation, a small matrix product and a read of the result, since torch reports a device as
    available even if its driver is broken.
    """
    try:
        target = torch.device(device)
    except RuntimeError:
        return f"{device!r} is not a device name; wanted {_wanted()}"
    if target.type not in _KINDS:
        return f"{device!r} is a device type that KnormPress doesn't support; wanted {_wanted()}"
    missing = _missing(target)
    if missing is not None:
        return missing
    try:
        ones = torch.ones(8, 8, device=target)
        product = (ones @ ones).cpu()
    except (AssertionError, NotImplementedError, OSError, RuntimeError) as error:
        return f"a small matrix product on {device} failed: {_first_line(error)}"
    if not torch.equal(product, torch.full((8, 8), 8.0)):
        return f"a small matrix product on {device} gave a wrong result"
    return None


def resolve(device: str) -> torch.device:
    """The torch device for ``device``: a name such as ``"cuda:1"``, or ``"auto"`` for the first usable one of cuda,
    mps, xpu and cpu.

    Raises:
        KnormError: the device is not usable on this machine.
    """
    if device == "auto":
        return torch.device(next(kind for kind in _KINDS if usable(kind) is None))
    reason = usable(device)
    if reason is not None:
        raise KnormError(f"device {device!r} can't be used: {reason}")
    return torch.device(device)


def describe_devices() -> list[DeviceState]:
    """Try every kind of device, in the order in which ``"auto"`` prefers them."""
    states = []
    for kind in _KINDS:
        reason = usable(kind)
        states.append(DeviceState(kind, device_name(torch.device(kind)) if reason is None else None, reason))
    return states


def device_name(device: torch.device) -> str:
    """The name of the product: the GPU's or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "xpu":
        return str(torch.xpu.get_device_name(device))
    if device.type == "mps":
        return f"{_processor()} GPU (MPS)"
    return _processor()


def devices_of(model: PreTrainedModel) -> tuple[torch.device, ...]:
    """Every device that holds weights of ``model``. What waits on disk passes through the CPU's memory."""
    places = _places(model)
    if places is None:
        return tuple(dict.fromkeys(weight.device for weight in model.parameters()))
    return tuple(dict.fromkeys(torch.device("cpu" if place == "disk" else place) for place in places.values()))


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids of ``model`` go: the device that its input embedding computes on."""
    return device_of(model.get_input_embeddings())


def describe_map(model: PreTrainedModel) -> str | None:
    """Where each part of ``model`` is, such as ``cpu: model.embed_tokens, model.layers.0-3; disk: model.layers.4-9``.

    None if all of it is on one device.
    """
    places = _places(model)
    if places is None:
        return None
    names: dict[str, list[str]] = {}
    for name, place in places.items():
        names.setdefault("disk" if place == "disk" else str(torch.device(place)), []).append(name or "all")
    return "; ".join(f"{place}: {', '.join(_in_short(held))}" for place, held in names.items())


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work; without this, a clock would time the queue, not the work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    elif device.type == "xpu":
        torch.xpu.synchronize(device)


class PeakMemory:
    """The peak memory of a section of code, as far as the device reports it.

    Use it as ``with PeakMemory(device) as peak: ...``, then read ``peak.readings``. On CUDA and XPU it is the
    allocator's peak in the section. MPS has no peak, so the figure is the largest allocation seen on entry, on exit and
    at every ``peak.sample()`` in the section. On the CPU it is the peak resident memory of the whole process, with the
    model: in the section if the kernel can reset the peak (Linux), else since the process started (macOS, Windows).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.readings: tuple[Reading, ...] = ()
        self._sampled = 0
        self._was_reset = False

    def __enter__(self) -> PeakMemory:
        synchronize(self.device)
        self.readings = ()
        self._sampled = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.device.type == "xpu":
            torch.xpu.reset_peak_memory_stats(self.device)
        elif self.device.type == "cpu":
            self._was_reset = _reset_peak_rss()
        self.sample()
        return self

    def sample(self) -> None:
        """Read the current allocation. Only needed on MPS; does nothing on other devices."""
        if self.device.type == "mps":
            self._sampled = max(self._sampled, torch.mps.current_allocated_memory())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            # The device itself may have failed: another call could hide the first error.
            return
        synchronize(self.device)
        self.sample()
        self.readings = (self._read(),)

    def _read(self) -> Reading:
        if self.device.type == "cuda":
            return Reading(name="device peak allocated", bytes=torch.cuda.max_memory_allocated(self.device))
        if self.device.type == "xpu":
            return Reading(name="device peak allocated", bytes=int(torch.xpu.max_memory_allocated(self.device)))
        if self.device.type == "mps":
            return Reading(name="device allocated, largest sample", bytes=self._sampled)
        if self._was_reset:
            return Reading(name="process peak RSS of the section", bytes=_peak_rss_since_reset())
        return _peak_rss_of_process()


def _places(model: PreTrainedModel) -> dict[str, int | str | torch.device] | None:
    """The map by which accelerate has spread ``model``; None if it is all on one device."""
    places: dict[str, int | str | torch.device] = getattr(model, "hf_device_map", {})
    used = set(places.values())
    return places if len(used) > 1 or "disk" in used else None


def _in_short(names: Sequence[str]) -> Iterator[str]:
    """Write neighbouring numbers as one: ``layers.3``, ``layers.4`` and ``layers.5`` as ``layers.3-5``."""

    def run(numbered: tuple[int, str]) -> tuple[str, int | None]:
        index, name = numbered
        stem, _, number = name.rpartition(".")
        return (stem, int(number) - index) if number.isdigit() else (name, None)

    for _, group in groupby(enumerate(names), key=run):
        (_, first), *others = group
        yield f"{first}-{others[-1][1].rpartition('.')[2]}" if others else first


def _wanted() -> str:
    return '"auto", "cpu", "cuda" or "cuda:N", "mps", or "xpu"'


def _missing(device: torch.device) -> str | None:
    """Why torch can't find the device, in one line (torch's own messages can be a paragraph); None if it can."""
    if device.type == "cuda":
        if torch.version.cuda is None and torch.version.hip is None:
            return "this torch was built without CUDA"
        return _absent("CUDA", torch.cuda.device_count(), device.index)
    if device.type == "xpu":
        return _absent("XPU", torch.xpu.device_count(), device.index)
    if device.type == "mps":
        if not torch.backends.mps.is_built():
            return "this torch was built without MPS"
        if not torch.backends.mps.is_available():
            return "torch finds no MPS device; it needs macOS 14 or later on an Apple GPU"
        return _absent("MPS", 1, device.index)
    return _absent("CPU", 1, device.index)


def _absent(kind: str, count: int, index: int | None) -> str | None:
    if count == 0:
        return f"torch finds no {kind} device"
    if index is not None and index >= count:
        return f"there is no {kind} device {index}; the last one is {count - 1}"
    return None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _processor() -> str:
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", _CPUINFO.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        model = None
    return model.group(1) if model else platform.processor() or platform.machine()


def _reset_peak_rss() -> bool:
    """Reset Linux's peak of resident memory to the current value; False if that is not possible."""
    try:
        # proc(5): writing 5 resets VmHWM. Containers may forbid it, and other systems have no such file.
        _CLEAR_REFS.write_text("5", encoding="ascii")
        return "VmHWM:" in _STATUS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return False


def _peak_rss_since_reset() -> int:
    match = re.search(r"^VmHWM:\s*(\d+) kB$", _STATUS.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    assert match is not None, "_reset_peak_rss has seen the line"
    return int(match.group(1)) * 1024


def _peak_rss_of_process() -> Reading:
    name = "process peak RSS since it began"
    if sys.platform == "win32":
        try:
            import psutil
        except ImportError:
            return Reading(name=name, bytes=None, reason='psutil is not installed; pip install "knormpress[harness]"')
        return Reading(name=name, bytes=int(psutil.Process().memory_info().peak_wset))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # getrusage(2) gives bytes on macOS, and kilobytes on other systems.
    return Reading(name=name, bytes=peak if sys.platform == "darwin" else peak * 1024)

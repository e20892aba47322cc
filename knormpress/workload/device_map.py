"""How a model that is larger than a device is spread over several: the text of ``--device-map`` as a value. No torch.

``workload.models.load_model`` hands it to transformers, which spreads the model with accelerate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from knormpress.errors import KnormError

__all__ = ["DeviceMap"]

# As transformers calls them; "auto" is "balanced" there.
_NAMES = ("auto", "balanced", "balanced_low_0", "sequential")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_LIMIT = re.compile(r"(cpu|mps|(?:cuda|xpu)(?::\d+)?)=(\d+(?:\.\d+)?)([KMG]i?B)", re.IGNORECASE)


@dataclass(frozen=True)
class DeviceMap:
    """Spreads a model over the devices of the machine, then the CPU's memory, then the disk.

    Args:
        name: how: ``"auto"``, ``"balanced"``, ``"balanced_low_0"`` or ``"sequential"``, as in transformers.
        limits: the most bytes of weights on each device, by its name; the devices that are not named hold none. Without
            limits transformers takes what is free.
    """

    name: str
    limits: tuple[tuple[str, int], ...] = ()

    @classmethod
    def read(cls, text: str) -> DeviceMap:
        """Read a map as the user types it: ``auto``, or ``auto,cuda:0=10GB,cpu=2GiB``.

        Raises:
            KnormError: the text is something else, or names a device twice.
        """
        name, *limits = (word.strip() for word in text.split(","))
        found = [_LIMIT.fullmatch(limit) for limit in limits]
        devices = [limit[1].lower() for limit in found if limit]
        if name not in _NAMES or not all(found) or len(set(devices)) < len(devices):
            raise KnormError(
                f"wanted {', '.join(_NAMES[:-1])} or {_NAMES[-1]}, then the most memory of each device if not all that "
                "is free: auto,cuda:0=10GB,cpu=2GB"
            )
        sizes = [int(float(limit[2]) * _UNITS[limit[3].upper()]) for limit in found if limit]
        return cls(name, tuple(zip(devices, sizes, strict=True)))

    @property
    def first(self) -> str:
        """The device that the model begins on, before anything is loaded: of those that ``limits`` name, or "auto"."""
        devices = [device for device, _ in self.limits]
        return next((device for device in devices if device != "cpu"), "cpu" if devices else "auto")

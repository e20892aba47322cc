"""The devices of a cluster: each GPU, and each node with all its CPUs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from knormpress.errors import KnormError

__all__ = ["Device", "devices_of", "fitting"]


class Device(NamedTuple):
    """What one worker owns: a GPU, the ``number`` of its node, with its share of the CPUs; or all CPUs of a node."""

    node_id: str
    node: str
    gpus: int
    cpus: int
    number: int = 0


def devices_of(nodes: Iterable[Mapping[str, Any]]) -> list[Device]:
    """The devices of the living nodes that ``ray.nodes()`` lists: each GPU, and each node with CPUs."""
    devices = []
    for node in nodes:
        cpus, gpus = (int(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
        if not node["Alive"]:
            continue
        # Ray calls a node by its address, unless it was given a name.
        named = node["NodeName"] != node["NodeManagerAddress"]
        name = str(node["NodeName"] if named else node["NodeManagerHostname"])
        devices += [Device(node["NodeID"], name, 1, cpus // gpus, number) for number in range(gpus)]
        if cpus:
            devices.append(Device(node["NodeID"], name, 0, cpus))
    return devices


def fitting(wanted: str, devices: Sequence[Device]) -> list[Device]:
    """The devices that ``wanted`` means: the GPUs for ``cuda`` and ``xpu``, the nodes for ``cpu`` and ``mps``.

    ``auto`` means the GPUs if there are any.

    Raises:
        KnormError: there is none.
    """
    gpu = any(device.gpus for device in devices) if wanted == "auto" else wanted in ("cuda", "xpu")
    found = [device for device in devices if bool(device.gpus) == gpu]
    if not found:
        names = ", ".join(sorted({device.node for device in devices})) or "none"
        what = "GPU" if gpu else "node with CPUs"
        raise KnormError(
            f"device is {wanted}, but the cluster has no {what}; its nodes: {names}; add one with ray start, or name "
            "another device"
        )
    return found

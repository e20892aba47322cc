"""Connect to a Ray cluster, or say in one line why that can't be."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from knormpress.cluster.words import first_line
from knormpress.errors import KnormError

__all__ = ["connected", "expect_given_out"]

# Seconds to wait for the head of the cluster to take a connection.
_ANSWER_S = 10.0


def expect_given_out(devices: Sequence[str], device_map: object | None) -> None:
    """Check that Ray can give out what a user asked for.

    Args:
        devices: the devices as the user named them.
        device_map: a map of one machine's devices, if one was given.

    Raises:
        KnormError: a device has a number, or there is a map.
    """
    for name in devices:
        if ":" in name:
            raise KnormError(f"device is {name}, but Ray gives out the devices; use {name.partition(':')[0]}")
    if device_map is not None:
        raise KnormError("--device-map spreads a model over one machine's devices; leave it out with --ray")


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster at ``address``.

    Args:
        address: ``local`` starts a cluster on this machine and stops it in the end; ``auto`` is the cluster that this
            machine is a node of; or HOST:PORT of its head.

    Raises:
        KnormError: Ray is not installed, or does not answer within about a minute.
    """
    if find_spec("ray") is None:
        raise KnormError('Ray is not installed; pip install "knormpress[cluster]"')
    if address not in ("local", "auto"):
        _expect_answer(address)
    # Ray reads these when it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "local":
        # It would have its workers give way to all other processes, also while a clock runs.
        os.environ.setdefault("RAY_worker_niceness", "0")
    else:
        # It would try for a quarter of an hour.
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    import ray

    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # of many kinds
        raise KnormError(
            f"no Ray cluster can be reached at --ray {address}: {first_line(error).rstrip('.')}; wanted local, auto "
            "or HOST:PORT of the head, on a machine that is a node of it"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _expect_answer(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        if not host or "/" in host:
            raise ValueError
        socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
    except ValueError:
        raise KnormError(f"--ray is {address!r}; wanted local, auto, or HOST:PORT of the cluster's head") from None
    except OSError as error:
        raise KnormError(
            f"nothing answers at --ray {address} ({error}); wanted local, auto, or HOST:PORT of the cluster's head"
        ) from error

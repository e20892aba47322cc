"""A description of the machine and the software that a measurement uses."""

from __future__ import annotations

import platform

import torch
import transformers

import knormpress
from knormpress.records.git import head, is_dirty
from knormpress.records.schema import Environment
from knormpress.workload.devices import device_name

__all__ = ["describe_environment"]


def describe_environment(*devices: torch.device, device_map: str | None = None) -> Environment:
    """Describe this process on the devices of a model, for a record; ``device_map`` is that of ``describe_map``.

    The commit is that of the repository in the current directory, which holds the user's own changes; None outside of
    a repository.
    """
    commit = head()
    return Environment(
        knormpress=knormpress.__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        platform=platform.platform(),
        processor=platform.processor() or platform.machine(),
        device=", ".join(map(str, devices)),
        device_name=", ".join(dict.fromkeys(map(device_name, devices))),
        device_map=device_map,
        threads=torch.get_num_threads(),
        git_commit=commit,
        git_dirty=None if commit is None else is_dirty(),
    )

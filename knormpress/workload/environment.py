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


def describe_environment(device: torch.device) -> Environment:
    """Describe this process on ``device``, for a record.

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
        device=str(device),
        device_name=device_name(device),
        threads=torch.get_num_threads(),
        git_commit=commit,
        git_dirty=None if commit is None else is_dirty(),
    )

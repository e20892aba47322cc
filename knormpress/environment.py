"""The machine and the software a cell is measured with."""

from __future__ import annotations

import platform

import torch
import transformers

import knormpress
from knormpress.commits import head, is_dirty
from knormpress.devices import device_name
from knormpress.records import Environment

__all__ = ["describe_environment"]


def describe_environment(device: torch.device) -> Environment:
    """What a record says of this process on ``device``.

    The commit is that of the repository around the current directory, the one that a user's own changes are in; None
    outside of one.
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

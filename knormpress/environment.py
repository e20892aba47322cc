"""The machine and the software a cell is measured with."""

from __future__ import annotations

import platform
import subprocess

import torch
import transformers

import knormpress
from knormpress.devices import device_name
from knormpress.records import Environment

__all__ = ["describe_environment"]


def describe_environment(device: torch.device) -> Environment:
    """What a record says of this process on ``device``.

    The commit is that of the repository around the current directory, the one that a user's own changes are in; None
    outside of one. It counts as dirty when a tracked file was changed: untracked results change no measurement.
    """
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
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
        git_dirty=None if commit is None or changed is None else bool(changed),
    )


def _git(*arguments: str) -> str | None:
    try:
        ran = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None

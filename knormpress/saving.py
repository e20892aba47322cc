"""A cache's state in a safetensors file: written whole or not at all, and read only by what it was written for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from knormpress.errors import KnormError
from knormpress.files import replacing
from knormpress.fingerprints import model_fingerprint

__all__ = ["FORMAT", "read_state", "write_state"]

FORMAT = "knormpress-cache-1"
"""The version of the file format: a file of any other is refused."""


def write_state(path: Path, model: PreTrainedModel, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write ``tensors`` and the JSON-ready ``state`` for ``model``, beside ``path`` and then renamed over it."""
    metadata = {"format": FORMAT, "model": model_fingerprint(model), "state": json.dumps(state)}
    try:
        with replacing(path) as beside:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, metadata)
    except (SafetensorError, OSError) as error:
        raise KnormError(f"the cache can't be written to {path}: {error}; give a path that can be written") from error


def read_state(path: Path, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``write_state`` wrote for ``model``, on the model's device.

    Raises:
        KnormError: the file is not there, is cut short or no saved cache, or is of another model or format version.
    """
    if not path.is_file():
        raise KnormError(f"{path} is not there; wanted a file that KnormCache.save wrote")
    try:
        with safe_open(path, framework="pt", device=str(model.device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError) as error:
        raise KnormError(f"{path} is cut short or no saved cache ({error}); save the cache again") from error
    if metadata.get("format") != FORMAT:
        raise KnormError(f"{path} has format {metadata.get('format')!r}; this version reads {FORMAT!r}: save it again")
    if metadata["model"] != model_fingerprint(model):
        raise KnormError(
            f"{path} was saved with another model (its fingerprint is {metadata['model']}, this one's "
            f"{model_fingerprint(model)}); load it with the model, dtype included, that filled it"
        )
    return tensors, json.loads(metadata["state"])

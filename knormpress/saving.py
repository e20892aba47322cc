"""A cache's state in a safetensors file: written whole or not at all, and read only by what it was written for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from knormpress.errors import KnormError
from knormpress.files import replacing

__all__ = ["FORMAT", "fingerprint", "read_state", "write_state"]

FORMAT = "knormpress-cache-1"
"""The version of the file format: a file of any other is refused."""

_SAMPLES = 64


def fingerprint(model: PreTrainedModel) -> str:
    """16 hexadecimal digits that tell one model from another, on whatever device it is.

    A SHA-256 over the configuration, without what merely says who wrote it or how attention is computed, and over name,
    type, shape and 64 evenly spread values of every weight: training moves all of them, so any other training shows.
    """
    config = model.config.to_dict()
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    with torch.inference_mode():
        for name, weight in sorted(model.state_dict().items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            flat = weight.detach().flatten()
            digest.update(flat[_spread(flat.numel()).to(flat.device)].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


def _spread(size: int) -> Tensor:
    """Up to 64 indices from 0 to ``size`` - 1. In integers: floats can't tell the last index of a large tensor."""
    count = min(_SAMPLES, size)
    return torch.arange(count) * (size - 1) // max(count - 1, 1)


def write_state(path: Path, model: PreTrainedModel, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write ``tensors`` and the JSON-ready ``state`` for ``model``, beside ``path`` and then renamed over it."""
    metadata = {"format": FORMAT, "model": fingerprint(model), "state": json.dumps(state)}
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
    if metadata["model"] != fingerprint(model):
        raise KnormError(
            f"{path} was saved with another model (its fingerprint is {metadata['model']}, this one's "
            f"{fingerprint(model)}); load it with the model, dtype included, that filled it"
        )
    return tensors, json.loads(metadata["state"])

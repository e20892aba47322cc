"""What tells one model from another: of the files in its folder, whatever they are loaded as, and of a loaded model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from knormpress.errors import KnormError
from knormpress.weights import weight_files

__all__ = ["folder_fingerprint", "model_fingerprint"]

# Of a tensor in a file that has more than so many blocks, so many are read.
_BLOCKS = 16
_BLOCK = 4096

_VALUES = 64


def folder_fingerprint(folder: Path) -> str:
    """16 hexadecimal digits that tell one model from another, whatever device and type it is to run with.

    A SHA-256 over the configuration, without what merely says who wrote the file, and over the name, type, shape and
    bytes of every tensor in the safetensors files. Of a tensor above 64 KiB sixteen blocks of 4 KiB count, spread
    evenly from its first byte to its last: training moves every weight, so any other training shows, and large models
    stay quick.

    Raises:
        KnormError: the folder has no configuration or no safetensors weights.
    """
    files = weight_files(folder)
    if not files:
        raise KnormError(f"{folder} holds no whole model; wanted config.json and its weights as safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    volatile = {"dtype", "torch_dtype", "transformers_version"}
    kept = {key: value for key, value in config.items() if key not in volatile and not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for name, path, begin, entry in sorted(_tensors(files)):
        first, last = entry["data_offsets"]
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        with path.open("rb") as file:
            for offset in _sampled(last - first):
                file.seek(begin + first + offset)
                digest.update(file.read(min(_BLOCK, last - first - offset)))
    return digest.hexdigest()[:16]


def model_fingerprint(model: PreTrainedModel) -> str:
    """16 hexadecimal digits that tell one loaded model from another, on whatever device it is; its type counts.

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


def _tensors(files: list[Path]) -> Iterator[tuple[str, Path, int, dict[str, Any]]]:
    """Each tensor's name, file, where the file's data begin, and its entry in the header of the safetensors format."""
    for path in files:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            yield name, path, 8 + size, entry


def _sampled(size: int) -> Iterator[int]:
    """Offsets of the blocks of a tensor of ``size`` bytes that count."""
    if size <= _BLOCKS * _BLOCK:
        yield from range(0, size, _BLOCK)
    else:
        yield from (i * (size - _BLOCK) // (_BLOCKS - 1) for i in range(_BLOCKS))


def _spread(size: int) -> Tensor:
    """Up to 64 indices from 0 to ``size`` - 1. In integers: floats can't tell the last index of a large tensor."""
    count = min(_VALUES, size)
    return torch.arange(count) * (size - 1) // max(count - 1, 1)

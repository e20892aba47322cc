"""The files of a model in a folder: which of them hold its weights, and a fingerprint of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from knormpress.errors import KnormError

__all__ = ["folder_fingerprint", "weight_files"]

# At most this many blocks of a tensor are read for the fingerprint.
_BLOCKS = 16
_BLOCK = 4096


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model in ``folder``; empty if the model is not complete."""
    if not (folder / "config.json").is_file():
        return []
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    else:
        names = {"model.safetensors"}
    files = [folder / name for name in sorted(names)]
    return files if all(path.is_file() for path in files) else []


def folder_fingerprint(folder: Path) -> str:
    """16 hexadecimal digits that identify a model; the device and dtype it runs with make no difference.

    A SHA-256 over the configuration (without its versions, dtype and private fields), and over the name, dtype, shape
    and bytes of every tensor in the safetensors files. For speed, only sixteen blocks of 4 KiB, spread evenly from
    first to last byte, count for a tensor above 64 KiB. This is enough, since training changes every weight.

    Raises:
        KnormError: the folder has no configuration or no safetensors weights.
    """
    files = weight_files(folder)
    if not files:
        raise KnormError(f"{folder} holds no complete model; wanted config.json and its weights as safetensors")
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


def _tensors(files: list[Path]) -> Iterator[tuple[str, Path, int, dict[str, Any]]]:
    """For each tensor: its name, its file, the offset of the file's data, and its entry in the safetensors header."""
    for path in files:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            yield name, path, 8 + size, entry


def _sampled(size: int) -> Iterator[int]:
    """Offsets of the blocks to read from a tensor of ``size`` bytes."""
    if size <= _BLOCKS * _BLOCK:
        yield from range(0, size, _BLOCK)
    else:
        yield from (i * (size - _BLOCK) // (_BLOCKS - 1) for i in range(_BLOCKS))

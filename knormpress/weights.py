"""The weights of a model in a folder: which files hold them, and a fingerprint that tells one model from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from knormpress.errors import KnormError

__all__ = ["fingerprint", "weight_files"]

# A tensor of more than this many blocks is sampled in so many blocks.
_SAMPLES = 16
_BLOCK = 4096


def fingerprint(folder: Path) -> str:
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
    if size <= _SAMPLES * _BLOCK:
        yield from range(0, size, _BLOCK)
    else:
        yield from (i * (size - _BLOCK) // (_SAMPLES - 1) for i in range(_SAMPLES))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a whole model, or nothing if there is none in the folder."""
    if not (folder / "config.json").is_file():
        return []
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    else:
        names = {"model.safetensors"}
    files = [folder / name for name in sorted(names)]
    return files if all(path.is_file() for path in files) else []

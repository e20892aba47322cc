"""Which files hold the weights of a model in a folder."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["weight_files"]


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

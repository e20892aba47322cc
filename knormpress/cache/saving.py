"""Save a cache's state in a safetensors file, and load it for the same model only."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from knormpress.cache.fingerprint import model_fingerprint
from knormpress.cache.score import name_of
from knormpress.errors import KnormError
from knormpress.files import replacing

__all__ = ["FORMAT", "expect_lasting_name", "is_score", "read_state", "write_state"]

FORMAT = "knormpress-cache-1"
"""The version of the file format; a file with another version is refused."""


def expect_lasting_name(score: object) -> None:
    """Check that the name of ``score`` stands for it alone, in the next process too.

    Raises:
        KnormError: it doesn't, as with a lambda, a function inside another one, a partial, or a method of an instance.
    """
    name = name_of(score)
    # All functions that one line makes share a name; so do the methods of all instances. An address is new each time.
    is_bound = inspect.ismethod(score) and not inspect.isclass(score.__self__)
    if is_bound or any(part in name for part in ("<lambda>", "<locals>", " at 0x")):
        raise KnormError(
            f"the score {name} has no name that a file could keep; define the score as a function at the top of a "
            "module"
        )


def is_score(name: str, score: object) -> bool:
    """Whether ``name`` in a file names ``score``. Modules of KnormPress don't count, since its scores may move."""
    expected = name_of(score)
    ours = all(each.startswith("knormpress.") for each in (name, expected))
    return name.rpartition(".")[2] == expected.rpartition(".")[2] if ours else name == expected


def write_state(path: Path, model: PreTrainedModel, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write ``tensors`` and the JSON-ready ``state`` of a cache of ``model`` to ``path``."""
    metadata = {"format": FORMAT, "model": model_fingerprint(model), "state": json.dumps(state)}
    try:
        with replacing(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    except (SafetensorError, OSError) as error:
        raise KnormError(f"the cache can't be written to {path}: {error}; give another path") from error


def read_state(path: Path, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``write_state`` wrote for ``model``, onto the CPU.

    Raises:
        KnormError: the file is missing, is not a complete saved cache, or is for another model or format version.
    """
    if not path.is_file():
        raise KnormError(f"{path} does not exist; wanted a file written by KnormCache.save")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise KnormError(f"{path} is not a complete saved cache ({error}); save the cache again") from error
    if metadata.get("format") != FORMAT:
        raise KnormError(f"{path} has format {metadata.get('format')!r}; wanted {FORMAT!r}: save it again")
    if metadata["model"] != model_fingerprint(model):
        raise KnormError(
            f"{path} was saved with another model (fingerprint {metadata['model']}, wanted "
            f"{model_fingerprint(model)}); load it with the same model and dtype"
        )
    return tensors, json.loads(metadata["state"])

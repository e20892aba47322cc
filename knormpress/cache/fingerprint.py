"""A fingerprint that identifies a loaded model: a saved cache and a plan are for one model only."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from knormpress.errors import KnormError

__all__ = ["model_fingerprint"]

_VALUES = 64


def model_fingerprint(model: PreTrainedModel) -> str:
    """16 hexadecimal digits that identify a loaded model and its dtype; the device makes no difference.

    A SHA-256 over the configuration (without its version and its private fields, such as the attention implementation),
    and over name, dtype, shape and 64 evenly spread values of every weight. Training changes every weight.
    """
    config = model.config.to_dict()
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    with torch.inference_mode():
        for name, stored in sorted(model.state_dict().items()):
            weight = _loaded(model, name) if stored.device.type == "meta" else stored
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            flat = weight.detach().flatten()
            digest.update(flat[_spread(flat.numel()).to(flat.device)].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


def _spread(size: int) -> Tensor:
    """Up to 64 indices from 0 to ``size`` - 1. Integers, since floats can't hold the last index of a large tensor."""
    count = min(_VALUES, size)
    return torch.arange(count) * (size - 1) // max(count - 1, 1)


def _loaded(model: PreTrainedModel, name: str) -> Tensor:
    """The weight ``name``, which accelerate keeps in memory or on disk until its layer computes."""
    path, _, own = name.rpartition(".")
    hook: Any = getattr(model.get_submodule(path), "_hf_hook", None)
    for each in (hook, *getattr(hook, "hooks", ())):
        if getattr(each, "weights_map", None) is not None:
            weight: Tensor = each.weights_map[own]
            return weight
    raise KnormError(f"the weight {name} is not loaded, so the model has no fingerprint; load it first")

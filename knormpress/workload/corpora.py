"""Load a text, and cut it into documents."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from knormpress.errors import KnormError
from knormpress.workload.hub import hub_reachable

if TYPE_CHECKING:
    import datasets

__all__ = ["Corpus", "describe_source", "documents", "load_corpus"]

_REPOSITORY = "Salesforce/wikitext"
_CONFIGURATION = "wikitext-2-raw-v1"
_SPLIT = "test"
_WIKITEXT = "WikiText-2 (raw, test)"
_PROSE = "Python documentation (pydoc_data.topics)"
_UNREACHABLE = f"{_WIKITEXT} is not in the local cache and the hub can't be reached"


@dataclass(frozen=True)
class Corpus:
    """A text, and where it came from.

    Attributes:
        name: the text's name.
        source: where it was read from.
        text: the whole text.
        sha256: SHA-256 of the text's UTF-8 bytes, in hexadecimal.
        notice: one line that tells the user which text is used, and why.
    """

    name: str
    source: str
    text: str
    sha256: str
    notice: str


def load_corpus(spec: str | None = None) -> Corpus:
    """Load the text that ``spec`` names.

    Args:
        spec: ``"wikitext"`` for WikiText-2 (raw, test split; Merity et al., arXiv 1609.07843), from the local datasets
            cache or else from the hub; ``"prose"`` for the documentation that comes with Python, which needs no
            network but differs between Python versions; or the path of a UTF-8 text file. None means WikiText-2 if it
            is available, else the prose.

    Raises:
        KnormError: the text is not available, or the file is missing, empty or not text.
    """
    if spec == "prose":
        return _prose("as requested")
    if spec not in (None, "wikitext"):
        return _file(spec)
    wikitext = _wikitext()
    if isinstance(wikitext, Corpus):
        return wikitext
    if spec is None:
        return _prose(f"since {wikitext}")
    raise KnormError(f'{wikitext}; use "prose", or the path of a UTF-8 text file')


def describe_source() -> str:
    """One line that says which text ``load_corpus(None)`` would use. Downloads nothing."""
    if _cached_wikitext() is not None:
        return f"{_WIKITEXT}, from the local datasets cache"
    if _online():
        return f"{_WIKITEXT}, which will be downloaded from the hub ({_REPOSITORY})"
    return f"{_PROSE}, built in, since {_UNREACHABLE}"


def documents(token_ids: Tensor, *, length: int, count: int) -> list[Tensor]:
    """Cut ``count`` documents of ``length`` tokens from a text; they are spread evenly and don't overlap.

    The same arguments give the same documents.

    Args:
        token_ids: the text, shape (tokens,).

    Returns:
        ``count`` tensors of shape (length,).

    Raises:
        KnormError: the text is too short, or a number is below 1.
    """
    if length < 1 or count < 1:
        raise KnormError(f"got {count} documents of {length} tokens; wanted at least 1 of each")
    tokens = token_ids.shape[0]
    if tokens < length * count:
        raise KnormError(
            f"the text has {tokens:,} tokens, but {count} documents of {length:,} need {length * count:,}; "
            "use a longer text, or fewer or shorter documents"
        )
    # Document i begins at the i-th of `count` equal parts of the text, each of which is at least `length` long.
    return [token_ids[start : start + length] for start in (i * tokens // count for i in range(count))]


def _corpus(name: str, source: str, text: str, why: str) -> Corpus:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Corpus(name, source, text, digest, notice=f"text: {name}, {why}")


def _prose(why: str) -> Corpus:
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[topic] for topic in sorted(topics))
    return _corpus(_PROSE, f"Python {platform.python_version()}", text, why)


def _file(spec: str) -> Corpus:
    path = Path(spec).expanduser()
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise KnormError(f'no text file {spec}; wanted "wikitext", "prose", or the path of a UTF-8 text file') from None
    except UnicodeDecodeError as error:
        raise KnormError(f"{spec} is not UTF-8 text (byte {error.start}); wanted a text file in UTF-8") from None
    except OSError as error:
        raise KnormError(f"{spec} can't be read ({error.strerror}); wanted a UTF-8 text file") from None
    if "\0" in text:
        raise KnormError(f"{spec} is binary, not text; wanted a text file in UTF-8")
    if not text.strip():
        raise KnormError(f"{spec} is empty; wanted a text file in UTF-8")
    return _corpus(path.name, str(path.resolve()), text, f"from {spec}")


def _wikitext() -> Corpus | str:
    """The text, or the reason why it is not available."""
    # It brings pandas and pyarrow, which a text of one's own needs not.
    import datasets

    cached = _cached_wikitext()
    if cached is not None:
        return _joined(lambda: datasets.Dataset.from_file(str(cached)), "from the local datasets cache")
    if _online():
        return _joined(_download, "from the hub")
    return _UNREACHABLE


def _joined(load: Callable[[], datasets.Dataset], why: str) -> Corpus | str:
    try:
        with _quiet():
            lines = load()["text"]
    except Exception as error:
        # datasets, fsspec, pyarrow and the HTTP client each raise their own errors.
        return f"{_WIKITEXT} can't be loaded {why} ({type(error).__name__}: {' '.join(str(error).split())})"
    # Joined by blank lines, as for published perplexities on this dataset.
    return _corpus(_WIKITEXT, f"{_REPOSITORY}, {_CONFIGURATION}", "\n\n".join(lines), why)


def _download() -> datasets.Dataset:
    import datasets

    return datasets.load_dataset(_REPOSITORY, _CONFIGURATION, split=_SPLIT)


def _cached_wikitext() -> Path | None:
    """The newest file of this split in the local datasets cache.

    Read directly, because ``load_dataset`` first waits for an answer of the hub.
    """
    import datasets

    owner, name = _REPOSITORY.split("/")
    folder = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / f"{owner}___{name}" / _CONFIGURATION
    files = [path for path in folder.glob(f"*/*/{name}-{_SPLIT}.arrow") if path.parent.suffix != ".incomplete"]
    return max(files, key=lambda path: path.stat().st_mtime, default=None)


def _online() -> bool:
    import datasets

    return not datasets.config.HF_HUB_OFFLINE and hub_reachable()


@contextmanager
def _quiet() -> Iterator[None]:
    """Turn off progress bars and log lines of datasets inside the context."""
    import datasets

    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()

"""The settings of a measurement, declared once for the commands and for the pytest plugin. No torch.

Each setting is a field of ``Source``, ``Effort`` or ``Candidates``, with its default, its help text and the function
that parses it. ``cli.options`` and ``pytest_plugin.options`` make their options from these fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from knormpress.errors import KnormError
from knormpress.methods.knorm import KnormPress
from knormpress.workload.device_map import DeviceMap

if TYPE_CHECKING:
    from knormpress.records.plan import Plan

__all__ = ["Candidates", "Effort", "Option", "Source", "numbers", "options_of", "read_option", "words"]

_Number = TypeVar("_Number", int, float)


class Option(NamedTuple):
    """One setting.

    Args:
        name: the name of its field; with dashes, of its option.
        default: the value if none is given.
        help: one sentence.
        kind: the type of its text: ``str``, ``int``, ``float`` or ``Path``.
        read: parses the text to the value; None if ``kind`` does.
        spellings: names of the option, if not only ``name``, in the order in which they are shown.
    """

    name: str
    default: Any
    help: str
    kind: type
    read: Callable[[str], Any] | None = None
    spellings: tuple[str, ...] = ()

    @property
    def default_text(self) -> Any:
        """The default as the user would type it."""
        if self.read is None or self.default is None or isinstance(self.default, str):
            return self.default
        return ",".join(map(str, self.default)) or "none"


def _setting(
    default: Any, kind: type, text: str, *, read: Callable[[str], Any] | None = None, spellings: tuple[str, ...] = ()
) -> Any:
    return field(default=default, metadata={"option": ("", default, text, kind, read, spellings)})


def options_of(settings: type) -> Iterator[Option]:
    """The options of ``settings``, which is ``Source``, ``Effort`` or ``Candidates``."""
    for setting in fields(settings):
        if "option" in setting.metadata:
            yield Option(*setting.metadata["option"])._replace(name=setting.name)


def read_option(option: Option, given: Any, spelled: str) -> Any:
    """Parse the text ``given`` to the value of ``option``.

    Raises:
        KnormError: the text is invalid; the message names the option as the user ``spelled`` it.
    """
    if given is None:
        return None
    try:
        value = option.read(given) if option.read else option.kind(given)
        if isinstance(value, float) and math.isnan(
            value
        ):  # no comparison with it would ever end a measurement or fail a gate
            raise ValueError
        return value
    except KnormError as error:
        raise KnormError(f"{spelled} is {given!r}; {error}" if option.kind is str else str(error)) from None
    except ValueError:
        wanted = "a whole number" if option.kind is int else "a number"
        raise KnormError(f"{spelled} is {given!r}; wanted {wanted}") from None


def words(text: str) -> tuple[str, ...]:
    """Split a text at its commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def numbers(text: str, kind: Callable[[str], _Number]) -> tuple[_Number, ...]:
    """Parse numbers that are separated by commas.

    Raises:
        KnormError: the text has no numbers, or something else.
    """
    wanted = "whole numbers" if kind is int else "numbers"
    try:
        values = tuple(kind(word) for word in words(text))
    except ValueError:
        values = ()
    if not values:
        raise KnormError(f"wanted {wanted} separated by commas")
    return values


def _integers(text: str) -> tuple[int, ...]:
    return numbers(text, int)


def _ratios(text: str) -> tuple[float, ...]:
    return numbers(text, float)


def _layers(text: str) -> tuple[int, ...]:
    return () if text.strip().lower() in ("", "none") else numbers(text, int)


def _tasks(text: str) -> tuple[str, ...]:
    return () if text.strip().lower() == "none" else words(text)


def _plan(path: str) -> Plan | Literal["auto"] | None:
    from knormpress.records.plan import read_plan

    if str(path) in ("auto", "none"):
        return "auto" if str(path) == "auto" else None
    return read_plan(path)


@dataclass(frozen=True)
class Source:
    """What a measurement runs on.

    Args:
        model, dtype: see ``workload.models.load_model``.
        device: see ``workload.devices.resolve``; several devices are measured one after the other.
        device_map: in place of a device, for a model that is larger than one.
        corpus: see ``workload.corpora.load_corpus``.

    Raises:
        KnormError: no device is named, or one beside a map.
    """

    model: str | None = _setting(None, str, "Hub id or local folder; SmolLM2-135M-Instruct unless given.")
    device: tuple[str, ...] = _setting(
        ("auto",), str, "auto, cpu, cuda, cuda:1, mps or xpu; several separated by commas.", read=words
    )
    device_map: DeviceMap | None = _setting(  # noqa: RUF009
        None,
        str,
        "In place of a device, spread the model over all: auto, balanced, balanced_low_0 or sequential, and the most "
        "memory of each if not all that is free, such as auto,cuda:0=10GB,cpu=2GB; the rest waits on disk.",
        read=DeviceMap.read,
    )
    dtype: str = _setting("float32", str, "float32, float64, bfloat16 or float16.")
    corpus: str | None = _setting(
        None, str, "wikitext, prose, or a text file; WikiText-2 unless given, or prose if that is not available."
    )

    def __post_init__(self) -> None:
        if not self.device:
            raise KnormError("device is empty; wanted at least one, such as cpu")
        if self.device_map is not None and self.device != ("auto",):
            raise KnormError(
                f"device is {','.join(self.device)} and there is a device_map; wanted one of them: a map chooses its "
                "devices, or names them, as in auto,cpu=2GB"
            )

    @property
    def one_device(self) -> str:
        """The device, for a command that uses only one.

        Raises:
            KnormError: several were given.
        """
        if len(self.device) > 1:
            raise KnormError(f"device is {','.join(self.device)}; wanted one device: name only one")
        return self.device[0]


_QUICK = {"rounds": 2, "new_tokens": 8, "samples": 1, "scored_tokens": 128, "texts": 1}


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Args:
        prompt_tokens: prompt lengths (>= 1), both of timed generations and of the context before scored tokens.
        new_tokens: tokens (>= 2) of a timed generation.
        prefill_chunk: the most tokens (>= 1) of a prompt in one forward pass; None sends it in one pass.
        samples: documents (>= 1) on which perplexity is measured.
        tasks: retrieval tasks, see ``workload.tasks.haystack``. None for the default ones, which are left out where
            model or text can't have them; named ones are an error then.
        texts: texts (>= 1) for each of these tasks.
        rounds: the least number (>= 1) of timed pairs per cell.
        precision: timing stops once the intervals' half width in % (>= 0) is at most this.
        seconds: after ``rounds``, no A B B A of runs is started after this time (>= 0).
        scored_tokens: tokens (>= 1) scored after each document's context; fewer, but at least 32, if the model has
            too few positions after a long prompt.
        cost: also count what a prefill and a decoded token cost.

    Raises:
        KnormError: a value is out of its range.
    """

    prompt_tokens: tuple[int, ...] = _setting((1024,), str, "Prompt lengths, separated by commas.", read=_integers)
    new_tokens: int = _setting(16, int, "Tokens to generate in each timed run, at least 2.")
    prefill_chunk: int | None = _setting(None, int, "Send prompts in chunks of this many tokens; whole unless given.")
    samples: int = _setting(
        8, int, "Documents on which perplexity is measured.", spellings=("num-wikitext-samples", "samples")
    )
    tasks: tuple[str, ...] | None = _setting(
        None,
        str,
        'Retrieval tasks, separated by commas, "all" or "none"; multikey-prose,list,json,passkey unless given.',
        read=_tasks,
    )
    texts: int = _setting(3, int, "Texts for each retrieval task; a text has up to four questions.")
    rounds: int = _setting(6, int, "Least number of timed pairs of runs for each cell.")
    precision: float = _setting(3.0, float, "Stop timing once the intervals' half width in % is at most this.")
    seconds: float = _setting(15.0, float, "After --rounds, start no pair of a cell later than this many seconds.")
    scored_tokens: int = 256
    cost: bool = False

    def __post_init__(self) -> None:
        if not self.prompt_tokens:
            raise KnormError("prompt_tokens is empty; wanted at least one, such as 1024")
        object.__setattr__(self, "prompt_tokens", tuple(dict.fromkeys(self.prompt_tokens)))
        for name, value, least in (
            ("prompt_tokens", min(self.prompt_tokens), 1),
            ("samples", self.samples, 1),
            ("texts", self.texts, 1),
            ("scored_tokens", self.scored_tokens, 1),
            ("rounds", self.rounds, 1),
            ("new_tokens", self.new_tokens, 2),
            ("prefill_chunk", self.prefill_chunk, 1),
        ):
            if value is not None and value < least:
                raise KnormError(f"{name} is {value}; wanted at least {least}")
        for name, number in (("precision", self.precision), ("seconds", self.seconds)):
            if math.isnan(number) or number < 0:
                raise KnormError(f"{name} is {number}; wanted a number of at least 0")

    def quick(self) -> Effort:
        """At most two pairs of runs of 8 new tokens for each cell, 128 scored tokens, and one text for each task."""
        few = {name: min(getattr(self, name), most) for name, most in _QUICK.items()}
        return replace(self, seconds=0.0, **few)


@dataclass(frozen=True)
class Candidates:
    """What is compared with the full cache: a method under several policies, and a plan.

    Args:
        keep_ratios, prune_after, skip_layers: see ``KnormPress``; each keep ratio gives one policy.
        method: the method that takes the policies, see ``methods.registry.make_method``.
        plan: a plan with one more policy; "auto" for the one that comes with KnormPress for the model, if there is one
            and the method is knorm.

    Raises:
        KnormError: a value is out of its range.
    """

    keep_ratios: tuple[float, ...] = _setting(
        (1.0, 0.9, 0.8, 0.7), str, "Shares of the seen tokens to keep, separated by commas.", read=_ratios
    )
    prune_after: int = _setting(512, int, "Tokens a layer must have seen before it is pruned.")
    skip_layers: tuple[int, ...] = _setting(
        (0,), str, 'Layers never pruned, separated by commas, or "none"; -1 is the last.', read=_layers
    )
    method: str = _setting(
        "knorm",
        str,
        "knorm, full, keydiff, keydiff-128, leverage, recent-window, random, highest-norm, or module:object.",
    )
    plan: Plan | Literal["auto"] | None = _setting(  # noqa: RUF009
        "auto",
        Path,
        "Also measure this plan of knormpress tune; auto for the one that comes with KnormPress, or none.",
        read=_plan,
    )

    def __post_init__(self) -> None:
        if not self.presses:
            raise KnormError("keep_ratios is empty; wanted at least one, such as 0.9")

    @property
    def presses(self) -> tuple[KnormPress, ...]:
        """The policies without duplicates: those of the keep ratios, then the plan's."""
        presses = [KnormPress(ratio, self.prune_after, self.skip_layers) for ratio in self.keep_ratios]
        if self.plan is not None and self.plan != "auto":
            presses.append(KnormPress.of(self.plan.press))
        return tuple(dict.fromkeys(presses))

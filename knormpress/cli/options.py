"""The options that several commands share, made from the settings of ``measure.options``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from knormpress.errors import KnormError
from knormpress.measure.options import Option, options_of, read_option

__all__ = ["Cost", "Fresh", "Json", "Output", "Quick", "Ray", "number", "taking"]

Output = Annotated[Path, typer.Option(help="Folder of the results.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure everything again; the earlier results are renamed.")]
Cost = Annotated[
    bool,
    typer.Option("--cost", help="Also count operators, bytes, FLOPs and host reads; takes longer."),
]
Quick = Annotated[
    bool, typer.Option("--quick", help="Few repetitions: shows that everything runs, but decides little.")
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the results as JSON, one object on each line (JSON Lines), and nothing else."),
]
Ray = Annotated[
    str | None,
    typer.Option(help="Measure on a Ray cluster: local, auto, or HOST:PORT of its head. See docs/cluster.md."),
]


def taking(**groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of whole groups of settings, and pass each group as one object.

    Args:
        groups: the class of each parameter, such as ``effort=Effort``.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [parameter for name, parameter in signature.parameters.items() if name not in groups]
        shared = [_parameter(option) for kind in groups.values() for option in options_of(kind)]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            objects = {name: _make(kind, given) for name, kind in groups.items()}
            command(**objects, **given)

        parameters = [*shared, *own]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def number(option: str, text: str) -> float:
    """Parse the number that was given for ``--option``.

    Raises:
        KnormError: ``text`` is not a number.
    """
    try:
        return float(text)
    except ValueError:
        raise KnormError(f"--{option} is {text!r}; wanted one number") from None


def _parameter(option: Option) -> inspect.Parameter:
    kind: Any = option.kind if option.default is not None else option.kind | None
    spellings = [f"--{spelling}" for spelling in option.spellings or (option.name.replace("_", "-"),)]
    annotation = Annotated[kind, typer.Option(*spellings, help=option.help)]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(option.name, keyword, default=option.default_text, annotation=annotation)


def _make(kind: type, given: dict[str, Any]) -> Any:
    values = {option.name: read_option(option, given.pop(option.name), _spelled(option)) for option in options_of(kind)}
    return kind(**values)


def _spelled(option: Option) -> str:
    return f"--{option.name}"

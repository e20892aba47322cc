"""The ``--knorm-*`` options: their names, their defaults, and what is read from them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from knormpress.errors import KnormError
from knormpress.press import KnormPress

__all__ = ["FLAGS", "OPTIONS", "devices", "flag", "number", "press_id", "presses", "setting", "told"]

DEVICES = "cpu,cuda,mps,xpu"

OPTIONS = {
    "model": ("", "hub id or folder of the model under test; the default model unless given"),
    "device": ("", f"comma-separated devices that must be there, or auto; unless given, those of {DEVICES} that are"),
    "keep-ratios": ("1.0,0.9,0.8,0.7", "comma-separated keep ratios of tests that take knorm_press"),
    "prune-after": ("512", "tokens a layer sees before it is pruned for the first time"),
    "skip-layers": ("0", "comma-separated layers that are never pruned; none for no layer"),
    "corpus": ("", "wikitext, prose, or a text file; wikitext where it can be had, else prose, unless given"),
    "samples": ("16", "documents that quality is measured on"),
    "ppl-tolerance": ("5", "change of perplexity in % that a quality gate lets pass, either way"),
    "passkey-share": ("0.9", "share of the passkeys that a passkey gate wants to be found"),
    "plan": ("", "plan of knormpress tune that takes the place of the keep ratios"),
    "method": ("knorm", "the method under test: a name, or module:object"),
    "precision": ("3", "half width in % of the timings' intervals at which rounds end"),
    "seconds": ("20", "time after which a test's rounds end, however wide the intervals are"),
    "thresholds": ("", "losses in % that --knorm-compare allows, such as tpot=5,bytes=0.5"),
}

FLAGS = {
    "quick": "two pairs of runs a test and no more: shows that everything runs, and decides little",
    "save": "store what the tests measured in pytest-benchmark's storage",
    "compare": "--knorm-save, and fail a test that is worse than in the nearest ancestor commit that has data",
}


def setting(config: pytest.Config, name: str) -> str:
    """What was given for ``--knorm-name``, on the command line or as a setting."""
    given = config.getoption(f"--knorm-{name}")
    return str(config.getini(f"knorm_{name.replace('-', '_')}") if given is None else given)


def flag(config: pytest.Config, name: str) -> bool:
    """Whether ``--knorm-name`` was given, on the command line or as a setting."""
    return bool(config.getoption(f"--knorm-{name}") or config.getini(f"knorm_{name}"))


def devices(config: pytest.Config) -> list[Any]:
    """The devices to test on; those that nobody asked for by name and that are missing are marked to be skipped."""
    from knormpress.devices import resolve, usable

    asked = setting(config, "device")
    if asked:
        # Where a device is asked for and missing, nothing is skipped: a run in which all is skipped looks like success.
        return [str(told(functools.partial(resolve, device.strip()))) for device in asked.split(",")]
    found = []
    for device in DEVICES.split(","):
        reason = usable(device)
        marks = [] if reason is None else [pytest.mark.skip(reason=f"{device}: {reason}")]
        found.append(pytest.param(device, marks=marks))
    return found


def press_id(press: KnormPress) -> str:
    """How tests under ``press`` are told apart."""
    return str(press.keep_ratio) if press.layer_keep_ratios is None else "plan"


def presses(config: pytest.Config) -> list[KnormPress]:
    """The policies that the options name: those of the keep ratios, or that of the plan."""
    plan = setting(config, "plan")
    if plan:
        from knormpress.plan import read_plan

        return [read_plan(plan).press]
    skipped = setting(config, "skip-layers")
    layers = [] if skipped in ("", "none") else [_parsed("skip-layers", part, int) for part in skipped.split(",")]
    prune_after = _parsed("prune-after", setting(config, "prune-after"), int)
    return [
        KnormPress(_parsed("keep-ratios", part, float), prune_after=prune_after, skip_layers=tuple(layers))
        for part in setting(config, "keep-ratios").split(",")
    ]


def number(config: pytest.Config, name: str, kind: Callable[[str], Any]) -> Any:
    """The number given for ``--knorm-name``."""
    return told(lambda: _parsed(name, setting(config, name), kind))


def _parsed(name: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise KnormError(f"--knorm-{name} is {text!r}; wanted a number") from None


def told(ask: Callable[[], Any]) -> Any:
    """What ``ask`` finds; what is wrong with an option is told in one line, without a traceback."""
    try:
        return ask()
    except KnormError as error:
        raise pytest.UsageError(str(error)) from None

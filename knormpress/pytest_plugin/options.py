"""The ``--knorm-*`` options: their names, their defaults, and their values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest

from knormpress.errors import KnormError
from knormpress.measure.options import Candidates, Effort, Option, Source, options_of, read_option, words
from knormpress.methods.knorm import KnormPress

__all__ = [
    "FLAGS",
    "OPTIONS",
    "devices",
    "expect_values",
    "flag",
    "number",
    "press_id",
    "presses",
    "setting",
    "source",
    "spelled",
    "threshold_text",
    "usage",
    "warn_of_other_settings",
]

T = TypeVar("T")

DEVICES = "cpu,cuda,mps,xpu"

_SHARED = {option.name: option for group in (Source, Effort, Candidates) for option in options_of(group)}


def _shared(name: str, default: Any = None, text: str | None = None) -> Option:
    """A setting of ``measure.options``, with another default or help text where tests need one."""
    option = _SHARED[name]
    return option._replace(default=option.default if default is None else default, help=text or option.help)


OPTIONS = {
    option.name: option
    for option in (
        _shared("model"),
        _shared("device", (), f"devices that must be usable, or auto; unless given, all usable devices of {DEVICES}"),
        _shared(
            "device_map", text="In place of --knorm-device, spread the model: as --device-map of knormpress sweep."
        ),
        _shared("keep_ratios"),
        _shared("prune_after"),
        _shared("skip_layers"),
        _shared("corpus"),
        _shared("samples", 16),
        Option("ppl_tolerance", 5.0, "Change of perplexity in %, up or down, that passes a quality gate.", float),
        Option("retrieval_share", 0.9, "Share of the full cache's items that a retrieval gate requires.", float),
        _shared("tasks"),
        Option("passkey_share", 0.9, "Share of the passkeys that a passkey gate requires.", float),
        _shared("plan", "", "Plan of knormpress tune in place of the keep ratios; auto for the one of the package."),
        _shared("method"),
        _shared("precision"),
        _shared("seconds", 20.0),
        Option("pin", "", "Commit that --knorm-compare also compares with, now and later; none ends that.", str),
        Option("thresholds", "", "Losses in % that --knorm-compare allows, such as tpot=5,bytes=0.5.", str),
    )
}

FLAGS = {
    "quick": "only two pairs of runs per test: shows that everything runs, but decides little",
    "save": "store what the tests measured in pytest-benchmark's storage",
    "compare": "--knorm-save, and fail tests that are worse than in the nearest ancestor commit with data",
}


def spelled(name: str) -> str:
    """The option as the user types it."""
    return f"--knorm-{name.replace('_', '-')}"


def setting(config: pytest.Config, name: str) -> str:
    """The text that was given for an option, on the command line or as an ini setting; empty if none was given."""
    given = config.getoption(spelled(name))
    return str(config.getini(f"knorm_{name}") if given is None else given)


def threshold_text(config: pytest.Config) -> str:
    """The thresholds of the ini setting, and behind them those of the command line, which win."""
    return ",".join([str(config.getini("knorm_thresholds")), config.getoption(spelled("thresholds")) or ""])


def flag(config: pytest.Config, name: str) -> bool:
    """Whether the option was given, on the command line or as an ini setting."""
    return bool(config.getoption(spelled(name)) or config.getini(f"knorm_{name}"))


def number(config: pytest.Config, name: str) -> Any:
    """The number that was given for an option."""
    return usage(lambda: _value(config, name))


def source(config: pytest.Config) -> Source:
    """What the options name to measure on; the device is "auto" where none is named.

    Raises:
        KnormError: an option has an invalid value, or there are both a device and a map.
    """
    spread = _value(config, "device_map") if setting(config, "device_map") else None
    named = words(setting(config, "device"))
    return Source(
        model=setting(config, "model") or None,
        device=named or ("auto",),
        device_map=spread,
        corpus=setting(config, "corpus") or None,
    )


def devices(config: pytest.Config) -> list[Any]:
    """The devices to test on. Unless they were named by the user, those that are not usable are marked to skip."""
    from knormpress.workload.devices import resolve, usable

    chosen = usage(lambda: source(config))
    if chosen.device_map is not None:
        return [str(usage(functools.partial(resolve, chosen.device_map.first)))]
    named = words(setting(config, "device"))
    if named:
        # A named device that is missing is an error: a run that skips every test would look like success.
        return [str(usage(functools.partial(resolve, device))) for device in named]
    states = {device: usable(device) for device in words(DEVICES)}
    return [
        pytest.param(device, marks=[] if reason is None else [pytest.mark.skip(reason=f"{device}: {reason}")])
        for device, reason in states.items()
    ]


def press_id(press: KnormPress | Literal["auto"]) -> str:
    """The part of a test's id that stands for ``press``."""
    return "plan" if press == "auto" or press.layer_keep_ratios is not None else str(press.keep_ratio)


def presses(config: pytest.Config) -> list[KnormPress | Literal["auto"]]:
    """The policies that the options name: those of the keep ratios, or the plan's; "auto" for the model's own plan.

    Raises:
        KnormError: an option has an invalid value.
    """
    plan = _value(config, "plan") if setting(config, "plan") else None
    if plan is not None:
        return ["auto" if plan == "auto" else KnormPress.of(plan.press)]
    names = ("keep_ratios", "prune_after", "skip_layers")
    return list(Candidates(**{name: _value(config, name) for name in names}).presses)


def expect_values(config: pytest.Config) -> None:
    """Check the values of the options, so that an error in one is told before tests are collected.

    Raises:
        KnormError: an option has an invalid value.
    """
    source(config)
    presses(config)
    numbers = {name: _value(config, name) for name, option in OPTIONS.items() if option.kind in (int, float)}
    Effort(**{name: numbers[name] for name in ("samples", "precision", "seconds")})


def _value(config: pytest.Config, name: str) -> Any:
    return read_option(OPTIONS[name], setting(config, name), spelled(name))


def usage(ask: Callable[[], T]) -> T:
    """Return ``ask()``; show its errors as pytest's usage errors: one line, without a traceback."""
    try:
        return ask()
    except KnormError as error:
        raise pytest.UsageError(str(error)) from None


def warn_of_other_settings(config: pytest.Config) -> None:
    """Say so where pytest has not read the settings of the current folder.

    pytest looks for them before it knows this plugin's options, so that the value in ``--knorm-model PATH`` counts as a
    test folder; written ``--knorm-model=PATH`` it does not.
    """
    here = config.invocation_params.dir
    own = next((here / name for name, part in _SETTINGS if _holds(here / name, part)), None)
    if own is not None and config.inipath != own and config.getoption("inifilename", None) is None:
        config.issue_config_time_warning(
            pytest.PytestConfigWarning(
                f"knormpress: pytest has read {config.inipath or 'no settings'} and not {own}; write options with =, "
                "as in --knorm-model=PATH, or give --rootdir"
            ),
            stacklevel=2,
        )


# Where pytest looks, and what a file must hold to count.
_SETTINGS = (
    ("pytest.toml", ""),
    (".pytest.toml", ""),
    ("pytest.ini", ""),
    (".pytest.ini", ""),
    ("pyproject.toml", "[tool.pytest"),
    ("tox.ini", "[pytest]"),
    ("setup.cfg", "[tool:pytest]"),
)


def _holds(path: Path, part: str) -> bool:
    try:
        return part in path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False

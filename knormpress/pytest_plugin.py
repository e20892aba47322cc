"""The pytest front door: options, and fixtures that give a test a model, a device, a method, and measurements of them.

Installed with the package (entry point ``pytest11``), so it works in any repository. It imports neither torch nor
transformers before a test asks for a fixture that needs them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from knormpress.errors import KnormError
from knormpress.press import KnormPress

if TYPE_CHECKING:
    from knormpress.bench import Bench
    from knormpress.changes import Change
    from knormpress.metrics import Method
    from knormpress.records import Latency

__all__ = [
    "knorm_bench",
    "knorm_latency",
    "knorm_method",
    "knorm_ppl_change",
    "knorm_ppl_tolerance",
]

_DEVICES = "cpu,cuda,mps,xpu"

_OPTIONS = {
    "model": ("", "hub id or folder of the model under test; the default model unless given"),
    "device": ("", f"comma-separated devices that must be there; unless given, those of {_DEVICES} that are"),
    "keep-ratios": ("1.0,0.9,0.8,0.7", "comma-separated keep ratios of tests that take knorm_press"),
    "prune-after": ("512", "tokens a layer sees before it is pruned for the first time"),
    "skip-layers": ("0", "comma-separated layers that are never pruned; none for no layer"),
    "corpus": ("", "wikitext, prose, or a text file; wikitext where it can be had, else prose, unless given"),
    "samples": ("16", "documents that quality is measured on"),
    "ppl-tolerance": ("5", "change of perplexity in % that a quality gate lets pass, either way"),
    "method": ("knorm", "the method under test: a name, or module:object"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the ``--knorm-*`` options; each is also an ini setting of the same name with underscores."""
    group = parser.getgroup("knormpress", "KV-cache methods: speed, memory and quality")
    for name, (default, text) in _OPTIONS.items():
        group.addoption(f"--knorm-{name}", metavar="VALUE", help=f"{text} [{default or 'unset'}]")
        parser.addini(f"knorm_{name.replace('-', '_')}", help=text, default=default)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that take a device or a press once for each device and keep ratio asked for."""
    if "knorm_device" in metafunc.fixturenames:
        metafunc.parametrize("knorm_device", _devices(metafunc.config), scope="session")
    if "knorm_press" in metafunc.fixturenames:
        presses = _told(lambda: _presses(metafunc.config))
        metafunc.parametrize("knorm_press", presses, ids=[str(press.keep_ratio) for press in presses])


@pytest.fixture(scope="session")
def knorm_bench(knorm_device: str, request: pytest.FixtureRequest) -> Bench:
    """The model on the device, with the text in tokens; loaded once a session."""
    return _bench(knorm_device, _setting(request.config, "model"), _setting(request.config, "corpus"))


@pytest.fixture
def knorm_method(knorm_press: KnormPress, request: pytest.FixtureRequest) -> Method:
    """The method under test, under the policy ``knorm_press``."""
    from knormpress.methods import make_method

    return make_method(_setting(request.config, "method"), knorm_press)


@pytest.fixture(scope="session")
def knorm_ppl_tolerance(request: pytest.FixtureRequest) -> float:
    """Change of perplexity in % that passes, either way."""
    tolerance: float = _told(lambda: _number("ppl-tolerance", _setting(request.config, "ppl-tolerance"), float))
    return tolerance


@pytest.fixture
def knorm_latency(benchmark: Any, knorm_bench: Bench) -> Callable[..., Latency]:
    """Time a method's generations in turn with the full cache's; pytest-benchmark's table and JSON get both."""

    def measure(
        method: Method,
        *,
        prompt_tokens: int = 1024,
        new_tokens: int = 32,
        rounds: int = 5,
        prefill_chunk: int | None = None,
    ) -> Latency:
        from knormpress.testing import benchmarked_latency

        return benchmarked_latency(
            knorm_bench,
            benchmark,
            method,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            prefill_chunk=prefill_chunk,
        )

    return measure


@pytest.fixture(scope="session")
def knorm_ppl_change(knorm_bench: Bench, request: pytest.FixtureRequest) -> Callable[..., list[Change]]:
    """Score documents through methods' caches: the change of perplexity of each against the full cache, in %."""

    def measure(methods: Sequence[Method], *, context: int = 1024, scored: int = 256) -> list[Change]:
        from knormpress.bench import quality
        from knormpress.changes import ppl_change

        samples = _told(lambda: _number("samples", _setting(request.config, "samples"), int))
        texts = knorm_bench.documents(length=context + scored + 1, count=samples)
        found = quality(knorm_bench, texts, methods, context=context, prefill_chunk=None)
        return [ppl_change(each.documents) for each in found]

    return measure


@functools.cache
def _bench(device: str, model: str, corpus: str) -> Bench:
    from knormpress.bench import Bench
    from knormpress.corpora import load_corpus
    from knormpress.devices import resolve

    return Bench.open(model or None, load_corpus(corpus or None), device=resolve(device), dtype="float32")


def _setting(config: pytest.Config, name: str) -> str:
    given = config.getoption(f"--knorm-{name}")
    return str(config.getini(f"knorm_{name.replace('-', '_')}") if given is None else given)


def _devices(config: pytest.Config) -> list[Any]:
    from knormpress.devices import usable

    asked = _setting(config, "device")
    found = []
    for device in (asked or _DEVICES).split(","):
        reason = usable(device.strip())
        if reason is not None and asked:
            raise pytest.UsageError(f"--knorm-device {device}: {reason}")
        marks = [pytest.mark.skip(reason=f"{device}: {reason}")] if reason is not None else []
        found.append(pytest.param(device.strip(), marks=marks))
    return found


def _presses(config: pytest.Config) -> list[KnormPress]:
    skipped = _setting(config, "skip-layers")
    layers = [] if skipped in ("", "none") else [_number("skip-layers", part, int) for part in skipped.split(",")]
    prune_after = _number("prune-after", _setting(config, "prune-after"), int)
    return [
        KnormPress(_number("keep-ratios", part, float), prune_after=prune_after, skip_layers=tuple(layers))
        for part in _setting(config, "keep-ratios").split(",")
    ]


def _number(name: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise KnormError(f"--knorm-{name} is {text!r}; wanted a number") from None


def _told(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except KnormError as error:
        raise pytest.UsageError(str(error)) from None

"""The pytest front door: options, fixtures that measure, and the comparison of a run with the stored ones.

Installed with the package (entry point ``pytest11``), so it works in any repository. It imports neither torch nor
transformers before a test asks for a fixture that needs them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from knormpress.plugin_options import FLAGS, OPTIONS, devices, flag, number, press_id, presses, setting, told
from knormpress.plugin_run import StoredRun
from knormpress.press import KnormPress

if TYPE_CHECKING:
    from knormpress.bench import Bench
    from knormpress.metrics import Method
    from knormpress.records import Latency, Memory
    from knormpress.testing import Measured, Scored

__all__ = [
    "knorm_bench",
    "knorm_gate",
    "knorm_latency",
    "knorm_memory",
    "knorm_method",
    "knorm_passkey_gate",
    "knorm_passkeys",
    "knorm_ppl_tolerance",
    "knorm_quality",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the ``--knorm-*`` options; each is also an ini setting of the same name with underscores."""
    group = parser.getgroup("knormpress", "KV-cache methods: speed, memory and quality")
    for name, (default, text) in OPTIONS.items():
        # argparse formats the help of options, so that a % must be doubled there; pytest does not that of settings.
        help_text = f"{text} [{default or 'unset'}]".replace("%", "%%")
        group.addoption(f"--knorm-{name}", metavar="VALUE", help=help_text)
        parser.addini(f"knorm_{name.replace('-', '_')}", help=text, default=default)
    for name, text in FLAGS.items():
        group.addoption(f"--knorm-{name}", action="store_true", default=None, help=text)
        parser.addini(f"knorm_{name}", help=text, type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and read what is stored before anything is measured."""
    config.addinivalue_line("markers", "knorm_thresholds(**percent): losses that --knorm-compare allows in this test")
    if flag(config, "save") or flag(config, "compare"):
        config.stash[_RUN] = told(lambda: StoredRun.begin(config))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse, in one line and before anything is collected, what the command line asks for and can't have."""
    if session.config.getoption("--knorm-device") is not None:
        devices(session.config)
    told(lambda: presses(session.config))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that take a device or a press once for each device and keep ratio asked for."""
    if "knorm_device" in metafunc.fixturenames:
        metafunc.parametrize("knorm_device", devices(metafunc.config), scope="session")
    if "knorm_press" in metafunc.fixturenames:
        policies = told(lambda: presses(metafunc.config))
        metafunc.parametrize("knorm_press", policies, ids=list(map(press_id, policies)))


@pytest.fixture(scope="session")
def knorm_bench(knorm_device: str, request: pytest.FixtureRequest) -> Bench:
    """The model on the device, with the text in tokens; loaded once a session."""
    bench = _bench(knorm_device, setting(request.config, "model"), setting(request.config, "corpus"))
    plan = setting(request.config, "plan")
    if plan:
        from knormpress.fingerprints import model_fingerprint
        from knormpress.plan import read_plan

        read_plan(plan).expect(model_fingerprint(bench.model), plan)
    return bench


@pytest.fixture
def knorm_method(knorm_press: KnormPress, request: pytest.FixtureRequest) -> Method:
    """The method under test, under the policy ``knorm_press``."""
    from knormpress.methods import make_method

    return make_method(setting(request.config, "method"), knorm_press)


@pytest.fixture(scope="session")
def knorm_ppl_tolerance(request: pytest.FixtureRequest) -> float:
    """Change of perplexity in % that passes, either way."""
    tolerance: float = number(request.config, "ppl-tolerance", float)
    return tolerance


@pytest.fixture
def _knorm_measured(knorm_bench: Bench, request: pytest.FixtureRequest) -> Measured:
    from knormpress.testing import Measured

    run = request.config.stash.get(_RUN, None)
    measured = request.node.stash[_MEASURED] = Measured(knorm_bench, request.node.nodeid, run.name if run else "")
    return measured


@pytest.fixture
def knorm_latency(benchmark: Any, _knorm_measured: Measured, request: pytest.FixtureRequest) -> Callable[..., Latency]:
    """Time a method's generations in turn with the full cache's; pytest-benchmark's table and JSON show them.

    Called as ``knorm_latency(method, prompt_tokens=1024, new_tokens=32, rounds=5, prefill_chunk=None)``; from
    ``rounds`` pairs on it goes on until ``--knorm-precision`` or ``--knorm-seconds`` is reached; with ``--knorm-quick``
    it ends after two.
    """
    from knormpress.testing import Patience

    quick = flag(request.config, "quick")
    seconds = 0.0 if quick else number(request.config, "seconds", float)
    patience = Patience(number(request.config, "precision", float), seconds)

    def measure(
        method: Method,
        *,
        prompt_tokens: int = 1024,
        new_tokens: int = 32,
        rounds: int = 5,
        prefill_chunk: int | None = None,
    ) -> Latency:
        return _knorm_measured.latency(
            method,
            benchmark,
            patience,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=min(rounds, 2) if quick else rounds,
            prefill_chunk=prefill_chunk,
        )

    request.node.stash[_BENCHMARK] = benchmark
    return measure


@pytest.fixture
def knorm_memory(_knorm_measured: Measured) -> Callable[..., Memory]:
    """Measure the bytes of a method's cache and of the full one, each in a pass of its own.

    Called as ``knorm_memory(method, prompt_tokens=1024, prefill_chunk=None)``.
    """

    def measure(method: Method, *, prompt_tokens: int = 1024, prefill_chunk: int | None = None) -> Memory:
        return _knorm_measured.memory(method, prompt_tokens=prompt_tokens, prefill_chunk=prefill_chunk)

    return measure


@pytest.fixture(scope="session")
def knorm_quality(knorm_bench: Bench, request: pytest.FixtureRequest) -> Callable[..., list[Scored]]:
    """Score documents through the caches of several methods, which share each document's prefill.

    Called as ``knorm_quality([method, ...], context=1024, scored=256)``; what it returns goes to ``knorm_gate``.
    """

    def measure(methods: Sequence[Method], *, context: int = 1024, scored: int = 256) -> list[Scored]:
        from knormpress.testing import score

        samples = number(request.config, "samples", int)
        return score(knorm_bench, methods, context=context, scored=scored, samples=samples)

    return measure


@pytest.fixture
def knorm_gate(
    _knorm_measured: Measured, knorm_quality: Callable[..., list[Scored]], knorm_ppl_tolerance: float
) -> Callable[..., None]:
    """Let the test pass only if a method's change of perplexity stays within ``--knorm-ppl-tolerance``.

    Called as ``knorm_gate(method, context=1024, scored=256)``, or with what ``knorm_quality`` found. The whole 95 %
    interval decides: where it crosses the limit the test is reported as an expected failure that says how many more
    documents it would take, never as passed.
    """

    def decide(method: Method | Scored, **lengths: int) -> None:
        from knormpress.testing import Scored, gated

        found = method if isinstance(method, Scored) else knorm_quality([method], **lengths)[0]
        _knorm_measured.quality(found)
        verdict, measured = gated(found, knorm_ppl_tolerance)
        if verdict == "inconclusive":
            pytest.xfail(f"inconclusive: {measured}")
        if verdict == "fail":
            pytest.fail(measured, pytrace=False)

    return decide


@pytest.fixture(scope="session")
def knorm_passkeys(knorm_bench: Bench) -> Callable[..., list[tuple[int, int]]]:
    """Ask the caches of several methods for numbers hidden in filler text, see ``metrics.passkey``.

    Called as ``knorm_passkeys([method, ...], count=40)``; returns for each how many keys it found, and how many of the
    ``count`` the full cache found: the others are not asked for.
    """

    def ask(methods: Sequence[Method], *, count: int = 40) -> list[tuple[int, int]]:
        from knormpress.held_out import ask_passkeys

        return ask_passkeys(knorm_bench, methods, count)

    return ask


@pytest.fixture
def knorm_passkey_gate(
    knorm_passkeys: Callable[..., list[tuple[int, int]]], request: pytest.FixtureRequest
) -> Callable[..., None]:
    """Let the test pass only if a method finds ``--knorm-passkey-share`` of the keys that the full cache finds.

    Called as ``knorm_passkey_gate(method, count=40)``, or with the pair that ``knorm_passkeys`` gave. The whole 95 %
    interval (Wilson's) decides, as in ``knorm_gate``.
    """
    wanted = number(request.config, "passkey-share", float)

    def decide(method: Method | tuple[int, int], **count: int) -> None:
        from knormpress.changes import passkey_gate

        found = method if isinstance(method, tuple) else knorm_passkeys([method], **count)[0]
        verdict, measured = passkey_gate(*found, wanted)
        if verdict == "inconclusive":
            pytest.xfail(f"inconclusive: {measured}")
        if verdict == "fail":
            pytest.fail(measured, pytrace=False)

    return decide


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Store what the test measured, and fail it if that is worse than its baseline."""
    try:
        result = yield
    except pytest.xfail.Exception:  # an inconclusive gate can still be compared with its history
        _finish(item, passed=True)
        raise
    except BaseException:
        _finish(item, passed=False)
        raise
    _finish(item, passed=True)
    return result


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Note what was left out on purpose: it has not vanished."""
    for item in items:
        run = item.config.stash.get(_RUN, None)
        if run is not None:
            run.deselected.add(item.nodeid)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Note what is there."""
    run = session.config.stash.get(_RUN, None)
    if run is not None:
        run.collected |= {item.nodeid for item in session.items}
        for item in session.items:
            told(functools.partial(run.thresholds_of, item))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell what became of every test's figures."""
    run = terminalreporter.config.stash.get(_RUN, None)
    if run is None or not run.compares:
        return
    from knormpress.commits import is_dirty
    from knormpress.verdict_table import verdict_lines

    verdicts = [*run.verdicts, *run.vanished(terminalreporter.config)]
    if verdicts:
        terminalreporter.section("knormpress: against the stored runs")
        dirty = ["the tree has uncommitted changes: this run will not become a baseline"] if is_dirty() else []
        for line in (*run.history.notes, *dirty, *verdict_lines(verdicts)):
            terminalreporter.write_line(line)


_RUN = pytest.StashKey[StoredRun]()
_MEASURED = pytest.StashKey["Measured"]()
_BENCHMARK = pytest.StashKey[Any]()


def _finish(item: pytest.Item, *, passed: bool) -> None:
    measured = item.stash.get(_MEASURED, None)
    entry = None if measured is None else measured.entry(passed=passed)
    if entry is None:
        return
    run = item.config.stash.get(_RUN, None)
    fault = ""
    if run is not None:
        entry, fault = run.finish(item, entry)
    benchmark = item.stash.get(_BENCHMARK, None)
    if benchmark is not None:
        benchmark.extra_info["knormpress"] = entry.model_dump(mode="json")
    if passed and fault:
        pytest.fail(fault, pytrace=False)


@functools.cache
def _bench(device: str, model: str, corpus: str) -> Bench:
    from knormpress.bench import Bench
    from knormpress.corpora import load_corpus
    from knormpress.devices import resolve

    return Bench.open(model or None, load_corpus(corpus or None), device=resolve(device), dtype="float32")

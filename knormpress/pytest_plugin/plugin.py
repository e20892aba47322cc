"""The pytest plugin: options, fixtures that measure, and the comparison of a run with stored runs.

It is installed with the package (entry point ``pytest11``), so it works in any repository. It imports torch and
transformers only when a test uses a fixture that needs them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from knormpress.methods.knorm import KnormPress
from knormpress.pytest_plugin.gates import expect_decided, settle
from knormpress.pytest_plugin.lm_eval import knorm_lm_eval_gate
from knormpress.pytest_plugin.options import (
    FLAGS,
    OPTIONS,
    devices,
    expect_values,
    flag,
    number,
    press_id,
    presses,
    setting,
    source,
    spelled,
    usage,
    warn_of_other_settings,
)
from knormpress.pytest_plugin.retrieval import (
    ASKED,
    asked_of,
    knorm_passkey_gate,
    knorm_passkeys,
    knorm_retrieval,
    knorm_retrieval_gate,
)
from knormpress.pytest_plugin.session import StoredRun

if TYPE_CHECKING:
    from knormpress.measure.cost import Prefilled
    from knormpress.measure.options import Source
    from knormpress.methods.method import Method
    from knormpress.pytest_plugin.measured import Measured
    from knormpress.records.figures import Cost, Latency, Memory
    from knormpress.records.schema import Result
    from knormpress.workload.bench import Bench

__all__ = [
    "knorm_bench",
    "knorm_cost",
    "knorm_gate",
    "knorm_latency",
    "knorm_lm_eval_gate",
    "knorm_memory",
    "knorm_method",
    "knorm_passkey_gate",
    "knorm_passkeys",
    "knorm_ppl_tolerance",
    "knorm_press",
    "knorm_quality",
    "knorm_retrieval",
    "knorm_retrieval_gate",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the ``--knorm-*`` options; each is also an ini setting of the same name with underscores."""
    group = parser.getgroup("knormpress", "KV-cache methods: speed, memory and quality")
    for name, option in OPTIONS.items():
        default = str(option.default_text) if option.default else ""
        # argparse formats help texts, so a % must be doubled there; pytest does not format those of ini settings.
        help_text = f"{option.help} [{default or 'unset'}]".replace("%", "%%")
        group.addoption(spelled(name), metavar="VALUE", help=help_text)
        parser.addini(f"knorm_{name}", help=option.help, default=default)
    for name, text in FLAGS.items():
        group.addoption(spelled(name), action="store_true", default=None, help=text)
        parser.addini(f"knorm_{name}", help=text, type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and read the stored runs before anything is measured."""
    warn_of_other_settings(config)
    config.addinivalue_line("markers", "knorm_thresholds(**percent): losses that --knorm-compare allows in this test")
    if config.getoption("--knorm-pin") and not flag(config, "compare"):
        raise pytest.UsageError("--knorm-pin is for comparing; give --knorm-compare too")
    if flag(config, "save") or flag(config, "compare"):
        config.stash[_RUN] = usage(lambda: StoredRun.begin(config))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Check the options before tests are collected, so that errors in them are one line."""
    if any(session.config.getoption(spelled(name)) is not None for name in ("device", "device_map")):
        devices(session.config)
    usage(lambda: expect_values(session.config))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that take a device or a press once for each chosen device and keep ratio."""
    if "knorm_device" in metafunc.fixturenames:
        metafunc.parametrize("knorm_device", devices(metafunc.config), scope="session")
    if "knorm_press" in metafunc.fixturenames:
        policies = usage(lambda: presses(metafunc.config))
        metafunc.parametrize("knorm_press", policies, ids=list(map(press_id, policies)), indirect=True)


@pytest.fixture(scope="session")
def knorm_bench(knorm_device: str, request: pytest.FixtureRequest) -> Bench:
    """The model on the device, and the text as tokens; loaded once per session."""
    bench = _bench(source(request.config), knorm_device)
    plan = setting(request.config, "plan")
    if plan not in ("", "auto", "none"):
        from knormpress.cache.fingerprint import model_fingerprint
        from knormpress.records.plan import read_plan

        read_plan(plan).expect(model_fingerprint(bench.model), plan)
    return bench


@pytest.fixture
def knorm_press(request: pytest.FixtureRequest) -> KnormPress:
    """The policy under test: of a keep ratio, or of the plan."""
    if request.param == "auto":
        return KnormPress.for_model(request.getfixturevalue("knorm_bench").model)
    press: KnormPress = request.param
    return press


@pytest.fixture
def knorm_method(knorm_press: KnormPress, request: pytest.FixtureRequest) -> Method:
    """The method under test, under the policy ``knorm_press``."""
    from knormpress.methods.registry import make_method

    method = make_method(setting(request.config, "method"), knorm_press)
    request.config.stash.setdefault(ASKED, []).append((method, knorm_press))
    return method


@pytest.fixture(scope="session")
def knorm_ppl_tolerance(request: pytest.FixtureRequest) -> float:
    """The change of perplexity in %, up or down, that passes."""
    tolerance: float = number(request.config, "ppl_tolerance")
    return tolerance


@pytest.fixture(scope="session")
def _knorm_counted(knorm_bench: Bench) -> dict[tuple[int, int | None], Prefilled]:
    """The full cache's counted prefills on this bench."""
    return {}


@pytest.fixture
def _knorm_measured(
    knorm_bench: Bench, _knorm_counted: dict[tuple[int, int | None], Prefilled], request: pytest.FixtureRequest
) -> Measured:
    from knormpress.pytest_plugin.measured import Measured

    run = request.config.stash.get(_RUN, None)
    name = run.name if run else ""
    measured = request.node.stash[_MEASURED] = Measured(knorm_bench, request.node.nodeid, name, _knorm_counted)
    return measured


@pytest.fixture
def _knorm_benchmark(request: pytest.FixtureRequest) -> Any:
    if hasattr(request.config, "workerinput"):
        pytest.fail("knorm_latency times nothing beside other tests; run it without -n and --dist", pytrace=False)
    if not request.config.pluginmanager.hasplugin("benchmark"):
        pytest.fail("knorm_latency needs pytest-benchmark, which is off; leave -p no:benchmark out", pytrace=False)
    return request.getfixturevalue("benchmark")


@pytest.fixture
def knorm_latency(
    _knorm_benchmark: Any, _knorm_measured: Measured, request: pytest.FixtureRequest
) -> Callable[..., Latency]:
    """Time a method's generations in turn with the full cache's; pytest-benchmark's table and JSON show them.

    Called as ``knorm_latency(method, prompt_tokens=1024, new_tokens=32, rounds=6, prefill_chunk=None)``. After
    ``rounds`` pairs it continues until ``--knorm-precision`` or ``--knorm-seconds`` is reached; with ``--knorm-quick``
    it ends after two pairs.
    """
    quick = flag(request.config, "quick")
    seconds = 0.0 if quick else number(request.config, "seconds")
    precision = number(request.config, "precision")

    def measure(
        method: Method,
        *,
        prompt_tokens: int = 1024,
        new_tokens: int = 32,
        rounds: int = 6,
        prefill_chunk: int | None = None,
    ) -> Latency:
        return _knorm_measured.latency(
            method,
            _knorm_benchmark,
            precision=precision,
            seconds=seconds,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=min(rounds, 2) if quick else rounds,
            prefill_chunk=prefill_chunk,
        )

    request.node.stash[_BENCHMARK] = _knorm_benchmark
    return measure


@pytest.fixture
def knorm_memory(_knorm_measured: Measured, request: pytest.FixtureRequest) -> Callable[..., Memory]:
    """Measure the bytes of a method's cache and of the full cache, in separate passes.

    Called as ``knorm_memory(method, prompt_tokens=1024, new_tokens=0, prefill_chunk=None)``: after the prompt and,
    where ``new_tokens`` are asked for, again after decoding them. A method that should drop tokens fails if it holds as
    much as the full cache.
    """

    def measure(
        method: Method, *, prompt_tokens: int = 1024, new_tokens: int = 0, prefill_chunk: int | None = None
    ) -> Memory:
        return _knorm_measured.memory(
            method,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            prefill_chunk=prefill_chunk,
            policy=asked_of(request.config, method),
        )

    return measure


@pytest.fixture
def knorm_cost(_knorm_measured: Measured) -> Callable[..., Cost]:
    """Count operators, bytes, FLOPs and host reads of a method and of the full cache: the same on every machine.

    Called as ``knorm_cost(method, prompt_tokens=1024, new_tokens=None, prefill_chunk=None)``: for the prefill, and for
    the tokens around a pruning, or as many tokens as are asked for.
    """

    def measure(
        method: Method, *, prompt_tokens: int = 1024, new_tokens: int | None = None, prefill_chunk: int | None = None
    ) -> Cost:
        return _knorm_measured.cost(
            method, prompt_tokens=prompt_tokens, new_tokens=new_tokens, prefill_chunk=prefill_chunk
        )

    return measure


@pytest.fixture(scope="session")
def knorm_quality(knorm_bench: Bench, request: pytest.FixtureRequest) -> Callable[..., list[Result]]:
    """Score documents through the caches of several methods, which share each document's prefill.

    Called as ``knorm_quality([method, ...], context=1024, scored=256, decoded=False)``; returns a result for each
    method, whose ``quality`` has the figures. Each result can be passed to ``knorm_gate``. With ``decoded=True`` also
    ``quality.decoded``, with what pruning while decoding loses: a few passes more for a method of this package, one for
    each scored token for another.
    """

    def measure(
        methods: Sequence[Method], *, context: int = 1024, scored: int = 256, decoded: bool = False
    ) -> list[Result]:
        from knormpress.pytest_plugin.measured import score

        samples = number(request.config, "samples")
        policies = [asked_of(request.config, method) for method in methods]
        return score(knorm_bench, methods, policies, context=context, scored=scored, samples=samples, decoded=decoded)

    return measure


@pytest.fixture
def knorm_gate(
    _knorm_measured: Measured,
    knorm_quality: Callable[..., list[Result]],
    knorm_ppl_tolerance: float,
    request: pytest.FixtureRequest,
) -> Callable[..., None]:
    """Let the test pass only if a method's change of perplexity stays within ``--knorm-ppl-tolerance``.

    Called as ``knorm_gate(method, context=1024, scored=256, decoded=False)``, or with a result of ``knorm_quality``.
    The whole 95 % interval decides. If it crosses the limit, the test is never reported as passed, but as an expected
    failure that says how many more documents are needed. With ``decoded=True`` the change while decoding is measured
    and stored too; it does not decide.
    """

    def decide(method: Method | Result, **how: int) -> None:
        from knormpress.pytest_plugin.measured import gated
        from knormpress.records.schema import Result

        result = method if isinstance(method, Result) else knorm_quality([method], **how)[0]
        assert result.quality is not None
        _knorm_measured.quality(result)
        decision, figures = gated(result.quality, knorm_ppl_tolerance)
        settle(request.node, decision, figures)

    return decide


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Store the test's measurements, and fail the test if they are worse than in its reference run.

    An inconclusive gate can still be compared with its history.
    """
    try:
        result = yield
    except pytest.xfail.Exception:
        _finish(item, passed=True)
        raise
    except BaseException:
        _finish(item, passed=False)
        raise
    _finish(item, passed=True)
    expect_decided(item)
    return result


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Remember deselected tests, which do not count as vanished."""
    for item in items:
        run = item.config.stash.get(_RUN, None)
        if run is not None:
            run.deselected.add(item.nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give a worker of pytest-xdist the name of the run."""
    run = node.config.stash.get(_RUN, None)
    if run is not None:
        run.told_to(node)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Gather the verdicts of a worker."""
    run = node.config.stash.get(_RUN, None)
    if run is not None:
        run.gather(getattr(node, "workeroutput", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a worker: hand over its verdicts."""
    run = session.config.stash.get(_RUN, None)
    if run is not None and hasattr(session.config, "workeroutput"):
        run.report(session.config.workeroutput)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Remember the collected tests, and check their thresholds."""
    run = session.config.stash.get(_RUN, None)
    if run is not None:
        run.collected |= {item.nodeid for item in session.items}
        # xdist takes a worker that ends here for a crash; there the test itself fails by its mark.
        for item in [] if hasattr(session.config, "workerinput") else session.items:
            usage(functools.partial(run.thresholds_of, item))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the verdicts on every test's figures."""
    run = terminalreporter.config.stash.get(_RUN, None)
    if run is None or not run.compares:
        return
    from knormpress.records.git import is_dirty
    from knormpress.show.verdict_table import verdict_lines

    verdicts = [*run.verdicts, *run.vanished(terminalreporter.config)]
    if verdicts:
        terminalreporter.section("knormpress: compared with the stored runs")
        dirty = ["the git tree has uncommitted changes: this run will not become a reference"] if is_dirty() else []
        for line in (*run.history.notes, *dirty, *verdict_lines(verdicts)):
            terminalreporter.write_line(line)


_RUN = pytest.StashKey[StoredRun]()
_MEASURED = pytest.StashKey["Measured"]()
_BENCHMARK = pytest.StashKey[Any]()


def _finish(item: pytest.Item, *, passed: bool) -> None:
    measured = item.stash.get(_MEASURED, None)
    entry = None if measured is None else measured.entry(passed=passed)
    if measured is None or entry is None:
        return
    run = item.config.stash.get(_RUN, None)
    fault = ""
    if run is not None:
        entry, fault = run.finish(item, entry, measured.timed_again)
    benchmark = item.stash.get(_BENCHMARK, None)
    if benchmark is not None:
        benchmark.extra_info["knormpress"] = entry.model_dump(mode="json")
    if passed and fault:
        pytest.fail(fault, pytrace=False)


@functools.cache
def _bench(named: Source, device: str) -> Bench:
    from knormpress.workload.bench import Bench
    from knormpress.workload.corpora import load_corpus
    from knormpress.workload.devices import resolve

    place = named.device_map or resolve(device)
    return Bench.open(named.model, load_corpus(named.corpus), device=place, dtype=named.dtype)

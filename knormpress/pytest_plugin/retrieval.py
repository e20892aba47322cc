"""The fixtures of the pytest plugin that ask for what stands in a text, behind a pruned cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from knormpress.methods.knorm import KnormPress
from knormpress.pytest_plugin.gates import settle
from knormpress.pytest_plugin.options import number

if TYPE_CHECKING:
    from knormpress.methods.method import Method
    from knormpress.policy.policy import Policy
    from knormpress.pytest_plugin.measured import Measured
    from knormpress.records.schema import Result
    from knormpress.workload.bench import Bench

__all__ = ["ASKED", "asked_of", "knorm_passkey_gate", "knorm_passkeys", "knorm_retrieval", "knorm_retrieval_gate"]

ASKED = pytest.StashKey[list[tuple[Any, KnormPress]]]()
"""The methods that the fixture ``knorm_method`` made, with the policy of each."""


def asked_of(config: pytest.Config, method: Method) -> Policy | None:
    """The policy that ``method`` was made for: by the fixture, else what the method itself says."""
    from knormpress.methods.method import policy_of

    asked = (press for made, press in config.stash.get(ASKED, []) if made is method)
    return next(asked, None) or policy_of(method)


@pytest.fixture(scope="session")
def knorm_retrieval(knorm_bench: Bench, request: pytest.FixtureRequest) -> Callable[..., list[Result]]:
    """Ask the caches of several methods what stands in texts, see ``measure.retrieval``.

    Called as ``knorm_retrieval([method, ...], tasks=None, texts=8)``; ``tasks`` are names, those of ``--knorm-tasks``
    unless given, and ``texts`` their number for each task. Returns a result for each method, whose ``retrieval`` has
    every item.
    """

    def ask(methods: Sequence[Method], *, tasks: Sequence[str] | None = None, texts: int = 8) -> list[Result]:
        from knormpress.pytest_plugin.measured import retrieve
        from knormpress.workload.tasks.haystack import DEFAULT_TASKS

        policies = [asked_of(request.config, method) for method in methods]
        named = tasks or number(request.config, "tasks") or DEFAULT_TASKS
        return retrieve(knorm_bench, methods, policies, tasks=named, texts=texts)

    return ask


@pytest.fixture
def knorm_retrieval_gate(
    _knorm_measured: Measured, knorm_retrieval: Callable[..., list[Result]], request: pytest.FixtureRequest
) -> Callable[..., None]:
    """Let the test pass only if a method finds ``--knorm-retrieval-share`` of what the full cache finds.

    Called as ``knorm_retrieval_gate(method, tasks=None, texts=8)``, or with results of ``knorm_retrieval`` as
    ``knorm_retrieval_gate(result, controls={name: result})``. ``random`` and ``recent-window`` are asked the same, with
    as many tokens kept. A task which one of them passes, or which the full cache hardly solves, decides nothing; the
    test says so. The whole 95 % interval (Wilson's) decides, as in ``knorm_gate``.
    """
    wanted = number(request.config, "retrieval_share")

    def ask(method: Method, asked: dict[str, Any]) -> tuple[Result, dict[str, Result]]:
        from knormpress.pytest_plugin.measured import retrieval_controls

        policy = asked_of(request.config, method)
        if policy is None:
            pytest.fail(
                "the method has no policy, under which controls could be asked; take it from knorm_method, or give it "
                "a press",
                pytrace=False,
            )
        controls = retrieval_controls(policy)
        own, *others = knorm_retrieval([method, *controls.values()], **asked)
        return own, dict(zip(controls, others, strict=True))

    def decide(method: Method | Result, *, controls: dict[str, Result] | None = None, **asked: Any) -> None:
        from knormpress.compare.retrieval import judge_retrieval
        from knormpress.records.schema import Result

        own, others = (method, controls or {}) if isinstance(method, Result) else ask(method, asked)
        _knorm_measured.retrieval(own)
        assert own.retrieval is not None
        found = {name: other.retrieval for name, other in others.items() if other.retrieval}
        outcome = judge_retrieval(own.retrieval, found, wanted)
        settle(request.node, outcome.decision, outcome.text)

    return decide


@pytest.fixture(scope="session")
def knorm_passkeys(knorm_retrieval: Callable[..., list[Result]]) -> Callable[..., list[tuple[int, int]]]:
    """Ask the caches of several methods for passkeys, which are hidden in idle sentences.

    Called as ``knorm_passkeys([method, ...], count=40)``; returns for each method how many passkeys it found, and how
    many of the ``count`` the full cache found; the others don't count.
    """

    def ask(methods: Sequence[Method], *, count: int = 40) -> list[tuple[int, int]]:
        measured = knorm_retrieval(methods, tasks=("passkey",), texts=count)
        shares = [result.retrieval.share for result in measured if result.retrieval]
        return [(share.found, share.known) for share in shares]

    return ask


@pytest.fixture
def knorm_passkey_gate(
    knorm_passkeys: Callable[..., list[tuple[int, int]]], request: pytest.FixtureRequest
) -> Callable[..., None]:
    """Let the test pass only if a method finds ``--knorm-passkey-share`` of the passkeys that the full cache finds.

    Called as ``knorm_passkey_gate(method, count=40)``, or with a pair from ``knorm_passkeys``. The whole 95 %
    interval (Wilson's) decides, as in ``knorm_gate``.
    """
    wanted = number(request.config, "passkey_share")

    def decide(method: Method | tuple[int, int], **count: int) -> None:
        from knormpress.stats.gates import passkey_gate

        counts = method if isinstance(method, tuple) else knorm_passkeys([method], **count)[0]
        decision, figures = passkey_gate(*counts, wanted)
        settle(request.node, decision, figures)

    return decide

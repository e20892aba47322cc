"""The clock: what is inside it and what is outside, and when two methods have been timed enough."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from knormpress.errors import KnormError
from knormpress.measure import calibration, latency
from knormpress.measure.latency import cold_ttft, measure_latency, time_generation, weights_tpot
from knormpress.methods.full import FullCache
from knormpress.methods.knorm import KnormPress
from knormpress.records.figures import Run
from tests.strategies import VOCABULARY, tiny_model


class Clock:
    """A clock that stands still while the machine works, and goes on where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(latency.time, "perf_counter", made)
    return made


def prompt(tokens: int = 24) -> Tensor:
    return torch.randint(2, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(5))


@contextmanager
def watched(model: PreTrainedModel, look: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: look(kwargs), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def new_full_cache() -> Cache:
    return DynamicCache(config=tiny_model().config)


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the tests that are not about it the fixed piece of work before and after a measurement."""
    monkeypatch.setattr(latency, "calibrate", lambda device: 0.01)


class TestGeneration:
    def test_derived_figures_follow_their_definitions(self) -> None:
        run = Run(ttft_s=2.0, gaps_s=(0.5, 0.25, 0.75))
        assert (run.tpot_s, run.tokens_per_s) == (0.5, 4 / 3.5)

    @pytest.mark.parametrize("chunk", [None, 10])
    def test_the_loop_is_the_greedy_generation_of_the_model(self, chunk: int | None) -> None:
        """Only the last logits of the prompt are computed, and an end of text does not stop it."""
        model = tiny_model()
        fed: list[list[int]] = []
        kept: list[int] = []

        def look(kwargs: dict[str, Any]) -> None:
            fed.append(kwargs["input_ids"][0].tolist())
            kept.append(kwargs["logits_to_keep"])

        expected = model.generate(prompt(), max_new_tokens=6, do_sample=False, eos_token_id=None)[0].tolist()
        ends_at = model.generation_config.eos_token_id
        model.generation_config.eos_token_id = expected[24]
        try:
            with watched(model, look):
                run = time_generation(model, prompt(), new_full_cache, new_tokens=6, prefill_chunk=chunk)
        finally:
            model.generation_config.eos_token_id = ends_at
        parts = [24] if chunk is None else [10, 10, 4]
        assert [len(part) for part in fed] == [*parts, 1, 1, 1, 1, 1]
        assert [token for part in fed for token in part] == expected[:-1]
        assert set(kept) == {1}
        assert len(run.gaps_s) == 5
        assert min(run.ttft_s, *run.gaps_s) > 0

    def test_each_time_is_that_of_its_own_token(self, clock: Clock) -> None:
        """Making the cache counts towards the first."""
        model, passes = tiny_model(), [0]

        def pause_at_third_pass(_kwargs: dict[str, Any]) -> None:
            passes[0] += 1
            if passes[0] == 3:
                clock.now += 1.0

        def slow_cache() -> Cache:
            clock.now += 2.0
            return new_full_cache()

        with watched(model, pause_at_third_pass):
            run = time_generation(model, prompt(), slow_cache, new_tokens=5)
        assert run == Run(ttft_s=2.0, gaps_s=(0.0, 1.0, 0.0, 0.0))

    def test_the_collector_is_off_inside_the_clock_and_as_before_after_it(self) -> None:
        states = []

        def watching_cache() -> Cache:
            states.append(gc.isenabled())
            return new_full_cache()

        time_generation(tiny_model(), prompt(), watching_cache, new_tokens=1)
        assert states == [False]
        assert gc.isenabled()

        def failing_cache() -> Cache:
            raise RuntimeError("no cache")

        with pytest.raises(RuntimeError, match="no cache"):
            time_generation(tiny_model(), prompt(), failing_cache, new_tokens=1)
        assert gc.isenabled()
        gc.disable()
        try:
            time_generation(tiny_model(), prompt(), new_full_cache, new_tokens=1)
            assert not gc.isenabled()
        finally:
            gc.enable()

    @pytest.mark.parametrize(
        ("tokens", "new_tokens", "chunk", "named"),
        [(0, 1, None, "0 tokens"), (4, 0, None, "0 new tokens"), (4, 1, 0, "prefill_chunk is 0")],
    )
    def test_nothing_to_time_is_refused(self, tokens: int, new_tokens: int, chunk: int | None, named: str) -> None:
        with pytest.raises(KnormError, match=f"{named}.*wanted at least 1"):
            time_generation(tiny_model(), prompt(tokens), new_full_cache, new_tokens=new_tokens, prefill_chunk=chunk)


class Logged:
    """A full cache that notes its place in the order, and takes its time on a clock."""

    def __init__(self, name: str, log: list[str], clock: Clock, seconds: float = 0.0) -> None:
        self.name, self.log, self.clock, self.seconds = name, log, clock, seconds

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[Callable[[], Cache]]:
        self.log.append(f"enter {self.name}")

        def new_cache() -> Cache:
            self.log.append(f"run {self.name}")
            self.clock.now += self.seconds
            return DynamicCache(config=model.config)

        yield new_cache
        self.log.append(f"leave {self.name}")


@pytest.mark.usefixtures("calibrated")
class TestPairs:
    def test_runs_alternate_after_a_warm_up_of_both(self, clock: Clock) -> None:
        """Each method's context is around its own runs only, and the baseline comes first in each pair."""
        log: list[str] = []
        (found,) = measure_latency(
            tiny_model(), [Logged("B", log, clock, seconds=2.0)], prompt(), new_tokens=2, rounds=4,
            baseline=Logged("A", log, clock, seconds=1.0), after_run=lambda: log.append("after"),
        )  # fmt: skip
        order = "AB" + "ABBAABBA"
        assert log == [part for name in order for part in (f"enter {name}", f"run {name}", f"leave {name}", "after")]
        assert (found.pairs, found.stopped) == (4, "rounds")
        assert [run.ttft_s for run in found.candidate] == [2.0] * 4
        assert [run.ttft_s for run in found.baseline] == [1.0] * 4

    def test_the_full_cache_is_the_baseline_and_the_method_is_timed_on_its_pruned_one(self) -> None:
        press, caches = KnormPress(keep_ratio=0.5, prune_after=8), []

        @contextmanager
        def remembered(model: PreTrainedModel) -> Iterator[Callable[[], Cache]]:
            with press(model) as new_cache:
                yield lambda: caches.append(new_cache()) or caches[-1]

        seen: list[Cache] = []
        with watched(tiny_model(), lambda kwargs: seen.append(kwargs["past_key_values"])):
            (found,) = measure_latency(tiny_model(), [remembered], prompt(), new_tokens=4, rounds=1)
        assert len(found.candidate[0].gaps_s) == 3
        assert len({id(cache) for cache in caches}) == 2
        assert caches[-1].stats()[1].evicted == 12
        assert {type(cache) for cache in seen if cache not in caches} == {DynamicCache}

    @pytest.mark.parametrize(
        ("ttft", "tpot", "precision", "stopped"),
        [
            ((1.0, 1.0), (1.0, 1.0), None, "rounds"),
            ((1.0, 1.0), (1.0, 1.0), 0.0, "precise"),
            ((1.0, 1.5), (1.0, 1.0), 24.9, "time"),
            ((1.0, 1.0), (1.0, 1.5), 24.9, "time"),
            ((1.0, 1.5), (1.5, 1.0), 25.0, "precise"),
            ((1.0, 1.5), None, 24.9, "time"),
            ((1.0, 1.5), None, 25.0, "precise"),
        ],
    )
    def test_precise_means_the_intervals_of_both_ttft_and_tpot(
        self,
        monkeypatch: pytest.MonkeyPatch,
        ttft: tuple[float, float],
        tpot: tuple[float, float] | None,
        precision: float | None,
        stopped: str,
    ) -> None:
        """Of TTFT alone where nothing is decoded. The runs are made up: every other one of the candidate is slower.

        The interval of pairs of which half are slower by 50 % is 0..50 %, around 25 %.
        """
        timed: list[Run] = []

        def made_up(_model: PreTrainedModel, _prompt: Tensor, new_cache: Callable[[], Cache], **_: Any) -> Run:
            if isinstance(new_cache(), DynamicCache):
                return Run(ttft_s=1.0, gaps_s=() if tpot is None else (1.0,))
            turn = len(timed) % 2
            timed.append(Run(ttft_s=ttft[turn], gaps_s=() if tpot is None else (tpot[turn],)))
            return timed[-1]

        monkeypatch.setattr(latency, "time_generation", made_up)
        (found,) = measure_latency(
            tiny_model(), [KnormPress(0.5)], prompt(), new_tokens=2, rounds=12, precision=precision, seconds=0.0
        )
        assert (found.stopped, found.pairs) == (stopped, 12)
        assert found.candidate == tuple(timed[1:])

    def test_pairs_without_an_interval_are_never_precise(self) -> None:
        """Four pairs have none, however wide it may be; six have one."""
        (found,) = measure_latency(tiny_model(), [FullCache()], prompt(), new_tokens=2, rounds=1, precision=math.inf)
        assert (found.stopped, found.pairs) == ("precise", 6)


class Queue:
    """An accelerator's queue: a forward pass fills it, a synchronise empties it, and no clock may be read before.

    Also a method: its context leaves the queue filled, as whatever came before a measurement may.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, deaf: bool = False) -> None:
        self.busy, self.readings, self.deaf = False, 0, deaf
        clock = time.perf_counter

        def read() -> float:
            assert not self.busy, "a clock was read while the device was at work"
            self.readings += 1
            return clock()

        for module in (latency, calibration):
            patch.setattr(module, "synchronize", self.synchronize)
            patch.setattr(module.time, "perf_counter", read)
        product = torch.mm
        patch.setattr(torch, "mm", lambda *arguments: self.fill() or product(*arguments))

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[Callable[[], Cache]]:
        self.fill()
        yield new_full_cache

    def fill(self) -> None:
        self.busy = True

    def synchronize(self, device: torch.device) -> None:
        assert device == torch.device("cpu")
        self.busy = self.busy and self.deaf


@pytest.mark.parametrize("deaf", [False, True], ids=["all clocks wait", "control: a synchronise that does nothing"])
def test_no_clock_is_read_while_the_device_is_at_work(monkeypatch: pytest.MonkeyPatch, deaf: bool) -> None:
    queue = Queue(monkeypatch, deaf=deaf)
    with watched(tiny_model(), lambda kwargs: queue.fill()):

        def measure() -> None:
            (found,) = measure_latency(
                tiny_model(), [queue], prompt(), new_tokens=3, rounds=2, precision=0.0, seconds=0.0, baseline=queue
            )
            assert min(found.calibration_s) > 0

        if deaf:
            with pytest.raises(AssertionError, match="a clock was read while the device was at work"):
                measure()
        else:
            measure()
            assert queue.readings > 2 * 2 * 4


def test_the_weights_are_timed_behind_an_almost_empty_cache(clock: Clock) -> None:
    fed: list[tuple[int, int]] = []

    def look(kwargs: dict[str, Any]) -> None:
        # The last pass waits, as a machine does now and then: the median must not notice.
        fed.append((kwargs["input_ids"].shape[1], kwargs["past_key_values"].get_seq_length()))
        clock.now += 100.0 if len(fed) == 16 else 1.0

    with watched(tiny_model(), look):
        seconds = weights_tpot(tiny_model(), prompt(200))
    assert fed == [(16, 0), *((1, stored) for stored in range(16, 31))]
    assert seconds == 1.0


@pytest.mark.parametrize("chunk", [None, 10])
def test_only_the_first_call_of_the_process_is_cold(monkeypatch: pytest.MonkeyPatch, chunk: int | None) -> None:
    monkeypatch.setattr(latency, "_process_is_cold", True)
    fed: list[int] = []
    with watched(tiny_model(), lambda kwargs: fed.append(kwargs["input_ids"].shape[1])):
        first = cold_ttft(tiny_model(), prompt(), prefill_chunk=chunk)
        second = cold_ttft(tiny_model(), prompt(), prefill_chunk=chunk)
    assert first is not None
    assert first > 0
    assert second is None
    assert fed == ([24] if chunk is None else [10, 10, 4])

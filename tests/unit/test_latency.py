"""The clock: what is inside it, what is outside, and in which order two methods run."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from knormpress.errors import KnormError
from knormpress.methods import FullCache
from knormpress.metrics import Method, Timing, calibration, latency, time_generation, time_in_turn
from knormpress.press import KnormPress
from knormpress.records import Run
from tests.strategies import VOCABULARY, tiny_model

PAUSE = 0.05


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


def test_derived_figures_follow_their_definitions() -> None:
    times = {"ttft_s": 2.0, "gaps_s": (0.5, 0.25, 0.75)}
    assert Timing(**times).tpot_s == Run(**times).tpot_s == 0.5
    assert Run(**times).tokens_per_s == 4 / 3.5


@pytest.mark.parametrize("chunk", [None, 10])
def test_loop_is_the_greedy_generation_of_the_model(chunk: int | None) -> None:
    model = tiny_model()
    fed: list[list[int]] = []
    with watched(model, lambda kwargs: fed.append(kwargs["input_ids"][0].tolist())):
        timing = time_generation(model, prompt(), new_full_cache, new_tokens=6, prefill_chunk=chunk)
    expected = model.generate(prompt(), max_new_tokens=6, do_sample=False, eos_token_id=None)[0].tolist()
    parts = [24] if chunk is None else [10, 10, 4]
    assert [len(part) for part in fed] == [*parts, 1, 1, 1, 1, 1]
    assert [token for part in fed for token in part] == expected[:-1]
    assert len(timing.gaps_s) == 5
    assert timing.ttft_s > 0
    assert min(timing.gaps_s) > 0


def test_end_of_text_does_not_stop_the_clock() -> None:
    model = tiny_model()
    first = int(model.generate(prompt(), max_new_tokens=1, do_sample=False, eos_token_id=None)[0, -1])
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = first
    try:
        assert len(time_generation(model, prompt(), new_full_cache, new_tokens=4).gaps_s) == 3
    finally:
        model.generation_config.eos_token_id = before


def test_only_the_last_logits_of_the_prompt_are_computed() -> None:
    kept: list[Any] = []
    with watched(tiny_model(), lambda kwargs: kept.append(kwargs["logits_to_keep"])):
        time_generation(tiny_model(), prompt(), new_full_cache, new_tokens=3, prefill_chunk=12)
    assert kept == [1, 1, 1, 1]


def test_making_the_cache_counts_towards_the_first_token() -> None:
    def slow_cache() -> Cache:
        time.sleep(PAUSE)
        return new_full_cache()

    assert time_generation(tiny_model(), prompt(), slow_cache, new_tokens=1).ttft_s >= PAUSE


def test_each_gap_is_the_time_of_its_own_token() -> None:
    model, calls = tiny_model(), [0]

    def pause_at_third_token(kwargs: dict[str, Any]) -> None:
        calls[0] += 1
        if calls[0] == 3:
            time.sleep(PAUSE)

    with watched(model, pause_at_third_token):
        timing = time_generation(model, prompt(), new_full_cache, new_tokens=5)
    assert timing.gaps_s[1] >= PAUSE
    assert timing.gaps_s[1] == max(timing.gaps_s)


def test_every_reading_follows_a_synchronise_of_the_prompts_device(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []
    real = time.perf_counter

    def perf_counter() -> float:
        events.append("clock")
        return real()

    monkeypatch.setattr(latency, "synchronize", events.append)
    monkeypatch.setattr(latency.time, "perf_counter", perf_counter)
    time_generation(tiny_model(), prompt(), new_full_cache, new_tokens=3)
    monkeypatch.undo()
    assert events == [torch.device("cpu"), "clock"] * 4


def test_collector_is_off_inside_the_clock_and_as_before_after_it() -> None:
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


class Logged:
    """A full cache whose context, caches and place in the order are noted."""

    def __init__(self, name: str, log: list[str], seconds: float = 0.0) -> None:
        self.name, self.log, self.seconds = name, log, seconds

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[Callable[[], Cache]]:
        self.log.append(f"enter {self.name}")

        def new_cache() -> Cache:
            self.log.append(f"run {self.name}")
            time.sleep(self.seconds)
            return DynamicCache(config=model.config)

        yield new_cache
        self.log.append(f"leave {self.name}")


def test_runs_alternate_after_a_warm_up_of_both() -> None:
    log: list[str] = []
    pairs = time_in_turn(tiny_model(), Logged("A", log), Logged("B", log), prompt(), new_tokens=2, rounds=4).pairs
    warm_up, rounds = "AB", "ABBAABBA"
    assert log == [f"{what} {name}" for name in warm_up + rounds for what in ("enter", "run", "leave")]
    assert len(pairs) == 4


def test_pairs_hold_the_baseline_first_whatever_the_order() -> None:
    slow = Logged("B", [], seconds=PAUSE)
    pairs = time_in_turn(tiny_model(), Logged("A", []), slow, prompt(), new_tokens=2, rounds=3).pairs
    for baseline, candidate in pairs:
        assert candidate.ttft_s >= PAUSE > baseline.ttft_s


def test_after_run_is_called_after_each_run() -> None:
    ticks: list[int] = []
    time_in_turn(
        tiny_model(), FullCache(), KnormPress(prune_after=8), prompt(), new_tokens=2, rounds=2,
        after_run=lambda: ticks.append(1),
    )  # fmt: skip
    assert len(ticks) == 6


def test_pruning_method_is_timed_on_a_pruned_cache() -> None:
    press = KnormPress(keep_ratio=0.5, prune_after=8)
    caches: list[Any] = []

    @contextmanager
    def remembered(model: PreTrainedModel) -> Iterator[Callable[[], Cache]]:
        with press(model) as new_cache:
            yield lambda: caches.append(new_cache()) or caches[-1]

    method: Method = remembered
    ((_, candidate),) = time_in_turn(tiny_model(), FullCache(), method, prompt(), new_tokens=4, rounds=1).pairs
    assert len(candidate.gaps_s) == 3
    assert len({id(cache) for cache in caches}) == 2
    assert caches[-1].stats()[1].evicted == 12


@pytest.mark.parametrize(("tokens", "new_tokens", "rounds"), [(0, 1, 1), (4, 0, 1), (4, 2, 0)])
def test_nothing_to_time_is_refused(tokens: int, new_tokens: int, rounds: int) -> None:
    with pytest.raises(KnormError, match="wanted at least 1"):
        time_in_turn(tiny_model(), FullCache(), FullCache(), prompt(tokens), new_tokens=new_tokens, rounds=rounds)


def test_prefill_chunk_below_one_is_refused() -> None:
    with pytest.raises(KnormError, match="prefill_chunk is 0"):
        time_generation(tiny_model(), prompt(), new_full_cache, new_tokens=1, prefill_chunk=0)


def test_pairs_are_added_until_the_interval_is_narrow_or_the_time_is_up() -> None:
    def timed(**conditions: float) -> latency.TimedPairs:
        return time_in_turn(tiny_model(), FullCache(), FullCache(), prompt(), new_tokens=3, rounds=4, **conditions)

    assert timed().stopped == "rounds"
    assert len(timed(precision=1e9).pairs) == 4
    assert timed(precision=1e9).stopped == "precise"
    out_of_time = timed(precision=0.0, seconds=0.0)
    assert (out_of_time.stopped, len(out_of_time.pairs)) == ("time", 4)
    longer = timed(precision=0.0, seconds=0.5)
    assert longer.stopped == "time"
    assert len(longer.pairs) > 4
    assert all(seconds > 0 for seconds in longer.calibration_s)


def test_whoever_repeats_the_candidate_runs_it_and_nothing_else() -> None:
    log: list[str] = []

    def once(before: Callable[[], None], run: Callable[[], None]) -> None:
        before()
        log.append("|")
        run()
        log.append("|")

    found = time_in_turn(
        tiny_model(), Logged("A", log), Logged("B", log), prompt(), new_tokens=2, rounds=3, repeat=once
    )
    assert len(found.pairs) == 1
    start, end = (index for index, event in enumerate(log) if event == "|")
    assert log[start + 1 : end] == ["enter B", "run B", "leave B"]
    assert log[end + 1 :] == []


class Queue:
    """An accelerator's queue: a forward pass fills it, a synchronise empties it, and no clock may be read before."""

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
            time_in_turn(
                tiny_model(), FullCache(), FullCache(), prompt(), new_tokens=3, rounds=2, precision=0.0, seconds=0.05
            )

        if deaf:
            with pytest.raises(AssertionError, match="a clock was read while the device was at work"):
                measure()
        else:
            measure()
            assert queue.readings > 2 * 2 * 4

"""The settings of a measurement: their defaults, how their texts are read, and what is refused, in one line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from knormpress import KnormPress
from knormpress.errors import KnormError
from knormpress.measure.options import Candidates, Effort, Source, options_of, read_option
from knormpress.records.plan import write_plan
from knormpress.workload.device_map import DeviceMap
from tests.plan_factory import make_plan

GROUPS = (Source, Effort, Candidates)
OPTIONS = {option.name: option for group in GROUPS for option in options_of(group)}


def said(make: Any, *arguments: Any, **named: Any) -> str:
    """The message with which ``make`` refuses, which must be one line."""
    with pytest.raises(KnormError) as caught:
        make(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_defaults() -> None:
    assert Source() == Source(model=None, device=("auto",), dtype="float32", corpus=None)
    assert Effort() == Effort(
        prompt_tokens=(1024,), new_tokens=16, prefill_chunk=None, samples=8, rounds=6, precision=3.0, seconds=15.0,
        scored_tokens=256,
    )  # fmt: skip
    assert Candidates().presses == tuple(KnormPress(ratio, 512, (0,)) for ratio in (1.0, 0.9, 0.8, 0.7))
    assert (Candidates().method, Candidates().plan) == ("knorm", "auto")


def test_quick_is_never_more_than_was_asked_for() -> None:
    quick = Effort().quick()
    assert (quick.rounds, quick.seconds, quick.samples, quick.texts) == (2, 0.0, 1, 1)
    less = Effort(rounds=1, samples=1, new_tokens=4)
    assert less.quick() == Effort(rounds=1, samples=1, new_tokens=4, scored_tokens=128, texts=1, seconds=0.0)


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_makes_its_field_and_shows_its_default(group: type) -> None:
    """The text that the help shows for a default stands for that default."""
    made = group()
    for option in options_of(group):
        assert option.help
        assert option.default == getattr(made, option.name)
        assert option.default is None or read_option(option, str(option.default_text), option.name) == option.default


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("device", " cpu, cuda:1 ,", ("cpu", "cuda:1")),
        ("device", " , ", ()),
        ("device_map", "auto,cpu=2GB", DeviceMap("auto", (("cpu", 2 * 10**9),))),
        ("prompt_tokens", "512, 2048", (512, 2048)),
        ("prefill_chunk", None, None),
        ("prefill_chunk", "64", 64),
        ("rounds", "7", 7),
        ("precision", "0.5", 0.5),
        ("keep_ratios", "1.0,.5", (1.0, 0.5)),
        ("skip_layers", "0,-1", (0, -1)),
        ("skip_layers", "None", ()),
        ("skip_layers", "", ()),
        ("method", "a.module:object", "a.module:object"),
    ],
)
def test_a_text_is_read_as_what_it_stands_for(name: str, text: str | None, value: Any) -> None:
    read = read_option(OPTIONS[name], text, f"--{name}")
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompt_tokens", "512,many"),
        ("prompt_tokens", "1.5"),
        ("prompt_tokens", ""),
        ("keep_ratios", "0.5,x"),
        ("keep_ratios", " , "),
        ("skip_layers", "first"),
        ("rounds", "1.5"),
        ("new_tokens", "many"),
        ("precision", "3%"),
        ("seconds", ""),
    ],
)
def test_a_text_that_is_no_number_is_refused_with_the_name_as_it_was_typed(name: str, text: str) -> None:
    message = said(read_option, OPTIONS[name], text, "--as-typed")
    assert message.startswith(f"--as-typed is {text!r}; wanted ")
    assert ("whole number" in message) == (name not in {"keep_ratios", "precision", "seconds"})


def test_a_plan_is_read_from_its_file_and_measured_last(tmp_path: Path) -> None:
    path, plan = tmp_path / "plan.json", make_plan()
    assert str(path) in said(read_option, OPTIONS["plan"], str(path), "--plan")
    write_plan(plan, path)
    read = read_option(OPTIONS["plan"], str(path), "--plan")
    assert read == plan
    *uniform, planned = Candidates(keep_ratios=(0.5,), prune_after=16, skip_layers=(), plan=read).presses
    assert uniform == [KnormPress(0.5, 16, ())]
    assert (type(planned), planned) == (KnormPress, plan.press)


def test_what_is_given_twice_is_measured_once() -> None:
    assert Effort(prompt_tokens=(48, 24, 48)).prompt_tokens == (48, 24)
    assert [press.keep_ratio for press in Candidates(keep_ratios=(0.8, 0.3, 0.8)).presses] == [0.8, 0.3]
    plan = make_plan(press=KnormPress(0.3))
    assert [press.keep_ratio for press in Candidates(keep_ratios=(0.3, 0.8), plan=plan).presses] == [0.3, 0.8]


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (Source, {"device": ()}, "device is empty"),
        (Source, {"device": ("cpu",), "device_map": DeviceMap("auto")}, "device is cpu and there is a device_map"),
        (Candidates, {"keep_ratios": ()}, "keep_ratios is empty"),
        (Candidates, {"keep_ratios": (0.9, 1.1)}, "keep_ratio is 1.1; wanted"),
        (Effort, {"prompt_tokens": ()}, "prompt_tokens is empty"),
        (Effort, {"prompt_tokens": (48, 0)}, "prompt_tokens is 0; wanted at least 1"),
        (Effort, {"samples": 0}, "samples is 0; wanted at least 1"),
        (Effort, {"rounds": 0}, "rounds is 0; wanted at least 1"),
        (Effort, {"new_tokens": 1}, "new_tokens is 1; wanted at least 2"),
        (Effort, {"scored_tokens": 0}, "scored_tokens is 0; wanted at least 1"),
        (Effort, {"prefill_chunk": 0}, "prefill_chunk is 0; wanted at least 1"),
        (Effort, {"precision": -0.1}, "precision is -0.1; wanted"),
        (Effort, {"precision": math.nan}, "precision is nan; wanted"),
        (Effort, {"seconds": -1.0}, "seconds is -1.0; wanted"),
        (Effort, {"seconds": math.nan}, "seconds is nan; wanted"),
    ],
)
def test_a_value_out_of_its_range_is_refused(make: Any, values: dict[str, Any], message: str) -> None:
    assert message in said(make, **values)


def test_the_least_values_are_taken() -> None:
    least = {"samples": 1, "rounds": 1, "new_tokens": 2, "scored_tokens": 1, "prefill_chunk": 1, "prompt_tokens": (1,)}
    made = Effort(**least, precision=0.0, seconds=0.0)
    assert {name: getattr(made, name) for name in least} == least
    assert Effort(precision=math.inf, seconds=math.inf).seconds == math.inf


def test_only_one_device_where_only_one_can_be_used() -> None:
    assert Source(device=("cpu",)).one_device == "cpu"
    assert "cpu,cuda" in said(lambda: Source(device=("cpu", "cuda")).one_device)

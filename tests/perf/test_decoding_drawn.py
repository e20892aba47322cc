"""Where the time of a decoded token goes, and what a long decode takes: pictures of the page of the table."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median

import pytest
import torch
from transformers import DynamicCache

from knormpress import KnormCache, KnormError, KnormPress
from knormpress.measure.prefill import prefill
from knormpress.stats.intervals import Change
from tests.perf.clocks import bytes_a_second, spent
from tests.perf.drawn import Course, draw_decoded_token, draw_long_decode
from tests.perf.test_targets import copy_of, decoding


@pytest.fixture(autouse=True)
def inference(for_the_table):
    with torch.inference_mode():
        yield


def test_where_the_time_of_a_token_goes(knorm_bench, benchmark, picture, quick):
    model, tokens = knorm_bench.model, 4 if quick else 64
    contexts = [(1, 100), (1, 200), (8, 50)] if quick else [(1, 1_000), (1, 8_000), (8, 2_000)]
    press, cases = KnormPress(0.5, prune_after=32 if quick else 512), {}

    def measure():
        for rows, length in contexts:
            full, ours = DynamicCache(config=model.config), KnormCache(model, press)
            prefill(model, torch.cat(knorm_bench.documents(length=length, count=rows)), full)
            ours.prefill_from(full)
            mask = None if rows == 1 else torch.ones(rows, length, dtype=torch.long)
            cases[f"{f'{rows} rows x ' * (rows > 1)}{length:,} tokens"] = {
                name: spent(model, cache, decoding(model, cache, mask), tokens=tokens)
                for name, cache in (("full cache", copy_of(model, full)), ("keep 0.5", ours))
            }

    benchmark.pedantic(measure, rounds=1)
    for full, ours in (case.values() for case in cases.values()):
        assert 0 < ours.read < full.read
        assert all(min(each.seconds.values()) > 0 for each in (full, ours))
    picture("knormpress_decoded_token.png", draw_decoded_token(cases, bandwidth=bytes_a_second()))


def test_a_long_decode(knorm_bench, benchmark, picture, target, quick):
    """The plan of the package by both schedules, in turn: no step, no leak."""
    model, prompt, tokens = knorm_bench.model, *((96, 120) if quick else (1_024, 4_000))
    try:
        plan = KnormPress.for_model(model)
    except KnormError as error:
        if not quick:
            pytest.skip(str(error))
        plan = KnormPress(0.5, prune_after=64)
    courses, steps = {}, {}
    for name, press in (("proportional", plan), ("iterative", replace(plan, schedule="iterative", prune_after=prompt))):
        cache, courses[name] = KnormCache(model, press), Course([], [])
        prefill(model, *knorm_bench.documents(length=prompt, count=1), cache)
        steps[name] = cache, decoding(model, cache)

    def decode():
        for name, (cache, step) in steps.items():
            start = time.perf_counter()
            step()
            courses[name].seconds.append(time.perf_counter() - start)
            courses[name].nbytes.append(cache.nbytes)

    benchmark.pedantic(decode, rounds=tokens)
    layers = steps["proportional"][0].layers
    slot = sum(2 * layer.keys[0, :, 0].nbytes for layer in layers)
    picture("knormpress_long_decode.png", draw_long_decode(courses, prompt=prompt, slot=slot))
    for (cache, _), course in zip(steps.values(), courses.values(), strict=True):
        before = cache.get_seq_length() - tokens
        assert all(held <= 1.02 * slot * seen for seen, held in enumerate(course.nbytes, start=before + 1))
    seconds, part = courses["iterative"].seconds, tokens // 8
    change = (median(seconds[-part:]) / median(seconds[:part]) - 1) * 100
    target(
        f"TPOT of the last {part} of {tokens:,} tokens, the plan, iterative",
        f"of the first {part}",
        Change(change, None, None),
        reach=1.10,
    )

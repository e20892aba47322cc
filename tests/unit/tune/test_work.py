"""What a search says it will do, against what it does."""

from __future__ import annotations

import pytest

from knormpress import KnormPress
from knormpress.progress import Progress
from knormpress.tune import texts
from knormpress.tune.probes import Probes
from knormpress.tune.unseen import Tried, measure_unseen
from knormpress.tune.work import Work
from tests.answered import answered

CONTEXT = 512


@pytest.fixture
def split(bench, monkeypatch):
    monkeypatch.setattr(texts, "CALIBRATION_TEXTS", 1)
    monkeypatch.setattr(texts, "HELD_OUT_TEXTS", 1)
    monkeypatch.setattr(texts, "TASKS", ("passkey", "multikey-filler"))
    return texts.split(bench, context=CONTEXT, with_items=True)


@pytest.fixture
def tokens(bench):
    """The tokens that passed through the model so far, a list that grows."""
    seen = []
    handle = bench.model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    yield seen
    handle.remove()


def test_the_report_takes_the_tokens_that_were_announced(bench, split, tokens):
    calibration, held_out = split
    tried = [Tried("uniform", KnormPress(keep)) for keep in (0.9, 0.5)]
    work = Work.of(calibration, held_out, alone=0, policies=len(tried))
    asked = [answered(bench.model, haystack) for haystack in held_out.asked]
    tokens.clear()
    measure_unseen(bench, tried, held_out.documents, context=CONTEXT, haystacks=asked, progress=Progress())
    assert 0.9 * work.report_tokens <= sum(tokens) <= 1.1 * work.report_tokens


def test_reading_takes_the_tokens_that_were_announced(bench, split, tokens):
    calibration, held_out = split
    work = Work.of(calibration, held_out, alone=0, policies=1)
    with Probes.open(bench.model, calibration.documents, calibration.asked, context=CONTEXT):
        assert 0.9 * work.read_tokens <= sum(tokens) <= 1.1 * work.read_tokens


def test_the_search_ends_early_enough_for_the_report(split):
    work = Work.of(*split, alone=0, policies=10)
    report = 2.0 * work.report_tokens / work.read_tokens
    assert work.end_of_search(100.0, 10 * report, 2.0) == pytest.approx(100 + 9 * report)
    assert work.end_of_search(100.0, report, 2.0) == pytest.approx(100 + report / 2)

"""What is measured of a plan behind its search."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from knormpress import KnormPress
from knormpress.measure.prefill import prefill
from knormpress.measure.quality import measure_quality
from knormpress.measure.retrieval import measure_retrieval
from knormpress.methods.registry import make_method
from knormpress.policy.policy import share
from knormpress.progress import Progress
from knormpress.tune import unseen
from knormpress.tune.unseen import Tried, kept_tokens, measure_unseen
from knormpress.workload.tasks.haystack import haystacks
from tests.answered import answered

PRESS = KnormPress(layer_keep_ratios=(1.0, 0.5, 0.1), prune_after=16)


def test_the_map_shows_the_tokens_that_stay(bench):
    """Those of the lowest norms, in the middle of the text; of a layer that is kept whole, all."""
    (prompt,) = bench.documents(length=200, count=1)
    found, full = kept_tokens(bench, PRESS, prompt), DynamicCache(config=bench.model.config)
    with torch.inference_mode():
        prefill(bench.model, prompt, full)
    middle = slice(100, 196)
    assert list(found.tokens) == [bench.tokenizer.decode([token]) for token in prompt[0, middle].tolist()]
    for ratio, layer, shares in zip(PRESS.layer_keep_ratios, full.layers, found.layers, strict=True):
        kept = torch.zeros(2, 200)
        for head, keys in enumerate(layer.keys[0]):
            kept[head, keys.norm(dim=-1).argsort()[: share(ratio, 200)]] = 1.0
        assert list(shares) == kept.mean(dim=0)[middle].tolist()
    assert set(found.layers[0]) == {1.0}


def test_a_short_text_is_shown_to_its_end(bench):
    (prompt,) = bench.documents(length=20, count=1)
    assert len(kept_tokens(bench, PRESS, prompt).tokens) == 10


class Told(Progress):
    def __init__(self):
        self.steps = []

    def step(self, done, total, doing):
        self.steps.append((done, total, doing))


def test_every_policy_is_measured_through_its_method(bench):
    """Of three keys the full cache finds two, so only these count."""
    low, told = KnormPress(0.3, 16), Told()
    tried = [Tried("tuned", PRESS), Tried("random", low, method="random"), Tried("uniform", low)]
    texts = bench.documents(length=64 + 17, count=2)
    first, unknown, last = haystacks(bench, ("passkey",), count=3)
    keys = [answered(bench.model, first, 1), unknown, answered(bench.model, last, 1)]
    points = measure_unseen(bench, tried, texts, context=64, haystacks=keys, progress=told)
    methods = [make_method(one.method, one.press) for one in tried]
    expected = measure_quality(bench.model, methods, texts, context=64)
    assert [point.name for point in points] == ["tuned", "random", "uniform"]
    assert [point.press for point in points] == [PRESS, low, low]
    assert [point.kl for point in points] == [quality.kl for quality in expected]
    assert [point.ppl for point in points] == [(one.ppl.percent, *one.ppl.ends) for one in expected]
    assert points[0].mean_keep == pytest.approx(1.6 / 3)
    assert points[1].mean_keep == pytest.approx(1.6 / 3)  # the first layer is not pruned
    shares = [one.share for one in measure_retrieval(bench.model, methods, keys)]
    assert [point.found for point in points] == [(share.found, 2) for share in shares]
    assert [point.ends for point in points] == [(share.low, share.high) for share in shares]
    assert [step[:2] for step in told.steps[-4:]] == [(done, 3) for done in range(4)]


def test_where_nothing_is_asked_nothing_is_said_of_it(bench, monkeypatch):
    monkeypatch.setattr(unseen, "measure_retrieval", lambda *_, **__: pytest.fail("asked"))
    texts = bench.documents(length=64 + 17, count=2)
    (point,) = measure_unseen(bench, [Tried("tuned", PRESS)], texts, context=64, haystacks=[], progress=Progress())
    assert (point.found, point.ends) == (None, None)

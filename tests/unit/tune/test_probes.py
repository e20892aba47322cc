"""The fast measurements of the search: against the full ones, and with the pass below a layer replayed."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch

from knormpress import KnormPress
from knormpress.measure.quality import score_document
from knormpress.tune.probes import Probes
from knormpress.workload.tasks.haystack import haystacks
from tests.answered import answered
from tests.strategies import tiny_model


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gpt-neox"])
def test_the_probes_measure_what_the_quality_is_measured_by(family):
    model = tiny_model(family)
    ids = torch.randint(2, 60, (1, 128 + 33), generator=torch.Generator().manual_seed(2))
    press = KnormPress(layer_keep_ratios=(1.0, 0.5, 0.3), prune_after=64)
    nearly = replace(press, layer_keep_ratios=(1.0, 0.5, 0.8))
    (found,) = score_document(model, ids, [press], context=128)
    rise = statistics.fmean(found.candidate_nll) - statistics.fmean(found.baseline_nll)
    with Probes.open(model, [ids], [], context=128) as probes:
        damage = probes.measure(press)
        assert damage.kl == pytest.approx(found.kl, rel=1e-3, abs=1e-7)
        assert damage.nll == pytest.approx(rise, rel=1e-3, abs=1e-6)
        assert (damage.answer_nll, damage.found) == (0.0, 1.0)
        assert dict(probes.around(nearly, {press: 2})) == {press: damage}
        assert probes.measure(nearly) != damage


def test_items_that_the_full_cache_does_not_find_are_left_out(bench):
    """Of three texts with four questions each, it finds two of one text."""
    prompts = haystacks(bench, ("multikey-filler",), count=3, which="calibration")
    findable, ticks = answered(bench.model, prompts[1]), []
    mixed = replace(findable, questions=(*findable.questions[:2], *prompts[1].questions[2:]))
    texts, asked = bench.documents(length=512 + 33, count=1), [prompts[0], mixed, prompts[2]]
    with Probes.open(bench.model, texts, asked, context=512, after_each=lambda: ticks.append(1)) as probes:
        assert len(ticks) == 4
        assert probes.items == 2
        assert probes.measure(KnormPress(1.0)).found == 1.0
        assert probes.measure(KnormPress(0.05)).answer_nll != 0.0


def test_one_layer_is_measured_on_few_of_the_texts(bench):
    """One of four documents, one of two texts of each task, one of four questions; replayed or not."""
    tasks = ("multikey-filler", "passkey")
    texts = bench.documents(length=512 + 33, count=4)
    asked = [answered(bench.model, text) for text in haystacks(bench, tasks, count=2, which="calibration")]
    press = KnormPress(layer_keep_ratios=(1.0, 1.0, 0.1))
    few = [replace(text, questions=text.questions[:1]) for text in (asked[0], asked[2])]
    with Probes.open(bench.model, texts, asked, context=512) as probes:
        assert probes.items == 10
        ((_, damage),) = probes.around(KnormPress(1.0), {press: 2})
    with Probes.open(bench.model, texts[:1], few, context=512) as probes:
        assert probes.measure(press) == damage

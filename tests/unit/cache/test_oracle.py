"""Pruning equals masking, over random policies, passes and paddings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import seed as fixed_seed
from hypothesis import strategies as st

from knormpress import KnormCache, KnormPress
from tests.oracle import assert_equal_to_masking, run_masked, run_pruned
from tests.strategies import FAMILIES, left_padding, passes, presses, tiny_model, tokens

# A wrong mask moves the logits of these models, of up to 4, by more than 0.5 (see the control).
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.05}


# Not eager in float64: it takes its softmax in float32, whatever the model's type.
KINDS = [("sdpa", torch.float64), *((way, dtype) for way in ("sdpa", "eager") for dtype in list(TOLERANCES)[1:])]


@given(kind=st.sampled_from(KINDS), press=presses(scored=True), sizes=passes(), seed=st.integers(0, 10_000))
@settings(max_examples=120)
def test_pruned_logits_equal_masked_logits(kind, press, sizes, seed):
    model = tiny_model("llama", *kind)
    ids = tokens(sum(sizes), seed=seed)
    assert_equal_to_masking(model, KnormCache(model, press), ids, sizes, tolerance=TOLERANCES[model.dtype])


@given(kind=st.sampled_from(KINDS), press=presses(scored=True), sizes=passes(), data=st.data())
@settings(max_examples=120)
def test_padded_rows_equal_masking(kind, press, sizes, data):
    model = tiny_model("llama", *kind)
    total = sum(sizes)
    left = data.draw(st.lists(st.integers(0, sizes[0] - 1), min_size=2, max_size=3), label="left padding")
    padding, ids = left_padding(total, *left), tokens(total, len(left), seed=total)
    assert_equal_to_masking(model, KnormCache(model, press), ids, sizes, padding, TOLERANCES[model.dtype])


@given(family=st.sampled_from(sorted(FAMILIES)), press=presses(scored=True), sizes=passes(4), left=st.integers(0, 12))
@settings(max_examples=30)
def test_any_family_under_any_policy_equals_masking(family, press, sizes, left):
    model = tiny_model(family, "eager", torch.float32)
    total = sum(sizes)
    padding, ids = left_padding(total, 0, min(left, sizes[0] - 1)), tokens(total, 2, seed=total)
    assert_equal_to_masking(model, KnormCache(model, press), ids, sizes, padding, 5e-3)


def test_the_oracle_sees_a_wrong_mask():
    """Control: hiding one token that was kept changes the logits by far more than the tolerance."""
    model = tiny_model()
    ids = tokens(20, seed=1)
    trace = run_pruned(model, KnormCache(model, KnormPress(0.5, prune_after=4)), ids, [16, 4])
    trace.visible[1][0, 0, 16:, trace.visible[1][0, 0, 16].nonzero()[0]] = False
    assert (run_masked(model, ids, trace.visible) - trace.logits).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_no_tolerance_takes_what_was_dropped_for_what_was_kept(dtype, seed):
    """Control: in every type the logits of the full cache are beyond the tolerance, those of the mask well within."""
    model = tiny_model(dtype=dtype)
    ids = tokens(40, seed=seed)
    trace = run_pruned(model, KnormCache(model, KnormPress(0.3, prune_after=4)), ids, [20, 1, 19])
    right, nothing_hidden = (
        (run_masked(model, ids, visible) - trace.logits).abs().max()
        for visible in (trace.visible, {index: torch.ones_like(v).tril() for index, v in trace.visible.items()})
    )
    assert 2 * right < TOLERANCES[dtype] < nothing_hidden / 2


def test_a_failing_case_prints_the_line_that_reproduces_it(capsys):
    @fixed_seed(0)
    @given(kind=st.sampled_from(KINDS), press=presses(scored=True), sizes=passes())
    @settings(max_examples=1, database=None, phases=[Phase.generate])
    def fails(kind, press, sizes):
        raise AssertionError

    with pytest.raises(AssertionError) as failure:
        fails()
    # Python 3.10 has no notes on exceptions, and Hypothesis prints there.
    told = capsys.readouterr().out + "\n".join(getattr(failure.value, "__notes__", ()))
    assert "press=KnormPress(" in told
    assert "@reproduce_failure(" in told

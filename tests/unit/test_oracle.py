"""Pruning equals masking, over random policies, passes and paddings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knormpress import KnormCache, KnormPress
from tests.oracle import assert_equal_to_masking, run_masked, run_pruned
from tests.strategies import FAMILIES, VOCABULARY, passes, presses, tiny_model

# Eager attention takes its softmax in float32, whatever the model's type.
exact = pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"), [("sdpa", torch.float64, 1e-9), ("eager", torch.float32, 1e-4)]
)


@exact
@given(press=presses(), sizes=passes(), seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_pruned_logits_equal_masked_logits(attention, dtype, tolerance, press, sizes, seed):
    model = tiny_model(attention=attention, dtype=dtype)
    ids = torch.randint(2, VOCABULARY, (1, sum(sizes)), generator=torch.Generator().manual_seed(seed))
    assert_equal_to_masking(model, KnormCache(model, press), ids, sizes, tolerance=tolerance)


@exact
@given(press=presses(), sizes=passes(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_padded_rows_equal_masking(attention, dtype, tolerance, press, sizes, data):
    model = tiny_model(attention=attention, dtype=dtype)
    total = sum(sizes)
    left = data.draw(st.lists(st.integers(0, sizes[0] - 1), min_size=2, max_size=3), label="left padding")
    padding = torch.stack([(torch.arange(total) >= pad).long() for pad in left])
    ids = torch.randint(2, VOCABULARY, (len(left), total), generator=torch.Generator().manual_seed(total))
    assert_equal_to_masking(model, KnormCache(model, press), ids, sizes, padding, tolerance)


@given(family=st.sampled_from(sorted(FAMILIES)), press=presses(), sizes=passes(4), left=st.integers(0, 12))
@settings(max_examples=30, deadline=None)
def test_any_family_under_any_policy_equals_masking(family, press, sizes, left):
    model = tiny_model(family, "eager", torch.float32)
    total = sum(sizes)
    ids = torch.randint(2, VOCABULARY, (2, total), generator=torch.Generator().manual_seed(total))
    padding = torch.stack([(torch.arange(total) >= pad).long() for pad in (0, min(left, sizes[0] - 1))])
    assert_equal_to_masking(model, KnormCache(model, press), ids, sizes, padding, 5e-3)


def test_the_oracle_sees_a_wrong_mask():
    """Control: hiding one token that was kept changes the logits by far more than the tolerance."""
    model = tiny_model()
    ids = torch.randint(2, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(1))
    trace = run_pruned(model, KnormCache(model, KnormPress(0.5, prune_after=4)), ids, [16, 4])
    trace.visible[1][0, 0, 16:, trace.visible[1][0, 0, 16].nonzero()[0]] = False
    assert (run_masked(model, ids, trace.visible) - trace.logits).abs().max() > 1e-4

"""The fingerprint of a model: other weights, configurations or types make another one."""

from __future__ import annotations

import pytest
import torch

from knormpress.cache.fingerprint import _spread, model_fingerprint
from tests.strategies import tiny_model


def test_the_weights_the_configuration_and_the_type_are_seen():
    model = tiny_model()
    assert model_fingerprint(model) == model_fingerprint(tiny_model(attention="eager"))
    others = [tiny_model(seed=1), tiny_model("qwen2"), tiny_model(dtype=torch.float32)]
    assert len({model_fingerprint(each) for each in (model, *others)}) == 4
    assert all(len(model_fingerprint(each)) == 16 for each in others)


@pytest.mark.parametrize("size", [0, 1, 2, 63, 64, 65, 1000, 28_311_552, 2**31 + 7])
def test_a_weight_is_sampled_from_first_to_last(size):
    places = _spread(size).tolist()
    assert len(places) == min(size, 64)
    assert places == sorted(set(places))
    assert not places or (places[0], places[-1]) == (0, max(size - 1, 0))

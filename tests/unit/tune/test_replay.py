"""Passes that begin in the middle: the same logits, and the layers below are not computed."""

from __future__ import annotations

import pytest
import torch

from knormpress.tune.replay import decoder_layers, replayed
from tests.strategies import tiny_model, tokens

IDS = tokens(24, seed=1)


@pytest.fixture(scope="module", params=["llama", "gpt2", "gpt-neox", "mixtral", "gemma3"])
def model(request):
    return tiny_model(request.param)


def computed(model, run):
    """The layers whose attention was called in ``run``, and what it gave."""
    called, handles = [], []
    for index, layer in decoder_layers(model).items():
        attention = next(
            m for m in layer.modules() if getattr(m, "layer_idx", None) == index and "Attention" in type(m).__name__
        )
        handles.append(attention.register_forward_hook(lambda *_, index=index: called.append(index)))
    with torch.no_grad():
        result = run()
    for handle in handles:
        handle.remove()
    return called, result


def test_every_layer_is_found(model):
    assert sorted(decoder_layers(model)) == list(range(model.config.num_hidden_layers))


def test_a_replayed_pass_gives_the_same_and_computes_less(model):
    with replayed(model) as replay:
        with replay.record() as outputs:
            everything, logits = computed(model, lambda: model(IDS).logits)
        assert everything == [0, 1, 2]
        for layer in range(3):
            with replay.above(outputs, layer):
                called, again = computed(model, lambda: model(IDS).logits)
            assert called == list(range(layer, 3))
            assert torch.equal(again, logits)
        called, _ = computed(model, lambda: model(IDS).logits)
        assert called == [0, 1, 2]
    assert all("forward" not in vars(layer) for layer in decoder_layers(model).values())


def test_control_other_outputs_are_seen(model):
    with replayed(model) as replay, torch.no_grad():
        with replay.record() as outputs:
            logits = model(IDS).logits
        with replay.record() as others:
            model(IDS.flip(-1))
        with replay.above(others, 2):
            assert not torch.allclose(model(IDS).logits, logits)
        assert outputs.keys() == others.keys() == {0, 1, 2}


def test_a_fault_inside_leaves_the_model_as_it_was(model):
    with pytest.raises(ZeroDivisionError), replayed(model) as replay, replay.record():
        _ = 1 / 0
    assert all("forward" not in vars(layer) for layer in decoder_layers(model).values())

"""One hook for each attention module, whoever asks: copies, parts, wrappers and threads don't disturb each other."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from knormpress import KnormCache, KnormPress
from knormpress.cache import attention

PRESS = KnormPress(0.5, prune_after=16)
OFTEN = KnormPress(0.5, prune_after=16, prune_interval=3)
IDS = torch.arange(36)[None] * 7 % 100


def make_model(seed: int = 0, layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


def chunk_after_pruning(model, press=PRESS) -> torch.Tensor:
    """The logits of 8 tokens behind 28 that were pruned."""
    cache = KnormCache(model, press)
    with torch.inference_mode():
        model(IDS[:, :28], past_key_values=cache)
        return model(IDS[:, 28:], past_key_values=cache).logits


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def expected(model):
    return chunk_after_pruning(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_with_a_living_cache_is_a_model_of_its_own(model, expected, copied):
    alive = KnormCache(model, PRESS)
    again = copied(model)
    assert torch.equal(chunk_after_pruning(again), expected)
    assert torch.equal(chunk_after_pruning(model), expected)
    assert alive.model is model


def test_a_part_of_a_model_with_a_cache_of_its_own(model, expected):
    inner = KnormCache(model.model, PRESS)
    assert torch.equal(chunk_after_pruning(model), expected)
    with torch.inference_mode():
        model.model(IDS[:, :28], past_key_values=inner)
        hidden = model.model(IDS[:, 28:], past_key_values=inner).last_hidden_state
        assert torch.equal(model.lm_head(hidden), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_model_wrapped_by_peft(model, expected):
    peft = pytest.importorskip("peft")
    # A fresh LoRA adds nothing, so the logits are those of the model.
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).eval()
    torch.testing.assert_close(chunk_after_pruning(wrapped), expected)
    with PRESS(wrapped):
        made = wrapped.generate(input_ids=IDS, max_new_tokens=2, return_dict_in_generate=True)
    assert isinstance(made.past_key_values, KnormCache)


def test_every_hook_goes_with_the_last_cache(model):
    before = [dict(module._forward_pre_hooks) for module in model.modules()]
    first, second = KnormCache(model, PRESS), KnormCache(model.model, PRESS)
    attention_module = model.model.layers[0].self_attn
    assert len(attention_module._forward_pre_hooks) == 1
    del first
    gc.collect()
    assert len(attention_module._forward_pre_hooks) == 1
    del second
    gc.collect()
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == before


def conversation(model, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What a thread does with a cache of its own: a prompt, decoding that prunes, and a copy that goes another way.

    Returns the logits of each pass, and the positions that each layer of cache and copy holds in the end.
    """
    ids = (IDS + 13 * seed) % 100
    cache = KnormCache(model, OFTEN)
    with torch.inference_mode():
        logits = [model(ids[:, : 20 + seed], past_key_values=cache).logits]
        logits += [model(ids[:, place : place + 1], past_key_values=cache).logits for place in range(8)]
        copied = copy.deepcopy(cache)
        logits += [model(ids[:, 8:20], past_key_values=copied).logits]
        logits += [model(ids[:, place : place + 1], past_key_values=cache).logits for place in range(8, 16)]
    return logits, [layer.positions for each in (cache, copied) for layer in each.layers]


def test_threads_with_a_cache_each_work_side_by_side():
    """Two threads on each of two models, caches made, copied and dropped all the time, collections in the middle."""
    models = [make_model(0), make_model(1)]
    expected = {(which, seed): conversation(models[which], seed) for which in (0, 1) for seed in range(4)}
    assert all(held[0].numel() > held[1].numel() for _, held in expected.values()), "nothing was pruned"
    faults: list[object] = []
    together = threading.Barrier(4)

    def work(which: int, *, collects: bool) -> None:
        try:
            together.wait(60)
            for turn in range(12):
                seed = (turn + collects) % 4
                torch.testing.assert_close(conversation(models[which], seed), expected[which, seed])
                if collects:
                    gc.collect()
        except BaseException as error:
            faults.append(error)

    threads = [
        threading.Thread(target=work, args=(which,), kwargs={"collects": collects}, daemon=True)
        for which in (0, 1)
        for collects in (True, False)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert not faults


@pytest.fixture
def nobody_yet(monkeypatch):
    """The registered attention as in a fresh process, whatever caches other tests have left alive."""
    registered = attention.ALL_ATTENTION_FUNCTIONS["sdpa"]
    gc.collect()
    monkeypatch.setattr(attention, "_users", set())
    monkeypatch.setattr(attention, "_warned", False)
    attention.AttentionInterface.register("sdpa", attention.sdpa_attention_forward)
    yield
    attention.AttentionInterface.register("sdpa", registered)


class _EndsInside:
    """Its finalizer takes a user of the fast attention away, at whatever moment it is collected."""

    def __init__(self) -> None:
        self.user = User()
        attention.enable(self.user)


class User:
    pass


@pytest.mark.usefixtures("nobody_yet")
def test_a_collection_inside_enable_does_not_deadlock(monkeypatch):
    """The last user goes, in the same thread, while ``enable`` holds the lock."""
    doomed = [_EndsInside()]
    register = attention.AttentionInterface.register

    def registering(*args):
        doomed.clear()
        gc.collect()
        return register(*args)

    monkeypatch.setattr(attention.AttentionInterface, "register", registering)
    user = User()
    worker = threading.Thread(target=attention.enable, args=(user,), daemon=True)
    worker.start()
    worker.join(20)
    assert not worker.is_alive()
    assert attention.ALL_ATTENTION_FUNCTIONS["sdpa"] is attention._attend
    monkeypatch.setattr(attention.AttentionInterface, "register", register)
    del user, worker
    gc.collect()
    assert attention.ALL_ATTENTION_FUNCTIONS["sdpa"] is attention.sdpa_attention_forward


@pytest.mark.usefixtures("nobody_yet")
def test_fast_attention_says_once_why_it_is_off(model, caplog):
    def somebodys(*args, **kwargs):
        return attention.sdpa_attention_forward(*args, **kwargs)

    expected = chunk_after_pruning(model)
    gc.collect()
    attention.AttentionInterface.register("sdpa", somebodys)
    torch.testing.assert_close(chunk_after_pruning(model), expected)
    chunk_after_pruning(model)
    assert attention.ALL_ATTENTION_FUNCTIONS["sdpa"] is somebodys
    assert __name__ in str(attention.why_off())
    assert len([record for record in caplog.records if "faster attention is off" in record.getMessage()]) == 1


@pytest.mark.usefixtures("nobody_yet")
def test_a_torch_without_the_private_operator_uses_transformers_attention(model, monkeypatch):
    expected = chunk_after_pruning(model)
    gc.collect()
    monkeypatch.setattr(attention, "_flash_operator", lambda: None)
    cache = KnormCache(model, PRESS)
    torch.testing.assert_close(chunk_after_pruning(model), expected)
    assert attention.ALL_ATTENTION_FUNCTIONS["sdpa"] is attention.sdpa_attention_forward
    assert torch.__version__ in str(attention.why_off())
    assert cache.nbytes == 0

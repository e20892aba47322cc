"""``with press(model)``: left in any order, in threads and tasks, in wrappers and copies, nothing stays behind."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading

import pytest
import torch

from knormpress import KnormCache, KnormPress
from tests.unit.cache.test_hooks import IDS, make_model

HALF, QUARTER = KnormPress(0.5, prune_after=16), KnormPress(0.25, prune_after=16)


@pytest.fixture
def model():
    return make_model()


def kept(model) -> float | None:
    """The keep ratio of the cache that ``generate()`` uses; None if it does not prune."""
    made = model.generate(IDS, max_new_tokens=1, return_dict_in_generate=True)
    cache = made.past_key_values
    return cache.press.keep_ratio if isinstance(cache, KnormCache) else None


def test_contexts_left_out_of_order(model):
    first, second = HALF(model), QUARTER(model)
    first.__enter__()
    second.__enter__()
    assert kept(model) == 0.25
    first.__exit__(None, None, None)
    assert kept(model) == 0.25
    second.__exit__(None, None, None)
    assert kept(model) is None
    assert "generate" not in vars(model)


def test_a_thread_sees_its_own_context_only(model):
    inside, leave = threading.Event(), threading.Event()
    seen: list[float | None] = []

    def work():
        with HALF(model):
            inside.set()
            leave.wait(30)
            seen.append(kept(model))

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(30)
    assert kept(model) is None
    with QUARTER(model):
        leave.set()
        thread.join(60)
        assert seen == [0.5]
        assert kept(model) == 0.25
    assert kept(model) is None
    assert "generate" not in vars(model)


def test_a_task_that_outlives_the_context_no_longer_prunes(model):
    async def main():
        ended = asyncio.Event()

        async def later():
            before = kept(model)
            await ended.wait()
            return before, kept(model)

        with HALF(model):
            task = asyncio.create_task(later())
            await asyncio.sleep(0)
        ended.set()
        return await task

    assert asyncio.run(main()) == (0.5, None)


def test_nested_contexts_of_a_compiled_model(model):
    compiled = torch.compile(model, backend="eager")
    with HALF(compiled):
        with QUARTER(compiled):
            assert kept(compiled) == 0.25
        assert kept(compiled) == 0.5
    assert kept(compiled) is None
    assert "generate" not in vars(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_inside_generates_by_itself(model, copied):
    with HALF(model):
        again = copied(model)
        assert again.generate.__self__ is again
        assert kept(again) is None
        assert kept(model) == 0.5


def test_what_somebody_else_put_over_generate_stays(model):
    with HALF(model):
        ours = model.generate

        def theirs(*args, **kwargs):
            return ours(*args, **kwargs)

        model.generate = theirs
        assert kept(model) == 0.5
    assert kept(model) is None
    assert "generate" in vars(model)


def test_generate_keeps_its_name(model):
    with HALF(model):
        assert model.generate.__name__ == "generate"
        assert model.generate.__doc__ == type(model).generate.__doc__


def test_a_name_in_place_of_a_model():
    with pytest.raises(ValueError, match="'gpt2'"):
        HALF("gpt2")

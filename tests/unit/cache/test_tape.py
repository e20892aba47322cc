"""Growing in place: content, storage, and the modes in which writing in place is not allowed."""

from __future__ import annotations

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st

from knormpress.cache.tape import Tape, spare_room


@torch.no_grad()
@given(st.lists(st.integers(1, 5), min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_holds_what_concatenation_holds(sizes, random):
    tape, expected = Tape(), torch.empty(2, 1, 0, 3)
    for size in sizes:
        new = torch.full((2, 1, size, 3), random.random())
        expected = torch.cat([expected, new], dim=2)
        assert torch.equal(tape.append(new), expected)
        if random.random() < 0.2:
            keep = random.randint(1, tape.length)
            expected = expected[:, :, :keep]
            assert torch.equal(tape.truncate(keep), expected)


@torch.no_grad()
def test_what_is_shared_is_never_written_to():
    shared = torch.zeros(1, 1, 10, 4)
    tape = Tape()
    tape.append(shared)
    tape.truncate(7)
    tape.append(torch.ones(1, 1, 1, 4))
    assert shared.eq(0).all()
    assert tape.view[0, 0, :, 0].tolist() == [0.0] * 7 + [1.0]


@torch.no_grad()
def test_single_slots_are_not_copied():
    tape = Tape()
    tape.append(torch.randn(1, 2, 100, 4))
    tape.append(torch.randn(1, 2, 1, 4))
    address = tape.view.data_ptr()
    for _ in range(60):
        tape.append(torch.randn(1, 2, 1, 4))
    assert tape.view.data_ptr() == address


@torch.no_grad()
def test_spare_room_is_small_and_counted():
    tape = Tape()
    tape.append(torch.randn(1, 1, 8000, 4))
    assert tape.nbytes == 8000 * 16
    tape.append(torch.randn(1, 1, 1, 4))
    assert tape.nbytes == (8001 + 8000 // 64) * 16
    short = Tape()
    assert (short.length, short.nbytes) == (0, 0)
    for _ in range(2):
        short.append(torch.randn(1, 1, 1, 4))
    assert short.nbytes == (2 + 64) * 16


@torch.no_grad()
def test_several_slots_at_once_reserve_no_room():
    """A prefill in chunks must not leave spare room in every layer."""
    tape = Tape()
    for slots in (10, 5, 1, 5):
        tape.append(torch.randn(1, 1, slots, 4))
    assert (tape.length, tape.nbytes) == (21, 21 * 16)


def test_a_view_of_something_larger_is_copied():
    tape = Tape()
    tape.append(torch.randn(1, 1, 100, 4)[:, :, :10])
    assert tape.nbytes == 10 * 16


def test_writing_goes_on_after_inference_mode():
    tape = Tape()
    with torch.inference_mode():
        tape.append(torch.ones(1, 1, 3, 2))
        tape.append(torch.ones(1, 1, 1, 2))
    with torch.no_grad():
        tape.append(torch.ones(1, 1, 1, 2))
    with torch.inference_mode():
        tape.select_rows(torch.tensor([0, 0]))
    with torch.no_grad():
        assert torch.equal(tape.append(torch.ones(2, 1, 1, 2)), torch.ones(2, 1, 6, 2))


@torch.no_grad()
def test_selected_rows_go_on_in_the_spare_room():
    tape = Tape()
    for slots in (100, 1):
        tape.append(torch.randn(2, 1, slots, 4))
    address = tape.select_rows(torch.tensor([1, 0])).data_ptr()
    assert tape.append(torch.randn(2, 1, 1, 4)).data_ptr() == address


def test_gradients_flow_through_what_is_stored():
    tape = Tape()
    first = torch.ones(1, 1, 1, 2, requires_grad=True)
    tape.append(first)
    tape.append(torch.ones(1, 1, 1, 2))
    tape.append(torch.ones(1, 1, 1, 2)).sum().backward()
    assert torch.equal(first.grad, torch.ones_like(first))


@torch.no_grad()
def test_what_is_held_with_room_goes_on_in_it():
    tape, room = Tape(), spare_room(50, 9)
    assert room == 9
    store = torch.randn(1, 2, 50 + room, 4)
    assert torch.equal(tape.hold(store, 50), store[:, :, :50])
    for slots in range(51, 60):
        new = torch.randn(1, 2, 1, 4)
        assert torch.equal(tape.append(new, 9)[:, :, -1:], new)
        assert (tape.length, tape.view.data_ptr()) == (slots, store.data_ptr())
    assert tape.append(torch.randn(1, 2, 1, 4), 9).data_ptr() != store.data_ptr()


def test_no_room_is_made_where_nothing_may_be_written_to_it():
    assert spare_room(5_000, 100) == 0  # a backward pass may need what is stored
    with torch.no_grad():
        assert [spare_room(5_000, most) for most in (0, 1, 2, 100)] == [0, 0, 2, 78]


@torch.no_grad()
def test_a_copy_writes_to_room_of_its_own():
    tape = Tape()
    for slots in (100, 1, 1):
        tape.append(torch.zeros(1, 1, slots, 4))
    twin = copy.deepcopy(tape)
    twin.append(torch.ones(1, 1, 1, 4))
    tape.append(torch.full((1, 1, 1, 4), 2.0))
    assert (twin.view[..., -1, :].unique().tolist(), tape.view[..., -1, :].unique().tolist()) == ([1.0], [2.0])
    assert twin.nbytes == tape.nbytes


def test_room_made_in_inference_mode_is_written_to_outside():
    tape = Tape()
    with torch.inference_mode():
        for slots in (100, 1, 1):
            tape.append(torch.zeros(1, 1, slots, 4))
    address = tape.view.data_ptr()
    with torch.no_grad():
        assert tape.append(torch.ones(1, 1, 1, 4))[0, 0, -1].tolist() == [1.0] * 4
    assert tape.view.data_ptr() == address

"""Slots: what is held is not free, and comes back whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herder_agent.core.slots import Request, Slot, Slots

GIB = 1 << 30


def test_lower_cores_are_taken_first_and_come_back() -> None:
    slots = Slots.of(4, GIB)
    first, second = slots.take(Request(1)), slots.take(Request(2))
    assert first is not None
    assert second is not None
    assert (first.indices, second.indices) == ((0,), (1, 2))
    slots.give_back(first)
    third = slots.take(Request(2))
    assert third is not None
    assert third.indices == (0, 3)
    assert slots.take(Request(1)) is None


def test_fractions_share_the_fullest_core_that_has_room() -> None:
    slots = Slots.of(2, GIB)
    taken = [slots.take(Request(0.25)) for _ in range(4)]
    assert [slot and slot.indices for slot in taken] == [(0,)] * 4
    more = slots.take(Request(0.5))
    assert more is not None
    assert more.indices == (1,)
    assert slots.take(Request(1)) is None


def test_ten_tenths_fill_a_core_exactly() -> None:
    slots = Slots.of(1, GIB)
    assert all(slots.take(Request(0.1)) is not None for _ in range(10))
    assert slots.take(Request(0.1)) is None


def test_memory_gpus_and_named_resources_are_held_too() -> None:
    slots = Slots.of(4, GIB, 2, {"licence": 1.0})
    slot = slots.take(Request(1, GIB // 2, 1, (("licence", 1.0),)))
    assert slot is not None
    assert slot.gpus == (0,)
    assert slots.take(Request(1, GIB)) is None
    assert slots.take(Request(1, 0, 2)) is None
    assert slots.take(Request(1, 0, 0, (("licence", 0.5),))) is None
    slots.give_back(slot)
    assert slots.take(Request(1, GIB, 2, (("licence", 1.0),))) is not None


def test_what_the_node_could_never_hold_is_known() -> None:
    slots = Slots.of(2, GIB, 1, {"licence": 1.0})
    assert slots.could_ever(Request(2, GIB, 1, (("licence", 1.0),)))
    for request in (Request(3), Request(1, 2 * GIB), Request(1, 0, 2), Request(1, 0, 0, (("other", 1.0),))):
        assert not slots.could_ever(request)


@given(st.lists(st.one_of(st.sampled_from([0.1, 0.25, 0.5, 1, 1.5, 2, 3]), st.none()), max_size=60))
def test_no_core_is_held_twice_and_all_come_back(moves: list[float | None]) -> None:
    slots = Slots.of(4, GIB)
    held: list[Slot] = []
    for cores in moves:
        if cores is None:
            if held:
                slots.give_back(held.pop(0))
            continue
        slot = slots.take(Request(cores))
        if slot is not None:
            held.append(slot)
        whole = [index for each in held for index in each.whole]
        assert len(whole) == len(set(whole))
        for index in range(4):
            share = sum(each.share for each in held if each.shared == index)
            assert share <= 1 + 1e-6
            assert not (share and index in whole)
        assert slots.used == pytest.approx(sum(each.request.cores for each in held))
    for slot in held:
        slots.give_back(slot)
    assert sorted(slots.free) == [0, 1, 2, 3]
    assert slots.shares == {}

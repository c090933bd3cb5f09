"""Slots: what is held is not free, and comes back whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herder_agent.core.slots import Place, Request, Slot, Slots, choose

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


#: Two NUMA nodes of two cores of two siblings each, listed as an agent lists them: indices 0 and 2 share a core.
TWO_NODES = tuple(Place(numa, 10 * numa + core) for numa in (0, 1) for _ in range(2) for core in (0, 1))


def test_cores_of_one_attempt_lie_on_one_node_with_siblings_together() -> None:
    slots = Slots.of(8, GIB, places=TWO_NODES)
    taken = [slots.take(Request(count)) for count in (2, 4, 2)]
    assert [slot and slot.whole for slot in taken] == [(0, 2), (4, 5, 6, 7), (1, 3)]


def test_tasks_of_one_core_share_a_core_last() -> None:
    slots = Slots.of(8, GIB, places=TWO_NODES)
    taken = [slots.take(Request(1)) for _ in range(4)]
    assert [slot and slot.whole for slot in taken] == [(0,), (1,), (2,), (3,)]
    assert len({TWO_NODES[slot.whole[0]].core for slot in taken[:2] if slot}) == 2


@pytest.mark.parametrize(
    ("free", "count", "chosen"),
    [
        # The node that fits best, though the other has more.
        ((1, 3, 4, 5, 6, 7), 2, (1, 3)),
        # A core that is free as a whole, though a lower index is free.
        ((0, 1, 3), 2, (1, 3)),
        # What does not fill a core goes where one is used already.
        ((2, 1, 3), 3, (1, 2, 3)),
        ((0, 5, 7, 6), 3, (5, 6, 7)),
        # More than a node has: the one with most first.
        ((0, 4, 5, 6, 7), 5, (0, 4, 5, 6, 7)),
        ((0, 1, 2, 4, 5), 4, (0, 1, 2, 4)),
    ],
)
def test_choice_is_as_near_as_can_be(free: tuple[int, ...], count: int, chosen: tuple[int, ...]) -> None:
    assert choose(free, count, TWO_NODES) == chosen


def test_more_slots_than_cpus_go_round_them() -> None:
    slots = Slots.of(16, GIB, places=TWO_NODES)
    slot = slots.take(Request(8))
    assert slot is not None
    assert {slots.places[index].numa for index in slot.whole} == {0}


@given(st.sets(st.integers(0, 7), min_size=1), st.data())
def test_choice_is_of_what_is_free_and_complete(free: set[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(free)))
    chosen = choose(sorted(free), count, TWO_NODES)
    assert len(set(chosen)) == count
    assert set(chosen) <= free
    on_one = any(sum(TWO_NODES[index].numa == numa for index in free) >= count for numa in (0, 1))
    assert len({TWO_NODES[index].numa for index in chosen}) == 1 or not on_one

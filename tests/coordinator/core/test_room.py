"""Kept terminal records are what a list and a dictionary would say, wherever they lie; memory keeps to its budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herder_coordinator.core import events
from herder_coordinator.core.room import Ends, Recent, Room, end_size_bytes
from herder_shared.ids import BlobId, JobId
from herder_shared.states import Outcome
from herder_shared.wire.messages import Payload, TaskEnd, TaskItem
from support.core_lab import CLIENT, JOB, Lab, starts, success
from support.shelf import MemoryShelf


def end(index: int, value: bytes = b"", blob: str | None = None) -> TaskEnd:
    return TaskEnd(index, Outcome.SUCCEEDED, Payload(value, BlobId(blob) if blob else None))


actions = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 9)),
    st.tuples(st.just("forget"), st.integers(0, 9)),
    st.tuples(st.just("drop"), st.integers(0, 7)),
    st.tuples(st.just("clear"), st.just(0)),
)


@given(
    what=st.lists(actions, max_size=40),
    first=st.integers(0, 5),
    block=st.integers(1, 4),
    room_for=st.integers(0, 6),
    ends_bytes=st.sampled_from([0, 2_000, 10_000]),
)
def test_records_are_found_by_cursor_and_by_index_wherever_they_lie(
    what: list[tuple[str, int]], first: int, block: int, room_for: int, ends_bytes: int
) -> None:
    shelf = MemoryShelf(room_for)
    room = Room(shelf, ends_bytes_max=ends_bytes, block_ends=block, job_ends_bytes=0)
    ends = Ends(room, first)
    plain: list[TaskEnd] = []
    counts: dict[int, TaskEnd] = {}
    number = 0
    for action, argument in what:
        if action == "add":
            number += 1
            one = end(argument, b"%d" % number, f"blob{number}" if number % 3 == 0 else None)
            ends.add(one)
            plain.append(one)
            counts[argument] = one
        elif action == "forget":
            ends.forget(argument)
            counts.pop(argument, None)
        elif action == "drop":
            dropped = ends.drop(first + argument)
            assert dropped == [(one, counts.get(one.index) == one) for one in plain[: len(dropped)]]
            assert len(dropped) == min(argument, len(plain))
            for one, counted in dropped:
                if counted:
                    del counts[one.index]
            del plain[: len(dropped)]
            first += len(dropped)
        else:
            assert ends.clear() == [one for one in plain if one.result is not None and one.result.blob is not None]
            first += len(plain)
            plain.clear()
            counts.clear()
        assert (ends.first, len(ends), list(ends)) == (first, len(plain), plain)
        assert list(ends.between(first + 1, first + 3)) == plain[1:3]
        for index in range(10):
            assert (ends.get(index), ends.has(index)) == (counts.get(index), index in counts)
        assert 0 <= room.ends_bytes <= sum(map(end_size_bytes, plain))
    ends.clear()
    assert (room.ends_bytes, shelf.contents) == (0, {})


@given(
    what=st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0, 0, 300, 5_000]), st.booleans()), max_size=40),
    bytes_max=st.sampled_from([0, 1_500, 4_000]),
    ends_max=st.sampled_from([1, 4, 100]),
)
def test_the_newest_acknowledged_records_are_kept_within_bounds(
    what: list[tuple[int, int, bool]], bytes_max: int, ends_max: int
) -> None:
    recent = Recent(bytes_max, ends_max)
    blobs: list[BlobId] = []
    for number, (index, size_bytes, is_blob) in enumerate(what):
        key = (JobId(f"job{number}"), index)
        blob = BlobId(f"blob{number}") if is_blob else None
        value = Payload(b"" if is_blob else bytes(size_bytes), blob, size_bytes)
        one = TaskEnd(index, Outcome.SUCCEEDED, value)
        blobs += [blob] if blob else []
        for gone in recent.add(key, one):
            blobs.remove(gone)
        assert len(recent) <= ends_max
        assert recent.size_bytes <= bytes_max
        assert recent.get(key) == (one if key in recent else None)
        kept = list(recent.items())
        assert [each for each, _ in kept] == list(recent) == [(JobId(f"job{n}"), what[n][0]) for n in numbers(recent)]
        assert [one.result.blob for _, one in kept if one.result and one.result.blob] == blobs
    for key in list(recent):
        recent.pop(key)
    assert recent.size_bytes == 0


def numbers(recent: Recent) -> list[int]:
    """Ascending, as they came."""
    return sorted(int(job.removeprefix("job")) for job, _ in recent)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    """With memory for about ten tasks and ten records, and blocks of four."""
    monkeypatch.setattr(
        Lab,
        "new_room",
        lambda: Room(MemoryShelf(), queued_bytes_max=2_000, ends_bytes_max=7_000, block_ends=4, job_ends_bytes=0),
    )
    lab = Lab()
    lab.client()
    return lab


def shelf_of(lab: Lab) -> MemoryShelf:
    assert isinstance(lab.state.room.shelf, MemoryShelf)
    return lab.state.room.shelf


def submit(lab: Lab, count: int) -> None:
    """In fives."""
    lab.open()
    for _ in range(0, count, 5):
        lab.submit(5)


def test_what_is_submitted_beyond_the_budget_waits_on_the_shelf_and_is_started_in_order(lab: Lab) -> None:
    submit(lab, 100)
    assert lab.state.room.queued_bytes <= 2_000
    assert len(shelf_of(lab).contents) == 18
    orders = lab.node(cores=1)
    started: list[bytes] = []
    while lab.state.jobs[JOB].ended < 100:
        for _, start, _ in starts(orders):
            started.append(start.args.inline)
        orders = lab.ended(*(success(start.attempt, start.index) for _, start, _ in starts(orders)))
        assert lab.state.room.queued_bytes <= 3_000
    assert started == [b"job1.%d" % index for index in range(100)]
    assert lab.state.room.queued_bytes == 0
    assert lab.state.room.ends_bytes <= 7_000 + 4 * 700
    assert [end.index for end in lab.state.jobs[JOB].ends] == list(range(100))


def test_a_job_that_is_cancelled_leaves_nothing_on_the_shelf(lab: Lab) -> None:
    submit(lab, 100)
    lab.do(events.CancelRequested(CLIENT, JOB, None, running=True))
    lab.do(events.JobClosed(CLIENT, JOB, 100))
    lab.do(events.EventsAcked(CLIENT, JOB, 100))
    assert JOB not in lab.state.jobs
    assert (shelf_of(lab).contents, lab.state.room.queued_bytes, lab.state.room.ends_bytes) == ({}, 0, 0)


def test_where_the_shelf_has_no_room_all_stays_in_memory(lab: Lab) -> None:
    shelf_of(lab).room_for = 3
    submit(lab, 100)
    assert len(shelf_of(lab).contents) == 3
    assert lab.state.room.queued_bytes == pytest.approx(85 * 176, rel=0.05)


def test_tasks_with_blobs_stay_in_memory_and_release_them(lab: Lab) -> None:
    lab.open()
    lab.submit(30)
    lab.submit(items=[TaskItem(Payload(blob=BlobId("b1"), size_bytes=99))] * 20)
    assert [chunk.ticket is None for chunk in lab.state.jobs[JOB].chunks] == [False, True]
    lab.cancel()
    assert lab.state.blobs == {}


def test_a_life_takes_over_what_lay_on_the_shelf(lab: Lab) -> None:
    submit(lab, 60)
    lab.node(cores=1)
    lab.restart(by_snapshot=True)
    assert lab.state.jobs[JOB].pending == 59
    lab.restart()
    assert lab.state.jobs[JOB].pending == 59

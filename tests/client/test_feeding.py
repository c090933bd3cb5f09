"""Calls become batches: in order, with indices of their own, and with all that travels beside them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import cast

import pytest

from herder import feeding
from herder.calls import Call
from herder.connection import Connection
from herder.feeding import Feeder, feed
from herder.jobs import Record
from herder.outbox import Batch
from herder.payload import DependencyEnded, PickledFunction
from herder.tracks import Track
from herder_shared.errors import Unreachable
from herder_shared.ids import BlobId, JobId, WorkloadKey
from herder_shared.limits import ARRAY_TASKS_MAX, BATCH_BYTES_MAX, BATCH_TASKS_MAX
from herder_shared.states import Cause, Outcome
from herder_shared.wire import messages as m

JOB = JobId("j")
FUNCTION = PickledFunction(m.Function(BlobId("f"), b"f"), None, (), False, "f")
SPEC = m.JobSpec(JOB, "name", m.WorkloadSpec(WorkloadKey("w")))


class Heard:
    """Stands for the connection: takes what is said. `refusal` is raised instead of taking a batch."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.batches: list[Batch] = []
        self.refusal: Exception | None = None
        #: Told while a batch is being taken, as soon as that may be.
        self.ends: list[m.TaskEnd] = []

    def submit(self, track: Track, batch: Batch, admit: Callable[[int], None]) -> None:
        if self.refusal is not None:
            raise self.refusal
        batch.first = track.submitted_count
        track.submitted_count += len(batch.items)
        admit(batch.first)
        track.sink.ended(self.ends)
        self.batches.append(batch)
        self.said.append(f"submit {batch.first}+{len(batch.items)}")

    def cancel(self, _job: JobId, indices: tuple[int, ...] | None, *, running: bool) -> None:
        self.said.append(f"cancel {'all' if indices is None else indices} {running}")

    def close_job(self, _track: Track) -> None:
        self.said.append("close")


class Lane:
    """A feeder and what is around it."""

    def __init__(self) -> None:
        self.heard = Heard()
        self.record = Record("python")
        self.feeder = Feeder(cast("Connection", self.heard), Track(JOB, self.record, SPEC), self.record)


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> Lane:
    """Nothing is sent because of the time that has passed."""
    monkeypatch.setattr(feeding, "_FEED_INTERVAL_S", float("inf"))
    return Lane()


def call(*, size: int = 1, python: str = "", blob: bool = False, ended: DependencyEnded | None = None) -> Call:
    item = m.TaskItem(m.Payload(inline=b"x", size_bytes=1))
    return Call(item, FUNCTION, python, size, [(JOB, 0)], [(BlobId("b"), b"content")] if blob else [], ended)


def test_calls_become_one_batch_and_the_job_is_closed_behind_it(lane: Lane) -> None:
    feed(lane.feeder, [call(size=size) for size in (1, 2, 3)])
    assert lane.heard.said == ["submit 0+3", "close"]
    assert (lane.heard.batches[0].size_bytes, len(lane.heard.batches[0].claims)) == (6, 3)
    assert (lane.record.total, lane.record.feed_error, lane.feeder.is_finished) == (3, None, True)


def test_job_without_tasks_is_closed(lane: Lane) -> None:
    feed(lane.feeder, [])
    assert lane.heard.said == ["close"]
    assert lane.record.total == 0


def test_batches_are_bounded_by_tasks_and_by_bytes(lane: Lane) -> None:
    feed(lane.feeder, (call() for _ in range(BATCH_TASKS_MAX + 1)))
    assert lane.heard.said == [f"submit 0+{BATCH_TASKS_MAX}", f"submit {BATCH_TASKS_MAX}+1", "close"]
    other = Lane()
    feed(other.feeder, [call(size=BATCH_BYTES_MAX), call()])
    assert other.heard.said == ["submit 0+1", "submit 1+1", "close"]


def test_first_tasks_leave_while_the_rest_is_pickled(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = iter([10.0, 10.0, 10.1, 20.0, 20.0])
    monkeypatch.setattr(feeding, "_FEED_INTERVAL_S", 1.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(now_s))
    for _ in range(3):
        lane.feeder.add(call())
    assert lane.heard.said == ["submit 0+1", "submit 1+2"]


def test_blobs_and_other_interpreters_need_batches_of_their_own(lane: Lane) -> None:
    feed(lane.feeder, [call(), call(blob=True), call(), call(python="3.12/3.1")])
    assert lane.heard.said == ["submit 0+1", "submit 1+1", "submit 2+1", "submit 3+1", "close"]
    assert [(bool(batch.blobs), batch.python) for batch in lane.heard.batches] == [
        (False, ""),
        (True, ""),
        (False, ""),
        (False, "3.12/3.1"),
    ]


def test_task_whose_dependency_has_failed_ends_here_and_is_cancelled_there(lane: Lane) -> None:
    failure = ValueError("upstream")
    lane.feeder.add(call())
    lane.feeder.add(call(ended=DependencyEnded(failure)))
    lane.feeder.add(call(ended=DependencyEnded(None)))
    lane.feeder.flush()
    lane.feeder.add(call(ended=DependencyEnded(failure)))
    lane.feeder.finish(None)
    assert lane.heard.said == ["submit 0+3", "cancel (1, 2) True", "submit 3+1", "cancel (3,) True", "close"]
    track = Track(JOB, lane.record, SPEC)
    assert [lane.record.outcome(index, track) for index in (1, 2, 3)] == [
        (None, failure, False),
        (None, None, True),
        (None, failure, False),
    ]


def test_task_that_ended_here_is_not_counted_again_however_soon_the_coordinator_says_that_it_failed(lane: Lane) -> None:
    lane.heard.ends = [m.TaskEnd(0, Outcome.FAILED, failure=m.Failure(Cause.EXCEPTION, "cannot be unpickled"))]
    failure = ValueError("upstream")
    feed(lane.feeder, [call(ended=DependencyEnded(failure))])
    assert lane.record.outcome(0, Track(JOB, lane.record, SPEC)) == (None, failure, False)
    assert lane.record.outcome_counts[Outcome.FAILED] == 1


def test_error_of_the_iterable_is_kept_for_the_reader_and_ends_the_feeding(lane: Lane) -> None:
    def calls() -> Iterator[Call]:
        yield call()
        raise ValueError("from the iterable")

    feed(lane.feeder, calls())
    assert lane.heard.said == ["close"]
    assert isinstance(lane.record.feed_error, ValueError)
    assert lane.record.total == 0


def test_lost_connection_is_told_by_the_job(lane: Lane) -> None:
    lane.heard.refusal = Unreachable("gone")
    feed(lane.feeder, [call()])
    assert lane.record.feed_error is lane.heard.refusal


def test_stopped_job_takes_no_more_and_cancels_what_was_fed_meanwhile(lane: Lane) -> None:
    taken = []

    def calls() -> Iterator[Call]:
        for number in range(10):
            taken.append(number)
            if number == 2:
                lane.record.stop(running=True)
            yield call()

    feed(lane.feeder, calls())
    assert taken == [0, 1, 2]
    assert lane.heard.said == ["submit 0+2", "close", "cancel all True"]


def test_an_array_has_a_bound(lane: Lane) -> None:
    lane.record.submitted_count = ARRAY_TASKS_MAX - 1
    lane.feeder.add(call())
    with pytest.raises(ValueError, match=r"an array job may have [\d,]+ tasks; split this one"):
        lane.feeder.add(call())

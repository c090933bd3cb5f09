"""Events are acknowledged only as far as nobody needs what is before."""

from __future__ import annotations

from herder.jobs import Record
from herder.tracks import Shared, Sink, Track
from herder_shared.ids import JobId, WorkloadKey
from herder_shared.states import Outcome
from herder_shared.wire.messages import JobSpec, TaskEnd, WorkloadSpec

SPEC = JobSpec(JobId("j"), "name", WorkloadSpec(WorkloadKey("w")))


def test_held_ends_hold_back_the_acknowledgement() -> None:
    track = Track(SPEC.job, Record("python"), SPEC)
    track.cursor = 10
    assert track.ackable == 10
    track.held = {3: 4, 5: 7}
    assert track.ackable == 4
    del track.held[3]
    assert track.ackable == 7


def test_claims_are_counted() -> None:
    track = Track(SPEC.job, Record("python"), SPEC)
    track.claim(1)
    track.claim(1)
    assert not track.unclaim(1)
    assert track.claims == {1: 1}
    assert track.unclaim(1)
    assert track.claims == {}
    assert track.unclaim(1)


def test_a_job_is_over_when_nothing_more_will_be_said_or_heard() -> None:
    track = Track(SPEC.job, Record("python"), SPEC)
    assert not track.is_over
    track.closed_count = 0
    assert [track.is_over, _over_after(track, unresolved_count=1), _over_after(track, unresolved_count=0)] == [
        True,
        False,
        True,
    ]
    assert [_over_after(track, cursor=1), _over_after(track, acked=1)] == [False, True]


def _over_after(track: Track, **changes: int) -> bool:
    for name, value in changes.items():
        setattr(track, name, value)
    return track.is_over


def test_an_observed_job_is_not_ours() -> None:
    assert Track(SPEC.job, Record("python"), None).is_observer
    assert not Track(SPEC.job, Record("python"), SPEC).is_observer


def test_who_asks_for_a_job_again_and_again_leaves_nothing_behind() -> None:
    own = Record("python")
    sink: Sink = own
    for _ in range(5):
        another = Record("python")
        sink = Shared(sink, another)
        another.hold()
        sink.ended([TaskEnd(0, Outcome.SUCCEEDED)])
        assert own.ended_among(1) == another.ended_among(1) == {0}
        another.let_go()
        assert not another.is_wanted
    assert len(Shared(sink, Record("python"))) == 2


def test_what_is_run_again_is_waited_for_once_however_often_it_is_heard() -> None:
    track = Track(SPEC.job, Record("python"), SPEC)
    track.unresolved_count = 2
    track.has_ended += bytes(2)
    counts = []
    for indices, ended in (([0, 1], True), ([1], False), ([1], False), ([1], True), ([1], True)):
        track.resolve(indices, ended=ended)
        counts.append(track.unresolved_count)
    assert counts == [0, 1, 1, 0, 0]


def test_what_was_acknowledged_is_not_asked_for_again() -> None:
    track = Track(SPEC.job, Record("python"), SPEC)
    track.cursor = track.acked = 3
    track.held[0] = 1
    assert track.ackable == 3

"""Clients ask, ask again, go and come back."""

from __future__ import annotations

import gc
from typing import Any

import msgspec
import pytest

from herder_coordinator.core import events, records
from herder_coordinator.core.effects import DropBlobs, Persist, SendToClient
from herder_coordinator.core.state import Job
from herder_shared import limits
from herder_shared.ids import BlobId, Incarnation, JobId, NodeName, WorkloadKey
from herder_shared.states import Cause, Outcome, TaskState
from herder_shared.wire.messages import (
    Answer,
    CancelAttempts,
    CancelOk,
    Payload,
    SubmitOk,
    SubmitRefused,
    TaskItem,
    TasksEnded,
    WorkloadSpec,
)
from support.core_lab import (
    CLIENT,
    FUNCTION,
    JOB,
    Lab,
    failed,
    item,
    job_spec,
    starts,
    success,
    to_agent,
    to_client,
    told_ends,
)

OTHER = Incarnation("client2")
N1 = NodeName("n1")


@pytest.fixture
def lab() -> Lab:
    lab = Lab()
    lab.client()
    lab.node()
    return lab


def end_all(lab: Lab, job: JobId = JOB) -> None:
    for attempt, task in list(lab.state.nodes[next(iter(lab.state.nodes))].attempts.items()):
        if task.job.id == job:
            lab.ended(success(attempt, task.index, job))


def test_what_is_said_again_is_acknowledged_again_and_exists_once(lab: Lab) -> None:
    spec = lab.open()
    lab.submit(3)
    assert to_client(lab.do(events.JobOpened(CLIENT, spec))) == [SubmitOk(JOB, 3)]
    assert to_client(lab.submit(3, first=0)) == [SubmitOk(JOB, 3)]
    assert lab.state.jobs[JOB].count == 3
    assert to_client(lab.submit(3, first=1)) == [SubmitOk(JOB, 4)]
    assert lab.state.jobs[JOB].count == 4


def test_a_gap_is_a_broken_protocol(lab: Lab) -> None:
    lab.open()
    (refused,) = to_client(lab.submit(1, first=5))
    assert (refused.first, refused.error) == (5, "RemoteProtocolError")


def test_an_unknown_job_takes_no_tasks(lab: Lab) -> None:
    some = lab.do(events.TasksSubmitted(CLIENT, JOB, 0, FUNCTION, (item(),), ""))
    assert [message.error for message in to_client(some)] == ["JobNotFound"]


def test_a_closed_job_takes_no_more_tasks(lab: Lab) -> None:
    lab.open()
    lab.submit(1)
    lab.do(events.JobClosed(CLIENT, JOB, 1))
    assert [message.error for message in to_client(lab.submit(1))] == ["RemoteProtocolError"]


def test_a_job_belongs_to_the_client_that_opened_it(lab: Lab) -> None:
    lab.open()
    lab.client(OTHER, owner="you", session=2)
    assert to_client(lab.do(events.JobOpened(OTHER, job_spec())), OTHER)[0].error == "Unauthorized"
    assert to_client(lab.submit(1, client=OTHER), OTHER)[0].error == "Unauthorized"
    cancel = events.CancelRequested(OTHER, JOB, None, running=True)
    assert to_client(lab.do(cancel), OTHER)[0].error == "Unauthorized"


def test_another_client_of_the_same_owner_may_cancel(lab: Lab) -> None:
    lab.open()
    lab.client(OTHER, session=2)
    assert to_client(lab.do(events.CancelRequested(OTHER, JOB, None, running=True)), OTHER) == [CancelOk(JOB, None)]
    assert lab.state.jobs[JOB].cancelled


def test_cancelling_what_is_unknown_is_fine(lab: Lab) -> None:
    some = lab.do(events.CancelRequested(CLIENT, JobId("ghost"), (1,), running=True))
    assert to_client(some) == [CancelOk(JobId("ghost"), (1,))]


def test_tasks_that_come_after_their_job_was_cancelled_are_cancelled(lab: Lab) -> None:
    lab.open()
    lab.do(events.CancelRequested(CLIENT, JOB, None, running=True))
    lab.submit(2)
    assert lab.outcomes() == {0: Outcome.CANCELLED, 1: Outcome.CANCELLED}


def test_too_many_tasks_are_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ARRAY_TASKS_MAX", 3)
    lab.open()
    assert [message.error for message in to_client(lab.submit(4))] == ["PayloadTooLarge"]


def test_a_reconnected_client_is_told_from_its_cursor_on_and_nothing_before_it_asked(lab: Lab) -> None:
    lab.open()
    lab.submit(2)
    lab.ended(success(lab.attempt(0), 0))
    lab.do(events.ClientDisconnected(CLIENT, 1))
    lab.client(session=2)
    assert told_ends(lab.ended(success(lab.attempt(1), 1))) == []
    (message,) = to_client(lab.do(events.Attached(CLIENT, JOB, 1)))
    assert isinstance(message, TasksEnded)
    assert (message.cursor, [end.index for end in message.ends]) == (1, [1])


def test_a_client_that_does_not_know_that_its_job_was_opened_is_told_all(lab: Lab) -> None:
    spec = lab.open()
    lab.submit(1)
    lab.ended(success(lab.attempt(0), 0))
    lab.client(session=2)
    assert [end.index for end in told_ends(lab.do(events.JobOpened(CLIENT, spec)))] == [0]


def test_a_slow_client_is_sent_a_window_only_and_the_rest_as_it_acknowledges(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("herder_coordinator.core.turn.FEED_TASKS_MAX", 3)
    lab.open()
    lab.submit(5)
    lab.do(events.CancelRequested(CLIENT, JOB, None, running=True))
    end_all(lab)
    job = lab.state.jobs[JOB]
    assert job.cursor == 5
    sent = job.feeds[CLIENT].sent
    assert sent < 5
    more = told_ends(lab.do(events.EventsAcked(CLIENT, JOB, sent)))
    assert len(more) == 5 - sent


def test_acknowledged_records_are_dropped_and_their_blobs_too_when_no_one_remembers_them(lab: Lab) -> None:
    lab.open()
    blob = BlobId("b1")
    lab.submit(items=[TaskItem(Payload(b"", blob, 100_000))])
    some = lab.ended(success(lab.attempt(0), 0))
    assert DropBlobs((blob,)) in some
    assert len(lab.state.jobs[JOB].ends) == 1
    assert lab.do(events.EventsAcked(CLIENT, JOB, 1)) == [Persist(records.EventsAcked(JOB, 1))]
    assert not len(lab.state.jobs[JOB].ends)
    assert list(lab.state.recent) == [(JOB, 0)]


def test_a_detached_job_keeps_its_records_and_outlives_its_client(lab: Lab) -> None:
    lab.open(detached=True)
    lab.submit(3)
    end_all(lab)
    lab.do(events.EventsAcked(CLIENT, JOB, 2))
    lab.do(events.ClientLeft(CLIENT))
    end_all(lab)
    assert set(lab.outcomes().values()) == {Outcome.SUCCEEDED}
    assert len(lab.state.jobs[JOB].ends) == 3
    lab.client(OTHER, session=5)
    ends = told_ends(lab.do(events.Attached(OTHER, JOB, 0)), OTHER)
    assert sorted(end.index for end in ends) == [0, 1, 2]


def test_a_client_that_says_goodbye_leaves_nothing_behind(lab: Lab) -> None:
    lab.open()
    lab.submit(4)
    lab.do(events.ClientLeft(CLIENT))
    assert sorted(lab.outcomes()) == [2, 3]
    lab.pass_time(0.5)
    end_all(lab)
    lab.pass_time(1.0)
    assert lab.state.jobs == {}
    assert lab.state.clients == {}
    assert lab.state.groups == {}


def test_a_vanished_clients_jobs_are_cancelled_after_the_grace(lab: Lab) -> None:
    lab.open()
    lab.submit(4)
    lab.do(events.ClientDisconnected(CLIENT, 1))
    for _ in range(29):
        lab.pass_time(2.0)
        lab.heard()
    assert lab.outcomes() == {}
    lab.pass_time(2.5)
    assert lab.outcomes() == {2: Outcome.CANCELLED, 3: Outcome.CANCELLED}


def test_a_client_that_is_back_within_the_grace_keeps_its_jobs(lab: Lab) -> None:
    lab.open()
    lab.submit(4)
    lab.do(events.ClientDisconnected(CLIENT, 1))
    lab.pass_time(20.0)
    lab.client(session=2)
    lab.pass_time(8.0)
    lab.heard()
    lab.pass_time(8.0)
    assert lab.outcomes() == {}


@pytest.mark.parametrize("restarts", [False, True])
def test_who_comes_later_is_told_what_was_delivered_before_as_far_as_it_is_kept(lab: Lab, restarts: bool) -> None:
    lab.open()
    lab.submit(3)
    lab.ended(success(lab.attempt(1), 1))
    lab.ended(success(lab.attempt(0), 0))
    lab.do(events.EventsAcked(CLIENT, JOB, 2))
    if restarts:
        lab.restart()
    lab.client(OTHER, session=2)
    ends = told_ends(lab.do(events.Attached(OTHER, JOB, 0)), OTHER)
    assert [end.index for end in ends] == [0, 1]
    assert {end.outcome for end in ends} == {Outcome.LOST if restarts else Outcome.SUCCEEDED}
    if not restarts:
        assert told_ends(lab.ended(success(lab.attempt(2), 2)), OTHER)[0].index == 2


def test_reading_on_where_nothing_is_kept_any_more_says_so(lab: Lab) -> None:
    lab.open()
    lab.submit(2)
    end_all(lab)
    lab.do(events.EventsAcked(CLIENT, JOB, 2))
    lab.client(OTHER, session=2)
    (refused,) = to_client(lab.do(events.Attached(OTHER, JOB, 1)), OTHER)
    assert isinstance(refused, SubmitRefused)
    assert refused.error == "DataLost"


def test_attaching_to_an_unknown_job_says_so(lab: Lab) -> None:
    (refused,) = to_client(lab.do(events.Attached(CLIENT, JobId("ghost"), 0)))
    assert refused.error == "JobNotFound"


def test_cancelling_20000_queued_tasks_is_one_step_with_bounded_records(lab: Lab) -> None:
    lab.open()
    lab.submit(20_000)
    some = lab.do(events.CancelRequested(CLIENT, JOB, None, running=True))
    batches = [effect.record for effect in some if isinstance(effect, Persist)]
    ends = [record for record in batches if isinstance(record, records.TasksEnded)]
    assert sum(len(record.ends) for record in ends) == 20_000 - 2
    assert max(len(record.ends) for record in ends) <= limits.BATCH_TASKS_MAX


def change_answer(some: list[Any]) -> Answer:
    (answer,) = [message for message in to_client(some) if isinstance(message, Answer)]
    return answer


def test_a_paused_job_starts_nothing_until_it_is_resumed(lab: Lab) -> None:
    lab.node(session=2, cores=1)
    lab.open()
    lab.submit(3)
    some = lab.change(paused=True)
    assert some[0] == Persist(records.JobChanged(JOB, paused=True, priority=0))
    assert change_answer(some).jobs is not None
    lab.ended(success(lab.attempt(0), 0), session=2)
    lab.submit(1)
    assert [lab.place(index) for index in (1, 2, 3)] == [None] * 3
    assert len(starts(lab.change(paused=False))) == 1


def test_a_pause_recalls_what_was_sent_ahead(lab: Lab) -> None:
    lab.node(session=2, cores=1)
    lab.open()
    lab.submit(10)
    lab.ended(success(lab.attempt(0), 0, wall_s=0.01), session=2)
    ahead = list(lab.state.nodes[N1].ahead)
    assert ahead
    some = lab.change(paused=True)
    assert CancelAttempts(tuple(ahead), limits.KILL_GRACE_S, waiting_only=True) in to_agent(some)
    task = lab.state.nodes[N1].attempts[ahead[0]]
    lab.ended(failed(ahead[0], Cause.CANCELLED, Outcome.CANCELLED, task.index), session=2)
    assert lab.outcomes() == {0: Outcome.SUCCEEDED}
    assert (task.state, task.ordinal) == (TaskState.PENDING, 0)


def test_a_pause_and_a_priority_survive_restarts(lab: Lab) -> None:
    lab.node(session=2, cores=1)
    lab.open(detached=True)
    lab.submit(3)
    lab.change(paused=True, priority=5)
    for by_snapshot in (False, True):
        lab.restart(by_snapshot=by_snapshot)
        job = lab.state.jobs[JOB]
        assert (job.paused, job.priority, job.group.key.priority) == (True, 5, 5)
        assert not lab.state.busy


def test_another_priority_moves_what_is_pending(lab: Lab) -> None:
    job2 = JobId("job2")
    lab.do(events.AgentDisconnected(N1, 1))
    lab.open(JOB)
    lab.submit(2, JOB)
    lab.open(job2)
    lab.submit(2, job2)
    lab.change(job2, priority=3)
    assert [start.job for _, start, _ in starts(lab.node(session=2, cores=2))] == [job2, job2]


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "n" * 1_000_000},
        {"workload": WorkloadSpec(WorkloadKey("w1"), name="w" * 201)},
        {"tags": ("t" * 201,)},
        {"tags": tuple(map(str, range(65)))},
    ],
    ids=["name", "workload", "tag", "tags"],
)
def test_names_that_nobody_would_read_are_refused_and_not_kept(lab: Lab, changes: dict[str, Any]) -> None:
    (refused,) = lab.do(events.JobOpened(CLIENT, msgspec.structs.replace(job_spec(), **changes)))
    assert isinstance(refused, SendToClient)
    assert isinstance(refused.message, SubmitRefused)
    assert refused.message.error == "PayloadTooLarge"
    assert len(refused.message.message) < 300
    assert not lab.state.jobs


def test_a_job_of_somebody_else_is_not_cancelled(lab: Lab) -> None:
    lab.open()
    lab.submit(1)
    eve = Incarnation("eve")
    lab.client(eve, owner="eve", session=9)
    (refused,) = to_client(lab.do(events.CancelRequested(eve, JOB, None, running=True)), eve)
    assert (refused.error, lab.outcomes()) == ("Unauthorized", {})
    assert not lab.state.jobs[JOB].cancelled
    some = lab.do(events.CancelRequested(eve, JOB, None, running=True, is_admin=True))
    assert to_client(some, eve) == [CancelOk(JOB, None)]
    assert lab.state.jobs[JOB].cancelled


def test_a_change_of_an_unknown_or_a_foreign_job_is_refused(lab: Lab) -> None:
    other = Incarnation("client2")
    lab.client(other, owner="you", session=2)
    lab.open()
    assert change_answer(lab.change(JobId("none"), paused=True)).error == "JobNotFound"
    some = lab.change(client=other, paused=True)
    (answer,) = [message for message in to_client(some, other) if isinstance(message, Answer)]
    assert answer.error == "Unauthorized"
    lab.do(events.JobChangeRequested(other, 1, JOB, None, 4, is_admin=True))
    assert lab.state.jobs[JOB].priority == 4


def test_what_comes_for_a_job_that_was_given_up_while_its_client_was_away_is_refused(lab: Lab) -> None:
    lab.client()
    lab.open()
    lab.do(events.ClientDisconnected(CLIENT, 1))
    lab.pass_time(61.0)
    assert list(lab.state.summaries) == [JOB]
    lab.client(session=2)
    late = lab.do(events.TasksSubmitted(CLIENT, JOB, 0, FUNCTION, (item(),), ""))
    assert [(one.error, one.first) for one in to_client(late)] == [("JobNotFound", 0)]
    assert [one.error for one in to_client(lab.do(events.JobClosed(CLIENT, JOB, 1)))] == ["JobNotFound"]
    assert to_client(lab.do(events.JobClosed(CLIENT, JOB, 0))) == [SubmitOk(JOB, 0)]


@pytest.mark.parametrize("restarts", [False, True])
def test_a_client_says_how_long_its_jobs_go_on_without_it(restarts: bool) -> None:
    lab = Lab()
    lab.node()
    lab.do(events.ClientConnected(CLIENT, 1, "me", grace_s=5.0))
    lab.open()
    lab.submit(3)
    if restarts:
        lab.restart(by_snapshot=True)
    else:
        lab.do(events.ClientDisconnected(CLIENT, 1))
    lab.pass_time(4.5)
    assert not lab.state.jobs[JOB].cancelled
    lab.pass_time(1.0)
    assert lab.state.jobs[JOB].cancelled


def test_a_forgotten_job_is_freed_without_the_garbage_collector(lab: Lab) -> None:
    gc.collect()
    gc.disable()
    try:
        for number in range(10):
            job = JobId(f"job{number}")
            lab.open(job, retries=1)
            orders = lab.submit(4, job)
            first, *others = (start for _, start, _ in starts(orders))
            orders = lab.ended(failed(first.attempt, Cause.EXCEPTION, index=first.index, job=job))
            for start in (*others, *(start for _, start, _ in starts(orders))):
                lab.ended(success(start.attempt, start.index, job))
            while job_state := [task for task in lab.state.jobs[job].tasks.values() if task.node is not None]:
                lab.ended(*(success(task.attempt, task.index, job) for task in job_state))
            lab.do(events.JobClosed(CLIENT, job, 4))
            lab.do(events.EventsAcked(CLIENT, job, 4))
            assert job not in lab.state.jobs
        del job_state
        assert not [each for each in gc.get_objects() if isinstance(each, Job)]
    finally:
        gc.enable()

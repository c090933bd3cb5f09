"""Failed tasks are run again when somebody asks for that."""

from __future__ import annotations

from typing import Any

import pytest

from herder_coordinator.core import apply, clients, events
from herder_shared.ids import BlobId, Incarnation
from herder_shared.states import Cause, Outcome, TaskState
from herder_shared.wire.messages import Answer, Payload, TaskItem, TasksEnded, TasksReset
from support.core_lab import CLIENT, JOB, Lab, failed, item, starts, success, to_client, told_ends

OTHER = Incarnation("client2")


@pytest.fixture
def lab() -> Lab:
    """Of three tasks the first two have failed, and all is acknowledged; the job is closed."""
    lab = Lab()
    lab.client()
    lab.node(cores=3)
    lab.open()
    lab.submit(3)
    first, second, third = (lab.attempt(index) for index in range(3))
    lab.ended(failed(first, Cause.EXCEPTION), failed(second, Cause.EXIT, Outcome.CRASHED, 1), success(third, 2))
    lab.do(events.JobClosed(CLIENT, JOB, 3))
    lab.do(events.EventsAcked(CLIENT, JOB, 3))
    return lab


def retry(lab: Lab, client: Incarnation = CLIENT) -> Any:
    return lab.do(events.RetryRequested(client, 7, JOB))


def answer(some: Any, client: Incarnation = CLIENT) -> Answer:
    (found,) = [message for message in to_client(some, client) if isinstance(message, Answer)]
    return found


def test_what_has_failed_begins_anew_and_ends_once_more(lab: Lab) -> None:
    some = retry(lab)
    assert to_client(some) == [TasksReset(JOB, (0, 1)), Answer(7, count=2)]
    assert [order[1].ordinal for order in starts(some)] == [2, 2]
    told = [end for index in range(2) for end in told_ends(lab.ended(success(lab.attempt(index), index)))]
    assert [(end.index, end.outcome) for end in told] == [(0, Outcome.SUCCEEDED), (1, Outcome.SUCCEEDED)]
    lab.do(events.EventsAcked(CLIENT, JOB, 5))
    assert JOB not in lab.state.jobs
    assert lab.state.summaries[JOB].outcomes == {Outcome.SUCCEEDED: 3}


def test_asked_twice_it_finds_nothing_the_second_time(lab: Lab) -> None:
    retry(lab)
    assert answer(retry(lab)) == Answer(7, count=0)


def test_the_job_is_kept_while_its_client_is_there(lab: Lab) -> None:
    assert JOB in lab.state.jobs
    lab.do(events.ClientLeft(CLIENT))
    lab.pass_time(1)
    assert JOB not in lab.state.jobs
    assert not lab.state.spent_bytes
    assert answer(retry(lab)).error == "JobNotFound" if CLIENT in lab.state.clients else True


@pytest.mark.parametrize("by_snapshot", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_a_restart_forgets_neither_what_can_be_run_again_nor_what_is(lab: Lab, by_snapshot: bool, asked: bool) -> None:
    if asked:
        retry(lab)
    lab.restart(by_snapshot=by_snapshot)
    assert lab.state.jobs[JOB].resets == (2 if asked else 0)
    lab.client(session=2)
    if not asked:
        assert answer(retry(lab)).count == 2
    states = {index: task.state for index, task in lab.state.jobs[JOB].tasks.items()}
    assert set(states) == {0, 1}
    assert states[0] in {TaskState.PENDING, TaskState.ASSIGNED}


def test_a_dependant_waits_for_what_is_run_again_with_it() -> None:
    lab = Lab()
    lab.client()
    lab.node()
    lab.open()
    lab.submit(items=[item(JOB, 0), item(JOB, 1, deps=[(JOB, 0)])])
    lab.ended(failed(lab.attempt(), Cause.EXCEPTION))
    assert lab.failure(1).cause is Cause.DEPENDENCY_FAILED
    assert answer(retry(lab)).count == 2
    assert lab.state.jobs[JOB].tasks[1].state is TaskState.WAITING
    (order,) = starts(lab.ended(success(lab.attempt())))
    assert order[1].deps == ((JOB, 0, Payload(b"value of 0")),)


def test_its_blobs_stay_as_long_as_it_can_be_run_again() -> None:
    lab = Lab()
    lab.client()
    lab.node()
    blob = BlobId("b" * 40)
    lab.open()
    lab.submit(items=[TaskItem(Payload(blob=blob, size_bytes=1000))])
    lab.ended(failed(lab.attempt(), Cause.EXCEPTION))
    assert blob in lab.state.blobs
    retry(lab)
    assert lab.state.blobs[blob] == 1
    lab.ended(success(lab.attempt()))
    assert blob not in lab.state.blobs


def test_others_may_not_and_what_was_cancelled_is_not(lab: Lab) -> None:
    lab.client(OTHER, owner="somebody else", session=2)
    assert answer(retry(lab, OTHER), OTHER).error == "Unauthorized"
    lab.client(Incarnation("client3"), owner="me", session=3)
    lab.do(events.CancelRequested(CLIENT, JOB, None, running=True))
    assert answer(retry(lab, Incarnation("client3")), Incarnation("client3")).error == "HerderError"


def test_what_may_run_once_is_not_run_again_where_nobody_knows_how_it_ended() -> None:
    lab = Lab()
    lab.client()
    lab.node()
    lab.open(idempotent=False)
    lab.submit(2)
    lab.started(lab.attempt(0), lab.attempt(1))
    lab.ended(failed(lab.attempt(1), Cause.EXCEPTION, index=1))
    lab.node(session=2, incarnation="another")
    assert lab.outcomes()[0] is Outcome.LOST
    some = retry(lab)
    assert to_client(some) == [TasksReset(JOB, (1,)), Answer(7, count=1)]


def test_arguments_of_failed_tasks_are_bounded(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply, "SPENT_BYTES_MAX", lab.state.spent_bytes)
    lab.open("job2")  # type: ignore[arg-type]
    lab.submit(1, "job2")  # type: ignore[arg-type]
    lab.ended(failed(lab.attempt(0, "job2"), Cause.EXCEPTION, job="job2"))  # type: ignore[arg-type]
    assert not lab.state.jobs["job2"].spent  # type: ignore[index]


def test_jobs_that_could_be_run_again_are_bounded(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "SPENT_KEPT_MAX", 0)
    lab.pass_time(1.0)
    assert JOB not in lab.state.jobs
    assert not lab.state.spent_bytes


def test_who_attaches_later_hears_the_old_ends_and_that_they_do_not_count() -> None:
    lab = Lab()
    lab.client()
    lab.node(cores=2)
    lab.open(detached=True)
    lab.submit(2)
    lab.ended(failed(lab.attempt(), Cause.EXCEPTION))
    retry(lab)
    lab.client(OTHER, session=2)
    some = to_client(lab.do(events.Attached(OTHER, JOB, 0)), OTHER)
    assert [type(message) for message in some] == [TasksEnded, TasksReset]


def test_a_client_that_was_away_hears_what_runs_again_though_it_has_the_old_ends(lab: Lab) -> None:
    retry(lab)
    lab.client(session=2)
    some = to_client(lab.do(events.Attached(CLIENT, JOB, 3)))
    assert some == [TasksReset(JOB, (0, 1))]

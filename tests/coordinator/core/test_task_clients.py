"""Running tasks are clients: whose they are, what ends with them, and the cores that they give up while they wait."""

from __future__ import annotations

from typing import Any

import pytest

from herder_coordinator.core import events, records
from herder_shared import limits
from herder_shared.ids import AttemptId, Incarnation, JobId, NodeName
from herder_shared.states import Cause, Outcome, TaskState
from herder_shared.wire.messages import (
    CancelAttempts,
    Payload,
    Refused,
    RunningAttempt,
    TaskEnd,
    TasksEnded,
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

N1 = NodeName("n1")
TASK = Incarnation("task-client")
CHILD = JobId("child")


@pytest.fixture
def lab() -> Lab:
    """One core, and a task on it which is a client."""
    lab = Lab()
    lab.client()
    lab.node(cores=1)
    lab.open()
    lab.submit(1)
    lab.started(lab.attempt())
    become_client(lab)
    return lab


def become_client(lab: Lab, attempt: AttemptId | None = None, client: Incarnation = TASK, session: int = 7) -> Any:
    event = events.ClientConnected(client, session, "whatever it says", N1, attempt or lab.attempt())
    return lab.do(event)


def submit_child(lab: Lab, count: int = 1, **options: Any) -> Any:
    lab.do(events.JobOpened(TASK, job_spec(CHILD, **options)))
    tasks = tuple(item(CHILD, index) for index in range(count))
    return lab.do(events.TasksSubmitted(TASK, CHILD, 0, FUNCTION, tasks, ""))


def slots(lab: Lab, *, lent: tuple[AttemptId, ...] = (), reclaimed: tuple[AttemptId, ...] = ()) -> Any:
    return lab.do(events.SlotsChanged(N1, 1, lent, reclaimed))


def test_it_acts_for_the_owner_of_its_task_and_nobody_else(lab: Lab) -> None:
    submit_child(lab)
    assert lab.state.clients[TASK].owner == "me"
    assert lab.state.jobs[CHILD].owner == "me"
    assert lab.state.jobs[CHILD].depth == 1


@pytest.mark.parametrize("attempt", [AttemptId(1, 99), AttemptId(9, 1)])
def test_an_attempt_that_the_agent_does_not_run_makes_no_client(lab: Lab, attempt: AttemptId) -> None:
    other = Incarnation("other")
    (refused,) = to_client(become_client(lab, attempt, other), other)
    assert isinstance(refused, Refused)
    assert refused.error == "Unauthorized"
    assert other not in lab.state.clients
    assert lab.do(events.JobOpened(other, job_spec(JobId("x")))) == []


def test_an_attempt_is_one_client(lab: Lab) -> None:
    other = Incarnation("other")
    (refused,) = to_client(become_client(lab, client=other), other)
    assert isinstance(refused, Refused)


def test_a_client_cannot_become_that_of_a_task(lab: Lab) -> None:
    (refused,) = to_client(become_client(lab, client=CLIENT), CLIENT)
    assert isinstance(refused, Refused)
    assert lab.state.clients[CLIENT].attempt is None


def test_the_cores_of_a_waiting_task_run_what_it_waits_for(lab: Lab) -> None:
    assert starts(submit_child(lab)) == []
    parent = lab.attempt()
    (order,) = starts(slots(lab, lent=(parent,)))
    assert order[1].job == CHILD
    assert lab.state.jobs[JOB].tasks[0].state is TaskState.RUNNING
    (end,) = told_ends(lab.ended(success(lab.attempt(0, CHILD), 0, CHILD)), TASK)
    assert end.outcome is Outcome.SUCCEEDED
    slots(lab, reclaimed=(parent,))
    assert lab.state.nodes[N1].free_cores == 0
    lab.ended(success(parent))
    assert lab.state.nodes[N1].free_cores == lab.state.nodes[N1].cores


def test_what_wants_its_cores_back_goes_before_all_look_ahead(lab: Lab) -> None:
    submit_child(lab, 1)
    parent = lab.attempt()
    slots(lab, lent=(parent,))
    child = lab.attempt(0, CHILD)
    slots(lab, reclaimed=(parent,))
    node = lab.state.nodes[N1]
    assert list(node.ahead) == [parent]
    lab.ended(success(child, 0, CHILD))
    assert not node.ahead
    assert node.free_cores == 0


def test_memory_and_named_things_stay_with_it() -> None:
    lab = Lab()
    lab.client()
    lab.node(cores=1, memory_bytes=100, gpus=1, resources={"licence": 1.0})
    lab.open(memory_bytes=60, gpus=1, resources={"licence": 1.0})
    lab.submit(1)
    lab.started(lab.attempt())
    become_client(lab)
    slots(lab, lent=(lab.attempt(),))
    node = lab.state.nodes[N1]
    assert (node.free_cores, node.free_memory_bytes, node.free_gpus) == (node.cores, 40, 0)
    assert node.free_resources["licence"] == 0
    assert starts(submit_child(lab, memory_bytes=60)) == []
    slots(lab, lent=(lab.attempt(),))  # said twice
    lab.ended(success(lab.attempt()))
    assert (node.free_cores, node.free_memory_bytes, node.free_gpus) == (node.cores, 100, 1)


@pytest.mark.parametrize("outcome", [Outcome.SUCCEEDED, Outcome.FAILED, Outcome.CRASHED, Outcome.CANCELLED])
def test_what_a_task_submitted_ends_with_it(lab: Lab, outcome: Outcome) -> None:
    submit_child(lab, 2)
    parent = lab.attempt()
    slots(lab, lent=(parent,))
    child = lab.attempt(0, CHILD)
    cause = Cause.CANCELLED if outcome is Outcome.CANCELLED else Cause.EXCEPTION
    end = success(parent) if outcome is Outcome.SUCCEEDED else failed(parent, cause, outcome)
    some = lab.ended(end)
    assert any(isinstance(message, CancelAttempts) and message.attempts == (child,) for message in to_agent(some))
    lab.ended(failed(child, Cause.CANCELLED, Outcome.CANCELLED, job=CHILD))
    lab.pass_time(0.5)
    assert CHILD not in lab.state.jobs
    assert TASK not in lab.state.clients
    assert lab.state.summaries[CHILD].outcomes == {Outcome.CANCELLED: 2}


def test_what_is_detached_outlives_the_task(lab: Lab) -> None:
    submit_child(lab, 1, detached=True)
    lab.ended(success(lab.attempt()))
    lab.ended(success(lab.attempt(0, CHILD), 0, CHILD))
    assert lab.outcomes(CHILD) == {0: Outcome.SUCCEEDED}


def test_children_of_a_lost_node_end_and_the_next_attempt_begins_anew(lab: Lab) -> None:
    submit_child(lab, 1)
    lab.node("n2", session=2, cores=2)
    lab.do(events.AgentDisconnected(N1, 1))
    some = lab.pass_time(limits.RECONNECT_GRACE_S + 1)
    assert any(isinstance(message, CancelAttempts) for message in to_agent(some, "n2"))
    assert lab.state.jobs[CHILD].cancelled
    assert lab.place() == "n2"
    assert lab.state.task_clients == {}


@pytest.mark.parametrize("by_snapshot", [False, True])
def test_a_restart_knows_whose_children_they_are(lab: Lab, by_snapshot: bool) -> None:
    submit_child(lab, 1)
    parent = lab.attempt()
    lab.restart(by_snapshot=by_snapshot)
    assert lab.state.jobs[CHILD].depth == 1
    lab.connect(session=5, cores=1)
    lab.sync(session=5, running=[RunningAttempt(parent, JOB, 0, started=True, lent=True)])
    assert lab.place(0, CHILD) == "n1"  # the cores are given up still
    become_client(lab, session=9)
    lab.ended(success(parent), session=5)
    assert lab.state.clients.get(TASK) is None or not lab.state.clients[TASK].session
    assert lab.state.jobs[CHILD].cancelled


def test_a_restart_after_the_task_has_ended_ends_its_children(lab: Lab) -> None:
    submit_child(lab, 1)
    parent = lab.attempt()
    lab.ended(success(parent))
    ended = next(i for i, one in enumerate(lab.records) if isinstance(one, records.TasksEnded) and one.job == JOB)
    before = [one for one in lab.records[:ended] if not isinstance(one, records.JobClosed | records.CancelRequested)]
    lab.records = [*before, lab.records[ended]]  # what followed from the end was lost with the tail
    lab.restart()
    assert CHILD in lab.state.jobs
    lab.pass_time(0.5)
    assert CHILD not in lab.state.jobs
    assert TASK not in lab.state.clients


def test_the_deepest_come_first(lab: Lab) -> None:
    lab.submit(1)  # a second task of the first job waits
    submit_child(lab, 1)
    (order,) = starts(slots(lab, lent=(lab.attempt(),)))
    assert order[1].job == CHILD


def test_little_is_under_way_to_a_tasks_client_at_a_time(lab: Lab) -> None:
    submit_child(lab, 40)
    slots(lab, lent=(lab.attempt(),))
    told: list[TaskEnd] = []
    for index in range(40):
        (attempt,) = (task.attempt for task in lab.state.jobs[CHILD].tasks.values() if task.node is not None)
        end = success(attempt, index, CHILD)
        some = lab.ended(type(end)(attempt, CHILD, index, Outcome.SUCCEEDED, Payload(bytes(limits.INLINE_BYTES_MAX))))
        told += told_ends(some, TASK)
    assert 10 < len(told) < 20
    (more,) = to_client(lab.do(events.EventsAcked(TASK, CHILD, len(told))), TASK)[:1]
    assert isinstance(more, TasksEnded)

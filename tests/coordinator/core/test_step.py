"""The main ways through the core, each compared whole."""

from __future__ import annotations

import pytest

from herder_coordinator.core import events, records
from herder_coordinator.core.effects import Persist, SendToAgent, SendToClient
from herder_coordinator.core.step import next_deadline_s
from herder_shared.ids import AttemptId, Incarnation, JobId, NodeName
from herder_shared.states import Outcome
from herder_shared.wire.messages import (
    AckAttempts,
    AttemptStart,
    CancelAttempts,
    CancelOk,
    ForgetJobs,
    Logs,
    Notice,
    Payload,
    StartAttempts,
    SubmitOk,
    SyncOk,
    TaskEnd,
    TasksEnded,
    TasksStarted,
    Usage,
)
from support.core_lab import CLIENT, FUNCTION, JOB, WORKLOAD, Lab, brief, item, job_spec, success

N1 = NodeName("n1")
FIRST = AttemptId(1, 1)


@pytest.fixture
def lab() -> Lab:
    lab = Lab()
    lab.client()
    return lab


def start_order(lab: Lab, *, first_of_session: bool = True) -> StartAttempts:
    spec = lab.state.jobs[JOB].spec
    start = AttemptStart(FIRST, JOB, 0, 1, FUNCTION.id, Payload(b"job1.0"))
    if not first_of_session:
        return StartAttempts(1, (start,))
    return StartAttempts(1, (start,), (WORKLOAD,), (brief(spec),), (FUNCTION,))


def test_a_job_is_opened_when_its_record_is_durable(lab: Lab) -> None:
    spec = job_spec()
    assert lab.do(events.JobOpened(CLIENT, spec)) == [
        Persist(records.JobOpened(CLIENT, "me", spec)),
        SendToClient(CLIENT, SubmitOk(JOB, 0), "durable"),
    ]


def test_tasks_without_agents_wait_and_the_client_gets_one_notice(lab: Lab) -> None:
    lab.open()
    assert lab.submit(1) == [
        Persist(records.FunctionKept(FUNCTION)),
        Persist(records.TasksSubmitted(JOB, 0, FUNCTION.id, (item(),))),
        SendToClient(CLIENT, SubmitOk(JOB, 1), "durable"),
        SendToClient(
            CLIENT,
            Notice("warning", "no agent is connected: the tasks wait until one is (see `herder nodes`, `herder up`)"),
            "now",
        ),
    ]
    assert lab.submit(1) == [
        Persist(records.TasksSubmitted(JOB, 1, FUNCTION.id, (item(index=1),))),
        SendToClient(CLIENT, SubmitOk(JOB, 2), "durable"),
    ]


def test_an_agent_gets_attempts_when_it_has_synced(lab: Lab) -> None:
    lab.open()
    lab.submit(1)
    assert lab.connect() == []
    assert lab.sync() == [
        Persist(records.AttemptsAssigned(N1, Incarnation("n1-1"), (records.Assignment(JOB, 0, FIRST, 1),))),
        SendToAgent(N1, 1, SyncOk(1), "now"),
        SendToAgent(N1, 1, start_order(lab), "now"),
    ]


def test_an_attempt_of_a_task_that_may_run_once_is_started_when_its_record_is_durable(lab: Lab) -> None:
    lab.open(idempotent=False)
    lab.node()
    assert lab.submit(1) == [
        Persist(records.FunctionKept(FUNCTION)),
        Persist(records.TasksSubmitted(JOB, 0, FUNCTION.id, (item(),))),
        Persist(records.AttemptsAssigned(N1, Incarnation("n1-1"), (records.Assignment(JOB, 0, FIRST, 1),))),
        SendToClient(CLIENT, SubmitOk(JOB, 1), "durable"),
        SendToAgent(N1, 1, start_order(lab), "durable"),
    ]


def test_a_started_attempt_is_told_to_the_client_at_once(lab: Lab) -> None:
    lab.open()
    lab.node()
    lab.submit(1)
    assert lab.started(FIRST) == [SendToClient(CLIENT, TasksStarted(JOB, ((0, N1),)), "now")]
    assert lab.started(FIRST) == []


def test_an_end_is_journalled_before_client_and_agent_hear_of_it_and_the_slot_is_used_again(lab: Lab) -> None:
    lab.open()
    lab.node(cores=1)
    lab.submit(2)
    lab.pass_time(1.5)
    end = TaskEnd(
        0, Outcome.SUCCEEDED, Payload(b"value of 0"), None, Usage(node=N1, attempt=1, wall_s=0.5), Logs(b"out")
    )
    second = AttemptId(1, 2)
    assert lab.ended(success(FIRST, node=N1, wall_s=0.5)) == [
        Persist(records.TasksEnded(JOB, 0, (end,))),
        Persist(records.AttemptsAssigned(N1, Incarnation("n1-1"), (records.Assignment(JOB, 1, second, 1),))),
        SendToClient(CLIENT, TasksEnded(JOB, 0, (end,)), "durable"),
        SendToAgent(N1, 1, AckAttempts((FIRST,)), "durable"),
        SendToAgent(
            N1, 1, StartAttempts(1, (AttemptStart(second, JOB, 1, 1, FUNCTION.id, Payload(b"job1.1")),)), "now"
        ),
    ]
    assert lab.state.jobs[JOB].tasks[1].queued_s == 1.5


def test_a_doubled_end_is_only_acknowledged_again(lab: Lab) -> None:
    lab.open()
    lab.node()
    lab.submit(1)
    lab.ended(success(FIRST))
    assert lab.ended(success(FIRST)) == [SendToAgent(N1, 1, AckAttempts((FIRST,)), "durable")]


def test_a_closed_job_is_forgotten_when_its_client_has_all_records(lab: Lab) -> None:
    lab.open()
    lab.node()
    lab.submit(1)
    lab.ended(success(FIRST))
    assert lab.do(events.JobClosed(CLIENT, JOB, 1)) == [
        Persist(records.JobClosed(JOB)),
        SendToClient(CLIENT, SubmitOk(JOB, 1), "durable"),
    ]
    assert lab.do(events.EventsAcked(CLIENT, JOB, 1)) == [
        Persist(records.EventsAcked(JOB, 1)),
        Persist(records.JobForgotten(JOB)),
        SendToAgent(N1, 1, ForgetJobs((JOB,)), "durable"),
    ]
    assert list(lab.state.summaries) == [JOB]


def test_cancelling_ends_what_is_pending_at_once_and_asks_the_agent_for_the_rest(lab: Lab) -> None:
    lab.open()
    lab.node(cores=1)
    lab.submit(2)
    some = lab.do(events.CancelRequested(CLIENT, JOB, None, running=True))
    ended = next(iter(lab.state.jobs[JOB].ends))
    assert ended.index == 1
    assert ended.outcome is Outcome.CANCELLED
    assert some == [
        Persist(records.CancelRequested(JOB, None, running=True)),
        Persist(records.TasksEnded(JOB, 0, (ended,))),
        SendToClient(CLIENT, CancelOk(JOB, None), "durable"),
        SendToClient(CLIENT, TasksEnded(JOB, 0, (ended,)), "durable"),
        SendToAgent(N1, 1, CancelAttempts((FIRST,), 2.0), "durable"),
    ]


def test_cancelling_what_waits_asks_the_agent_for_what_is_not_known_to_run(lab: Lab) -> None:
    lab.open()
    lab.node(cores=2)
    lab.submit(2)
    lab.do(events.AttemptsStarted(N1, 1, (FIRST,)))
    some = lab.do(events.CancelRequested(CLIENT, JOB, None, running=False))
    assert [one.message for one in some if isinstance(one, SendToAgent)] == [
        CancelAttempts((AttemptId(1, 2),), 2.0, waiting_only=True)
    ]


def test_unknown_and_late_events_of_every_kind_do_nothing(lab: Lab) -> None:
    ghost, node = JobId("ghost"), NodeName("ghost")
    for event in (
        events.ClientDisconnected(CLIENT, 77),
        events.ClientLeft(Incarnation("ghost")),
        events.EventsAcked(CLIENT, ghost, 3),
        events.AgentSynced(node, 1, (), ()),
        events.AgentDisconnected(node, 1),
        events.AgentHeard(node, 1),
        events.AttemptsStarted(node, 1, (FIRST,)),
        events.AttemptsEnded(node, 1, (success(FIRST),)),
        events.WorkloadsReported(node, 1, ()),
        events.Ticked(),
    ):
        assert lab.do(event) == []


def test_what_an_older_session_of_an_agent_says_is_dropped(lab: Lab) -> None:
    lab.open()
    lab.node(session=1)
    lab.submit(1)
    lab.connect(session=2)
    assert lab.ended(success(FIRST), session=1) == []
    assert lab.outcomes() == {}


def test_same_events_same_effects() -> None:
    def history() -> list[object]:
        lab = Lab()
        lab.client()
        lab.open(retries=1)
        lab.node("n1")
        lab.node("n2", cores=3)
        out: list[object] = [*lab.submit(20)]
        out += lab.ended(success(lab.attempt(0), 0))
        out += lab.pass_time(40)
        return out

    assert history() == history()


def test_the_next_deadline_is_that_of_the_first_back_off(lab: Lab) -> None:
    lab.open()
    lab.node()
    deadline_s = next_deadline_s(lab.state)
    lab.do(events.AgentDisconnected(N1, 1))
    assert deadline_s is None or deadline_s > lab.now_s + 1
    assert next_deadline_s(lab.state) == lab.now_s + 1.0

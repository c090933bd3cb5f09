"""Agents come, go, fall silent and come back."""

from __future__ import annotations

import pytest

from herder_coordinator.core import events
from herder_coordinator.core.effects import DropAgent, SendToAgent
from herder_shared.ids import AttemptId, NodeName
from herder_shared.states import AgentState, Cause, Outcome, TaskState
from herder_shared.wire.messages import (
    AckAttempts,
    CancelAttempts,
    Drain,
    NodeReport,
    RunningAttempt,
    SyncOk,
    TemplateInfo,
    WorkloadReport,
)
from support.core_lab import CLIENT, JOB, WORKLOAD, Lab, starts, success, to_agent, told_ends

N1 = NodeName("n1")


@pytest.fixture
def lab() -> Lab:
    lab = Lab()
    lab.client()
    return lab


def state_of(lab: Lab, name: str = "n1") -> AgentState:
    return lab.state.nodes[NodeName(name)].state


def test_an_agent_whose_connection_closed_and_is_back_in_time_keeps_its_attempts(lab: Lab) -> None:
    lab.open()
    lab.node()
    lab.submit(1)
    attempt = lab.attempt()
    lab.do(events.AgentDisconnected(N1, 1))
    assert state_of(lab) is AgentState.DISCONNECTED
    lab.pass_time(0.9)
    lab.connect(session=2)
    some = lab.sync(session=2, running=[RunningAttempt(attempt, JOB, 0, started=True)])
    assert starts(some) == []
    assert to_agent(some) == [SyncOk(2)]
    assert lab.state.jobs[JOB].tasks[0].state is TaskState.RUNNING


def test_after_the_grace_its_tasks_run_elsewhere_and_it_is_lost_after_its_lease(lab: Lab) -> None:
    lab.open()
    lab.node("n1")
    lab.submit(1)
    lab.node("n2", session=2)
    lab.do(events.AgentDisconnected(N1, 1))
    (order,) = starts(lab.pass_time(1.0))
    assert (order[0], order[1].ordinal) == ("n2", 2)
    assert state_of(lab) is AgentState.DISCONNECTED
    for _ in range(15):
        lab.pass_time(2.0)
        lab.heard("n2", 2)
    assert state_of(lab) is AgentState.LOST


def test_tasks_that_may_run_once_wait_for_the_whole_lease_and_are_lost_then(lab: Lab) -> None:
    lab.open(idempotent=False)
    lab.node()
    lab.submit(1)
    lab.do(events.AgentDisconnected(N1, 1))
    lab.pass_time(25)
    assert lab.outcomes() == {}
    lab.pass_time(6)
    assert lab.outcomes() == {0: Outcome.LOST}


def test_a_silent_agent_is_lost_when_its_lease_is_over_and_its_connection_dropped(lab: Lab) -> None:
    lab.open()
    lab.node()
    lab.submit(1)
    lab.pass_time(29.5)
    assert lab.place() == "n1"
    some = lab.pass_time(1.0)
    assert DropAgent(N1, 1, "nothing was heard of it for 30 s") in some
    assert state_of(lab) is AgentState.LOST
    assert lab.state.jobs[JOB].tasks[0].state is TaskState.PENDING


def test_every_message_renews_the_lease(lab: Lab) -> None:
    lab.node()
    for _ in range(20):
        lab.pass_time(4.0)
        lab.heard()
    assert state_of(lab) is AgentState.READY


def test_our_own_stall_is_nobodys_silence(lab: Lab) -> None:
    lab.open()
    lab.node()
    lab.submit(1)
    lab.now_s += 50.0
    assert lab.pass_time(0.5) == []
    assert state_of(lab) is AgentState.READY
    assert any(seen.kind == "stalled" and seen.value >= 49 for seen in lab.observed)


def test_a_connection_that_closed_in_our_own_stall_is_no_news(lab: Lab) -> None:
    lab.open()
    lab.node()
    lab.submit(1)
    lab.now_s += 60.0
    lab.do(events.AgentDisconnected(N1, 1))
    lab.pass_time(9.0)
    assert lab.place() == "n1"
    lab.connect(session=2)
    assert starts(lab.sync(session=2, running=[RunningAttempt(lab.attempt(), JOB, 0, started=True)])) == []
    lab.do(events.AgentDisconnected(N1, 2), after_s=5.0)
    lab.pass_time(1.0)
    assert lab.place() is None


def test_a_new_incarnation_has_nothing_of_the_old_one(lab: Lab) -> None:
    lab.open()
    lab.node(cores=1)
    lab.submit(1)
    some = lab.connect(session=2, incarnation="n1-2", cores=1)
    assert DropAgent(N1, 1, "another connection of this node replaced it") in some
    (order,) = starts(lab.sync(session=2))
    assert order[1].ordinal == 2


def test_what_an_agent_never_had_is_started_again_and_not_counted(lab: Lab) -> None:
    lab.open(idempotent=False)
    lab.node()
    lab.submit(1)
    lab.do(events.AgentDisconnected(N1, 1))
    lab.connect(session=2)
    (order,) = starts(lab.sync(session=2))
    assert order[1].ordinal == 1
    assert order[2] == "durable"
    assert lab.state.jobs[JOB].tasks[0].crashes == 0


def test_nothing_is_concluded_from_half_an_inventory_before_the_next_heartbeat(lab: Lab) -> None:
    lab.open()
    lab.node()
    lab.submit(2)
    first, second = lab.attempt(0), lab.attempt(1)
    lab.connect(session=2)
    assert starts(lab.sync(session=2, more=True)) == []
    lab.ended(success(first, 0), session=2)
    assert lab.attempt(1) == second
    (order,) = starts(lab.heard(session=2))
    assert (order[1].index, order[1].ordinal) == (1, 1)


def test_an_attempt_of_a_task_that_is_pending_again_is_adopted(lab: Lab) -> None:
    lab.open()
    lab.node()
    lab.submit(1)
    attempt = lab.attempt()
    lab.do(events.AgentDisconnected(N1, 1))
    lab.pass_time(1.5)
    assert lab.state.jobs[JOB].tasks[0].state is TaskState.PENDING
    lab.connect(session=2)
    some = lab.sync(session=2, running=[RunningAttempt(attempt, JOB, 0, started=True)])
    assert starts(some) == []
    assert lab.attempt() == attempt
    assert lab.state.jobs[JOB].tasks[0].ordinal == 1


def test_an_unknown_higher_attempt_takes_the_place_of_the_known_one(lab: Lab) -> None:
    lab.open()
    lab.node("n1")
    lab.submit(1)
    old = lab.attempt()
    lab.restart()
    lab.connect("n1", session=1)
    lab.sync("n1", session=1, running=[RunningAttempt(old, JOB, 0, started=True)])
    newer = AttemptId(1, 50)
    lab.connect("n2", session=2)
    some = lab.sync("n2", session=2, running=[RunningAttempt(newer, JOB, 0, started=True)])
    assert AckAttempts((old,)) in to_agent(some, "n1")
    assert (lab.attempt(), lab.place()) == (newer, "n2")


@pytest.mark.parametrize(
    "running",
    [
        RunningAttempt(AttemptId(1, 9), "ghost", 0, started=True),  # type: ignore[arg-type]
        RunningAttempt(AttemptId(1, 9), JOB, 99, started=True),
        RunningAttempt(AttemptId(0, 1), JOB, 0, started=True),
    ],
    ids=["unknown job", "unknown task", "older attempt"],
)
def test_what_is_not_wanted_is_dropped_when_that_is_durable(lab: Lab, running: RunningAttempt) -> None:
    lab.open()
    lab.node("n1")
    lab.submit(1)
    lab.connect("n2", session=2)
    some = lab.sync("n2", session=2, running=[running])
    assert SendToAgent(NodeName("n2"), 2, SyncOk(2, (running.attempt,)), "durable") in some


@pytest.mark.parametrize("attempt", [AttemptId(1, 1), AttemptId(1, 2), AttemptId(1, 50), AttemptId(9, 1)])
def test_an_end_of_an_attempt_that_cannot_be_its_own_is_only_acknowledged(lab: Lab, attempt: AttemptId) -> None:
    lab.open()
    lab.node("n1", cores=1)
    lab.submit(1)
    lab.node("n2", session=2)
    some = lab.ended(success(attempt), name="n2", session=2)
    assert to_agent(some, "n2") == [AckAttempts((attempt,))]
    assert lab.outcomes() == {}
    assert any(seen.kind == "foreign_attempt" for seen in lab.observed)


def test_a_cancelled_attempt_that_is_back_is_cancelled_again(lab: Lab) -> None:
    lab.open()
    lab.node()
    lab.submit(1)
    attempt = lab.attempt()
    lab.do(events.AgentDisconnected(N1, 1))
    lab.do(events.CancelRequested(CLIENT, JOB, (0,), running=True))
    lab.connect(session=2)
    some = lab.sync(session=2, running=[RunningAttempt(attempt, JOB, 0, started=True)])
    assert CancelAttempts((attempt,), 2.0) in to_agent(some)


@pytest.mark.parametrize("started", [False, True])
def test_an_attempt_that_is_back_is_cancelled_unless_it_runs(lab: Lab, started: bool) -> None:
    lab.open()
    lab.node()
    lab.submit(1)
    attempt = lab.attempt()
    lab.do(events.AgentDisconnected(N1, 1))
    lab.do(events.CancelRequested(CLIENT, JOB, None, running=False))
    lab.connect(session=2)
    some = lab.sync(session=2, running=[RunningAttempt(attempt, JOB, 0, started)])
    cancels = [message for message in to_agent(some) if isinstance(message, CancelAttempts)]
    assert cancels == ([] if started else [CancelAttempts((attempt,), 2.0, waiting_only=True)])


def test_a_drained_node_finishes_and_takes_nothing_new_until_it_is_used_again(lab: Lab) -> None:
    lab.open()
    lab.node(cores=1)
    lab.submit(2)
    assert to_agent(lab.do(events.DrainRequested(N1, on=True))) == [Drain(on=True)]
    some = lab.ended(success(lab.attempt(0), 0))
    assert len(told_ends(some)) == 1
    assert starts(some) == []
    lab.restart()
    lab.client(session=2)
    lab.connect(session=3, cores=1)
    assert to_agent(lab.sync(session=3)) == [SyncOk(3), Drain(on=True)]
    some = lab.do(events.DrainRequested(N1, on=False))
    assert to_agent(some)[0] == Drain(on=False)
    assert len(starts(some)) == 1


def test_a_node_that_is_lost_for_long_is_forgotten(lab: Lab) -> None:
    lab.node()
    lab.pass_time(29.0)
    lab.do(events.AgentDisconnected(N1, 1))
    lab.pass_time(340.0)
    assert lab.state.nodes == {}


def test_a_report_of_a_ready_template_makes_the_node_warm(lab: Lab) -> None:
    lab.node()
    ready = WorkloadReport(WORKLOAD.key, "auto", templates=(TemplateInfo("ready"),))
    lab.do(events.WorkloadsReported(N1, 1, (ready,)))
    assert lab.state.nodes[N1].warm == {WORKLOAD.key}
    lab.do(events.WorkloadsReported(N1, 1, (WorkloadReport(WORKLOAD.key, "auto"),)))
    assert lab.state.nodes[N1].warm == set()


def test_after_a_restart_of_the_coordinator_tasks_stay_bound_to_their_agents(lab: Lab) -> None:
    lab.open()
    lab.node("n1")
    lab.submit(1)
    attempt = lab.attempt()
    lab.restart()
    lab.client(session=2)
    lab.node("n2", session=3)
    for _ in range(15):
        lab.pass_time(2.0)
        lab.heard("n2", 3)
    assert lab.place() == "n1"
    lab.connect("n1", session=4)
    some = lab.sync("n1", session=4, ended=[success(attempt)])
    assert starts(some) == []
    assert lab.outcomes() == {0: Outcome.SUCCEEDED}


def test_after_the_restart_grace_they_run_elsewhere(lab: Lab) -> None:
    lab.open()
    lab.node("n1")
    lab.submit(1)
    lab.restart(by_snapshot=True)
    lab.client(session=2)
    lab.node("n2", session=3)
    for _ in range(31):
        lab.pass_time(2.0)
        lab.heard("n2", 3)
    assert lab.place() == "n2"
    assert lab.attempt()[0] == 2


def test_a_lost_attempts_reason_is_observed(lab: Lab) -> None:
    lab.open()
    lab.node()
    lab.submit(1)
    lab.connect(session=2, incarnation="n1-2")
    assert [(seen.labels, seen.value) for seen in lab.observed if seen.kind == "attempt_lost"] == [
        ((("reason", Cause.NODE_LOST.value),), 1.0)
    ]


def test_a_node_whose_agent_says_what_is_wrong_is_drained_until_it_is_mended(lab: Lab) -> None:
    lab.open()
    lab.node()
    full = NodeReport(fault="its disk is full")
    assert to_agent(lab.do(events.AgentHeard(N1, 1, full))) == [Drain(on=True)]
    assert state_of(lab) is AgentState.DRAINING
    assert starts(lab.submit(1)) == []
    assert lab.do(events.AgentHeard(N1, 1, full)) == []
    some = lab.do(events.AgentHeard(N1, 1, NodeReport()))
    assert to_agent(some)[0] == Drain(on=False)
    assert starts(some)


def test_a_mended_node_that_was_drained_by_hand_stays_drained(lab: Lab) -> None:
    lab.node()
    lab.do(events.AgentHeard(N1, 1, NodeReport(fault="its disk is full")))
    lab.do(events.DrainRequested(N1, on=True))
    assert lab.do(events.AgentHeard(N1, 1, NodeReport())) == []
    assert state_of(lab) is AgentState.DRAINING
    lab.do(events.DrainRequested(N1, on=False))
    assert state_of(lab) is AgentState.READY


def test_an_undone_drain_does_not_use_a_node_with_a_fault(lab: Lab) -> None:
    lab.node()
    lab.do(events.DrainRequested(N1, on=True))
    lab.do(events.AgentHeard(N1, 1, NodeReport(fault="its disk is full")))
    lab.do(events.DrainRequested(N1, on=False))
    assert state_of(lab) is AgentState.DRAINING

"""What others see."""

from __future__ import annotations

import pytest

from herder_coordinator.core import events, views
from herder_shared.ids import BlobId, Incarnation, JobId, NodeName
from herder_shared.states import AgentState, Cause, Outcome, TaskState
from herder_shared.wire.messages import Logs, NodeReport, Payload, TaskInfo, TaskItem, WorkloadReport
from support.core_lab import CLIENT, JOB, WORKLOAD, Lab, failed, success


@pytest.fixture
def lab() -> Lab:
    lab = Lab()
    lab.client()
    lab.node(cores=2)
    lab.open()
    return lab


def test_nodes_say_what_they_run_and_how_long_they_are_silent(lab: Lab) -> None:
    lab.submit(2)
    lab.started(lab.attempt(0))
    lab.do(events.AgentHeard(NodeName("n1"), 1, NodeReport(running=1)))
    (node,) = views.nodes(lab.state, lab.now_s + 3.0)
    assert (node.state, node.running, node.assigned_cores, node.silent_s) == (AgentState.READY, 1, 2.0, 3.0)
    assert node.report == NodeReport(running=1)


def test_a_job_says_where_its_tasks_are(lab: Lab) -> None:
    lab.submit(5)
    lab.started(lab.attempt(0))
    lab.ended(failed(lab.attempt(1), Cause.EXCEPTION, index=1))
    info = views.job(lab.state, JOB, lab.now_s + 2.0)
    assert info is not None
    assert info.counts == {TaskState.PENDING: 2, TaskState.RUNNING: 1, TaskState.ASSIGNED: 1, TaskState.ENDED: 1}
    assert (info.state, info.tasks, info.outcomes, info.age_s) == ("running", 5, {Outcome.FAILED: 1}, 2.0)
    assert views.jobs(lab.state, lab.now_s + 2.0) == [info]


@pytest.mark.parametrize(
    ("outcome", "state"), [(None, "done"), (Cause.EXCEPTION, "failed"), (Cause.CANCELLED, "cancelled")]
)
def test_a_closed_job_says_how_it_went(lab: Lab, outcome: Cause | None, state: str) -> None:
    lab.submit(1)
    attempt = lab.attempt()
    ended = Outcome.CANCELLED if outcome is Cause.CANCELLED else Outcome.FAILED
    if outcome is Cause.CANCELLED:
        lab.cancel()
    lab.ended(success(attempt) if outcome is None else failed(attempt, outcome, ended))
    info = views.job(lab.state, JOB, lab.now_s)
    assert info is not None
    assert info.state == "open"
    lab.do(events.JobClosed(CLIENT, JOB, 1))
    lab.do(events.EventsAcked(CLIENT, JOB, 1))
    info = views.job(lab.state, JOB, lab.now_s)
    assert info is not None
    assert info.state == state


def test_tasks_are_listed_in_order(lab: Lab) -> None:
    lab.submit(4)
    lab.ended(success(lab.attempt(0), 0, node="n1"))
    lab.started(lab.attempt(1))
    assert views.tasks(lab.state, JOB) == [
        TaskInfo(0, TaskState.ENDED, Outcome.SUCCEEDED, NodeName("n1"), 1),
        TaskInfo(1, TaskState.RUNNING, None, NodeName("n1"), 1),
        TaskInfo(2, TaskState.ASSIGNED, None, NodeName("n1"), 1),
        TaskInfo(3, TaskState.PENDING),
    ]
    assert views.tasks(lab.state, JobId("ghost")) is None


def test_logs_are_there_before_and_after_the_client_has_the_record(lab: Lab) -> None:
    lab.submit(1)
    assert views.logs(lab.state, JOB, 0) is None
    lab.ended(success(lab.attempt()))
    assert views.logs(lab.state, JOB, 0) == Logs(b"out")
    lab.do(events.EventsAcked(CLIENT, JOB, 1))
    assert views.logs(lab.state, JOB, 0) == Logs(b"out")


def test_logs_are_kept_up_to_a_bound(lab: Lab) -> None:
    lab.state.recent.ends_max = 2
    for index in range(4):
        lab.submit(1)
        lab.ended(success(lab.attempt(index), index))
        lab.do(events.EventsAcked(CLIENT, JOB, index + 1))
    assert [views.logs(lab.state, JOB, index) for index in range(4)] == [None, None, Logs(b"out"), Logs(b"out")]


def test_workloads_say_how_they_fare_on_each_node(lab: Lab) -> None:
    report = WorkloadReport(WORKLOAD.key, "auto", start_method="fork")
    lab.do(events.WorkloadsReported(NodeName("n1"), 1, (report,)))
    (workload,) = views.workloads(lab.state)
    assert (workload.key, workload.start, workload.reports) == (WORKLOAD.key, "auto", {"n1": report})


def test_the_status_counts(lab: Lab) -> None:
    lab.submit(3)
    status = views.status(lab.state, "1.0", "127.0.0.1:1")
    assert (status.tasks[TaskState.ASSIGNED], status.tasks[TaskState.PENDING]) == (2, 1)
    assert (status.agents[AgentState.READY], status.jobs, status.clients, status.epoch) == (1, 1, 1, 1)


def test_work_waits_for_a_node_that_could_run_it(lab: Lab) -> None:
    assert not views.work_waiting(lab.state, NodeName("n1"))
    lab.submit(3)
    assert views.work_waiting(lab.state, NodeName("n1"))
    lab.node("small", session=2, cores=0)
    assert not views.work_waiting(lab.state, NodeName("small"))
    assert not views.work_waiting(lab.state, NodeName("ghost"))


def test_a_blob_is_needed_while_anything_refers_to_it(lab: Lab) -> None:
    blob = BlobId("b")
    lab.submit(items=[TaskItem(Payload(b"", blob, 9)), TaskItem(Payload(b"", blob, 9))])
    lab.ended(success(lab.attempt(0), 0))
    assert views.is_blob_needed(lab.state, blob)
    lab.ended(success(lab.attempt(1), 1))
    assert not views.is_blob_needed(lab.state, blob)


def test_draining_is_known_before_the_node_is(lab: Lab) -> None:
    lab.do(events.DrainRequested(NodeName("later"), on=True))
    assert views.is_draining(lab.state, NodeName("later"))
    assert not views.is_draining(lab.state, NodeName("n1"))


def test_owners_say_what_they_hold_and_what_is_due_to_them(lab: Lab) -> None:
    other = Incarnation("client2")
    lab.state.policy.weights["you"] = 3.0
    lab.client(other, owner="you", session=2)
    lab.submit(3)
    lab.open(JobId("job2"), client=other)
    lab.submit(1, JobId("job2"), client=other)
    for _ in range(20):
        lab.pass_time(10.0)
        lab.heard()
    me, you = views.owners(lab.state)
    assert (me.owner, me.cores, me.weight, me.share) == ("me", 2.0, 1.0, 0.25)
    assert (you.owner, you.cores, you.weight, you.share) == ("you", 0.0, 3.0, 0.75)
    assert me.mean_cores == pytest.approx(2 * (1 - 2 ** (-200 / 600)), abs=0.01)
    assert views.status(lab.state).owners == (me, you)


def test_what_is_held_back_is_counted(lab: Lab) -> None:
    lab.submit(3)
    lab.open(JobId("wide"), cores=2.0)
    lab.submit(1, JobId("wide"))
    lab.open(JobId("paused"))
    lab.change(JobId("paused"), paused=True)
    lab.ended(success(lab.attempt()))
    lab.ended(success(lab.attempt(1), 1))
    status = views.status(lab.state)
    assert (status.paused_jobs, status.suspects) == (1, 0)
    lab.do(events.AgentDisconnected(NodeName("n1"), 1))
    lab.pass_time(40.0)
    assert views.status(lab.state).suspects == 1
    lab.node("n2", session=2, cores=4)
    (node,) = [node for node in views.nodes(lab.state, lab.now_s) if node.facts.node == "n2"]
    assert node.suspect == "wide.0"
    assert views.status(lab.state).suspects == 1


def test_a_node_says_why_it_takes_nothing_new(lab: Lab) -> None:
    def why() -> tuple[str, str]:
        (info,) = views.nodes(lab.state, lab.now_s)
        return info.why, views.drain_reason(lab.state, lab.state.nodes[NodeName("n1")])

    assert why()[0] == ""
    lab.do(events.DrainRequested(NodeName("n1"), on=True))
    assert why() == ("", "asked")
    lab.state.drained[NodeName("n1")] = "nothing starts"
    assert why() == ("nothing starts", "nothing_starts")
    lab.do(events.AgentHeard(NodeName("n1"), 1, NodeReport(fault="the disk is full")))
    assert why() == ("the disk is full", "fault")
    lab.node("n1", session=2, incarnation="new", ends_in_s=5.0)
    assert why() == ("it will end soon", "ending")

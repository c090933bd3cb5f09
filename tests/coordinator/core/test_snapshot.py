"""A snapshot gives the same state again, whatever is under way."""

from __future__ import annotations

import pytest

from herder_coordinator.core import events, records
from herder_coordinator.core.apply import demote
from herder_coordinator.core.snapshot import snapshot
from herder_coordinator.core.state import new_state
from herder_coordinator.core.step import finish_replay, replay_record
from herder_shared.ids import BlobId, Incarnation, JobId, NodeName
from herder_shared.states import Cause, Outcome, TaskState
from herder_shared.wire.messages import Key, Payload, TaskItem
from sim.digest import digest
from support.core_lab import CLIENT, CLUSTER, JOB, Lab, failed, item, starts, success

JOB2 = JobId("job2")


def busy_lab() -> Lab:
    """Tasks in every place: waiting, pending, in back-off, assigned, running, cancelled, ended, acknowledged."""
    lab = Lab()
    lab.client()
    lab.node("n1", cores=2)
    lab.open(retries=3, backoff_s=50.0)
    lab.submit(8)
    lab.ended(failed(lab.attempt(0), Cause.EXCEPTION))
    lab.ended(success(lab.attempt(1), 1))
    lab.ended(success(lab.attempt(2), 2))
    lab.do(events.EventsAcked(CLIENT, JOB, 1))
    lab.submit(items=[item(index=8, deps=[(JOB, 1), (JOB, 3)]), TaskItem(Payload(b"", BlobId("b"), 9), ())])
    lab.do(events.CancelRequested(CLIENT, JOB, (3, 5), running=True))
    lab.started(lab.attempt(3))
    lab.client(Incarnation("client2"), owner="you", session=2)
    lab.open(JOB2, Incarnation("client2"), detached=True, idempotent=False, priority=2)
    lab.submit(3, JOB2, client=Incarnation("client2"))
    lab.do(events.DrainRequested(NodeName("n9"), on=True))
    lab.do(events.KeysRevokeRequested(CLIENT, 1, (Key("5e1a", "client", "eve"),), "1"))
    return lab


@pytest.mark.parametrize("by_snapshot", [True, False], ids=["snapshot", "journal"])
def test_a_new_life_has_the_state_of_the_old_one(by_snapshot: bool) -> None:
    lab = busy_lab()
    before = digest(lab.state)
    lab.restart(by_snapshot=by_snapshot)
    assert digest(lab.state) == before
    lab.restart(by_snapshot=True)
    assert digest(lab.state) == before


@pytest.mark.parametrize("by_snapshot", [True, False], ids=["snapshot", "journal"])
def test_every_task_ends_in_the_next_life(by_snapshot: bool) -> None:
    lab = busy_lab()
    lab.restart(by_snapshot=by_snapshot)
    lab.client(session=11)
    lab.client(Incarnation("client2"), owner="you", session=12)
    some = lab.node("n2", session=13, cores=4)
    some += lab.connect("n1", session=14, incarnation="n1-2")
    some += lab.sync("n1", session=14)
    for _ in range(60):
        orders, some = starts(some), []
        for node, start, _ in orders:
            end = success(start.attempt, start.index, start.job)
            some += lab.ended(end, name=node, session=13 if node == "n2" else 14)
        some += lab.pass_time(1.0)
        lab.heard("n1", 14)
        lab.heard("n2", 13)
    for job in lab.state.jobs.values():
        assert job.ended == job.count
    assert lab.outcomes()[3] is Outcome.CANCELLED
    assert lab.outcomes()[8] is Outcome.CANCELLED
    assert lab.outcomes()[7] is Outcome.SUCCEEDED


def test_any_prefix_of_the_journal_is_a_state_that_can_go_on() -> None:
    lab = busy_lab()
    for length in range(len(lab.records) + 1):
        state = new_state(CLUSTER, 2)
        for record in lab.records[:length]:
            replay_record(state, record)
        finish_replay(state, 5.0)
        again = new_state(CLUSTER, 3)
        for record in snapshot(state):
            replay_record(again, record)
        finish_replay(again, 5.0)
        assert digest(again) == digest(state)


def test_a_value_with_which_a_task_waits_survives_the_end_of_its_own_record() -> None:
    lab = Lab()
    lab.client()
    lab.node(cores=1)
    lab.open()
    lab.submit(2)
    lab.ended(success(lab.attempt(0), 0))
    lab.submit(items=[item(index=2, deps=[(JOB, 0), (JOB, 1)])])
    lab.do(events.EventsAcked(CLIENT, JOB, 1))
    assert records.DependencyKept(JOB, 0, Payload(b"value of 0")) in snapshot(lab.state)
    lab.restart(by_snapshot=True)
    lab.client(session=2)
    assert lab.state.jobs[JOB].tasks[2].state is TaskState.WAITING
    lab.connect(session=3, cores=1)
    some = lab.sync(session=3, ended=[success(lab.attempt(1), 1)])
    (order,) = starts(some)
    assert [value.inline for _, _, value in order[1].deps] == [b"value of 0", b"value of 1"]


def test_ended_tasks_cost_a_byte_each() -> None:
    lab = Lab()
    lab.client()
    lab.open()
    lab.submit(5_000)
    lab.do(events.CancelRequested(CLIENT, JOB, None, running=True))
    lab.do(events.EventsAcked(CLIENT, JOB, 5_000))
    (restored,) = [each for each in snapshot(lab.state) if isinstance(each, records.TasksRestored)]
    assert restored.tasks == ()
    assert len(restored.outcomes) == 5_000


def test_a_verdict_on_a_workload_is_kept_when_no_job_has_it_any_more() -> None:
    lab = busy_lab()
    (key,) = lab.state.workloads
    kept = lab.state.workloads[key]
    demote(lab.state, key, "two died")
    kept.jobs = 0
    again = new_state(CLUSTER, 1)
    for record in snapshot(lab.state):
        if isinstance(record, records.WorkloadDemoted):
            replay_record(again, record)
    assert again.workloads[key].demoted == "two died"
    assert again.workloads[key].spec == kept.spec

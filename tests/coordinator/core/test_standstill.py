"""Tasks that wait, and hold what those need for which they wait."""

from __future__ import annotations

from typing import Any

import pytest

from herder_coordinator.core import events, standstill
from herder_coordinator.core.explain import explain
from herder_shared import limits
from herder_shared.ids import AttemptId, Incarnation, JobId, NodeName
from herder_shared.states import Cause, Outcome
from herder_shared.wire.messages import CancelAttempts
from support.core_lab import CLIENT, FUNCTION, JOB, Lab, failed, item, job_spec, starts, success, to_agent

N1 = NodeName("n1")
GPU: dict[str, Any] = {"gpus": 1, "cores": 1.0}


@pytest.fixture
def lab() -> Lab:
    lab = Lab()
    lab.client()
    lab.node(cores=4, gpus=1, resources={"licence": 2.0}, memory_bytes=1000)
    return lab


def parent(lab: Lab, job: JobId = JOB, **options: Any) -> AttemptId:
    """A task that runs, and is a client."""
    lab.open(job, **options)
    lab.submit(1, job)
    attempt = lab.attempt(0, job)
    lab.started(attempt)
    lab.do(events.ClientConnected(Incarnation(f"in {job}"), attempt.n + 10, "", N1, attempt))
    return attempt


def child(lab: Lab, of: JobId = JOB, job: JobId | None = None, count: int = 1, **options: Any) -> JobId:
    """Tasks that it submits and waits for."""
    job = job or JobId(f"child of {of}")
    client = Incarnation(f"in {of}")
    lab.do(events.JobOpened(client, job_spec(job, **options)))
    tasks = tuple(item(job, index) for index in range(count))
    lab.do(events.TasksSubmitted(client, job, 0, FUNCTION, tasks, ""))
    return job


def lend(lab: Lab, *attempts: AttemptId) -> None:
    lab.do(events.SlotsChanged(N1, 1, attempts, ()))


def go_on(lab: Lab, seconds: float) -> None:
    for _ in range(int(seconds / 5)):
        lab.pass_time(5.0)
        lab.heard("n1")


def outlast(lab: Lab) -> None:
    go_on(lab, standstill.STANDSTILL_S + 2 * standstill.LOOK_EVERY_S)


def details(lab: Lab, job: JobId) -> str:
    found = explain(lab.state, job, 0)
    assert found is not None
    return "\n".join(found.details)


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({"gpus": 1}, "1 GPU"),
        ({"resources": {"licence": 1.5}}, "1.5 licence"),
        ({"memory_bytes": 600}, "600 bytes of memory"),
        ({"memory_bytes": 600, "gpus": 1}, "600 bytes of memory and 1 GPU"),
    ],
)
def test_who_waits_for_what_its_parent_holds_is_told_so_and_ends_at_last(
    lab: Lab, held: dict[str, Any], words: str
) -> None:
    attempt = parent(lab, **held)
    job = child(lab, count=3, **held)
    lend(lab, attempt)
    lab.pass_time(0.5)
    told = details(lab, job)
    assert f"job1.0 on n1 holds {words} while it waits for tasks of its own" in told
    assert "as Unschedulable, if nothing changes" in told
    go_on(lab, standstill.STANDSTILL_S - 10)
    assert lab.outcomes(job) == {}
    go_on(lab, 20)
    assert lab.outcomes(job) == dict.fromkeys(range(3), Outcome.FAILED)
    failure = lab.failure(0, job)
    assert failure.cause is Cause.UNSCHEDULABLE
    assert "its parent" not in failure.message
    assert "this one's parent job1.0 among them" in failure.message
    assert f"job1.0 on n1 holds {words}" in failure.message
    assert lab.outcomes() == {}  # the parent has it from there


def test_of_several_only_the_youngest_is_ended_and_may_make_room_for_the_others(lab: Lab) -> None:
    lab.connect("n1", session=2, cores=4, gpus=2)
    lab.sync("n1", session=2)
    other = JobId("other")
    first = parent_of(lab, JOB)
    second = parent_of(lab, other)
    jobs = [child(lab, JOB, **GPU), child(lab, other, **GPU)]
    lab.do(events.SlotsChanged(N1, 2, (first, second), ()))
    for _ in range(15):
        lab.pass_time(5.0)
        lab.heard("n1", 2)
    assert [list(lab.outcomes(job).values()) for job in jobs] == [[], [Outcome.FAILED]]
    orders = starts(lab.ended(success(second, 0, other), session=2))
    assert [order.job for _, order, _ in orders] == [jobs[0]]


def parent_of(lab: Lab, job: JobId) -> AttemptId:
    lab.open(job, **GPU)
    lab.submit(1, job)
    attempt = lab.attempt(0, job)
    lab.started(attempt, session=2)
    lab.do(events.ClientConnected(Incarnation(f"in {job}"), attempt.n + 10, "", N1, attempt))
    return attempt


def test_a_chain_is_as_stuck_as_its_end(lab: Lab) -> None:
    top = parent(lab, **GPU)
    middle_job = child(lab)
    lend(lab, top)
    middle = lab.attempt(0, middle_job)
    lab.started(middle)
    lab.do(events.ClientConnected(Incarnation(f"in {middle_job}"), 99, "", N1, middle))
    lowest = child(lab, middle_job, **GPU)
    assert list(standstill.find(lab.state)) == []
    lend(lab, middle)
    assert list(standstill.find(lab.state)) == [top, middle]
    outlast(lab)
    assert lab.outcomes(lowest) == {0: Outcome.FAILED}
    assert lab.outcomes(middle_job) == {}


@pytest.mark.parametrize(
    "why",
    ["timeout", "another child runs", "another node", "a lost node", "it is paused", "a dependency elsewhere", "cores"],
)
def test_where_something_else_may_free_it_nothing_is_ended(lab: Lab, why: str) -> None:
    attempt = parent(lab, timeout_s=5000.0 if why == "timeout" else None, **GPU)
    options: dict[str, Any] = {"cores": 4.0} if why == "cores" else GPU
    if why in {"another node", "a lost node"}:
        lab.node("n2", session=2, cores=1, gpus=1)
        lab.open(JobId("long"), nodes=("n2",), **GPU)
        lab.submit(1, JobId("long"))
        assert lab.place(0, JobId("long")) == "n2"
    if why == "a lost node":
        lab.do(events.AgentDisconnected(NodeName("n2"), 2))
    if why == "cores":
        lab.open(JobId("long"), cores=3.0)
        lab.submit(1, JobId("long"))
    job = child(lab, **options)
    if why == "another child runs":
        child(lab, job=JobId("running"))
    if why == "it is paused":
        lab.do(events.JobChangeRequested(CLIENT, 7, job, True, None))
    if why == "a dependency elsewhere":
        lab.open(JobId("slow"))
        lab.submit(1, JobId("slow"))
        waiting = JobId("waiting")
        client = Incarnation(f"in {JOB}")
        lab.do(events.JobOpened(client, job_spec(waiting)))
        tasks = (item(waiting, 0, [(JobId("slow"), 0)]),)
        lab.do(events.TasksSubmitted(client, waiting, 0, FUNCTION, tasks, ""))
    lend(lab, attempt)
    for _ in range(30):
        lab.pass_time(5.0)
        lab.heard("n1")
        if why == "another node":
            lab.heard("n2", 2)
    assert lab.outcomes(job) == {}
    assert lab.state.standstill == ()
    if why not in {"it is paused", "cores"}:
        assert "job1.0 on n1 holds 1 GPU" in details(lab, job)


def test_what_changes_begins_the_time_anew(lab: Lab) -> None:
    attempt = parent(lab, **GPU)
    job = child(lab, **GPU)
    lend(lab, attempt)
    go_on(lab, standstill.STANDSTILL_S - 10)
    lab.do(events.SlotsChanged(N1, 1, (), (attempt,)))  # its wait had a timeout
    go_on(lab, 10)
    lend(lab, attempt)
    go_on(lab, standstill.STANDSTILL_S - 10)
    assert lab.outcomes(job) == {}
    go_on(lab, 20)
    assert lab.outcomes(job) == {0: Outcome.FAILED}


def test_what_was_sent_ahead_behind_a_task_that_waits_now_is_recalled_and_not_sent_again(lab: Lab) -> None:
    short = JobId("short")
    lab.open(short, **GPU)
    lab.submit(1, short)
    lab.ended(success(lab.attempt(0, short), 0, short, wall_s=0.001))  # so that it is known how short they are
    attempt = parent(lab, **GPU)
    job = child(lab, count=2, **GPU)
    node = lab.state.nodes[N1]
    ahead = list(node.ahead)
    assert len(ahead) == 2
    lend(lab, attempt)
    assert "job1.0 on n1 holds 1 GPU" in details(lab, job)
    some = lab.pass_time(standstill.LOOK_EVERY_S + 1)
    assert CancelAttempts(tuple(ahead), limits.KILL_GRACE_S, waiting_only=True) in to_agent(some)
    ends = [failed(each, Cause.CANCELLED, Outcome.CANCELLED, index, job=job) for index, each in enumerate(ahead)]
    assert starts(lab.ended(*ends)) == []
    outlast(lab)
    assert lab.outcomes(job) == dict.fromkeys(range(2), Outcome.FAILED)

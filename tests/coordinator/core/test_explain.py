"""Why a task waits, runs where it runs, or ended as it did."""

from __future__ import annotations

from typing import Any

import pytest

from herder_coordinator.core import events
from herder_coordinator.core.explain import explain
from herder_coordinator.core.room import Recent
from herder_shared.ids import Incarnation, JobId, NodeName
from herder_shared.states import Cause, Outcome, TaskState
from herder_shared.wire.messages import Explanation, NodeReport
from support.core_lab import CLIENT, JOB, Lab, failed, item, success

OTHER = Incarnation("client2")
JOB2 = JobId("job2")


@pytest.fixture
def lab() -> Lab:
    lab = Lab()
    lab.client()
    return lab


def told(lab: Lab, index: int = 0, job: JobId = JOB) -> Explanation:
    found = explain(lab.state, job, index)
    assert found is not None
    return found


def on(explanation: Explanation, node: str) -> str:
    return next(verdict.text for verdict in explanation.nodes if verdict.node == node)


def test_without_agents(lab: Lab) -> None:
    lab.open()
    lab.submit(1)
    assert (told(lab).kind, told(lab).state) == ("no_agents", TaskState.PENDING)
    assert "herder up" in told(lab).summary


@pytest.mark.parametrize(
    ("options", "facts", "expected"),
    [
        ({}, {}, "0 of 2 cores free, it needs 1"),
        ({"memory_bytes": 1 << 30, "cores": 0.0}, {}, f"{(1 << 30) - 9} of {1 << 30} bytes of memory free"),
        ({"gpus": 2, "cores": 0.0}, {"gpus": 2}, "1 of 2 GPUs free, it needs 2"),
        ({"resources": {"licence": 1.0}, "cores": 0.0}, {"resources": {"licence": 1.0}}, "0 of 1 licence free"),
    ],
)
def test_what_is_short_on_which_node(lab: Lab, options: dict[str, Any], facts: dict[str, Any], expected: str) -> None:
    lab.node("n1", cores=2, **facts)
    gpus = 1 if "gpus" in facts else 0
    lab.open(JOB2, cores=2.0, memory_bytes=9, gpus=gpus, resources=facts.get("resources", {}))
    lab.submit(1, JOB2)
    lab.open(**options)
    lab.submit(1)
    assert told(lab).kind == "no_room"
    assert expected in on(told(lab), "n1")


def test_nodes_that_take_nothing_say_why(lab: Lab) -> None:
    for number, name in enumerate(("n1", "n2", "n3"), 1):
        lab.node(name, session=number, cores=2)
    lab.do(events.DrainRequested(NodeName("n1"), on=True))
    lab.do(events.AgentDisconnected(NodeName("n2"), 2))
    lab.do(events.AgentHeard(NodeName("n3"), 3, NodeReport(fault="the disk is full")))
    lab.open()
    lab.submit(1)
    explanation = told(lab)
    assert explanation.kind == "no_agents"
    assert [on(explanation, name) for name in ("n1", "n2", "n3")] == [
        "is draining",
        "is disconnected",
        "is draining: the disk is full",
    ]


def test_names_that_no_node_has(lab: Lab) -> None:
    lab.node("n1")
    lab.open(nodes=("gpu",))
    lab.submit(1)
    assert told(lab).kind == "no_room"
    assert "none of the names or labels ['gpu']" in on(told(lab), "n1")


def test_dependencies(lab: Lab) -> None:
    lab.node(cores=1)
    lab.open()
    lab.submit(items=[item(index=0), item(index=1, deps=[(JOB, 0)])])
    explanation = told(lab, 1)
    assert (explanation.kind, explanation.waits_for) == ("dependencies", (f"{JOB}.0",))
    assert "was sent to n1" in explanation.details[0]


def test_back_off_and_the_attempts_so_far(lab: Lab) -> None:
    lab.node("n1")
    lab.open(retries=3, backoff_s=10.0)
    lab.submit(1)
    lab.ended(failed(lab.attempt(), Cause.EXCEPTION))
    lab.pass_time(4.0)
    explanation = told(lab)
    assert explanation.kind == "back_off"
    assert explanation.back_off_s == pytest.approx(6.0)
    (past,) = explanation.attempts
    assert (past.attempt, past.node, past.outcome, past.cause) == (1, "n1", Outcome.FAILED, Cause.EXCEPTION)
    assert "after attempt 1, which failed on n1" in explanation.summary


def test_a_paused_job(lab: Lab) -> None:
    lab.node("n1")
    lab.open()
    lab.change(paused=True)
    lab.submit(1)
    assert told(lab).kind == "paused"
    assert f"herder resume {JOB}" in told(lab).summary


def test_whose_turn_it_is(lab: Lab) -> None:
    lab.client(OTHER, owner="you", session=2)
    lab.node("n1", cores=4)
    lab.open()
    lab.submit(9)
    lab.open(JOB2, client=OTHER)
    lab.submit(1, JOB2, client=OTHER)
    explanation = told(lab, 8)
    assert (explanation.kind, explanation.before) == ("no_room", 4)
    assert (explanation.owner_use, explanation.least_use) == (4.0, 0.0)
    assert any("its owner 'me' uses 4.00 cores" in detail for detail in explanation.details)


def test_a_node_that_is_kept_for_another(lab: Lab) -> None:
    lab.node("n1", cores=2)
    lab.open()
    lab.submit(1)
    lab.open(JOB2, cores=2.0)
    lab.submit(1, JOB2)
    lab.submit(1)
    explanation = told(lab, 1)
    assert explanation.kind == "kept"
    assert on(explanation, "n1") == "is kept for a task of job job2"
    assert any("n1 is kept for it" in detail for detail in told(lab, 0, JOB2).details)


def test_a_node_that_ends_too_soon(lab: Lab) -> None:
    lab.node("n1", ends_in_s=300.0)
    lab.open(timeout_s=1000.0)
    lab.submit(1)
    assert "ends too soon" in on(told(lab), "n1")


def test_why_it_is_where_it_is(lab: Lab) -> None:
    lab.node("n1")
    lab.open()
    lab.submit(1)
    starting = told(lab)
    assert (starting.kind, starting.node, starting.attempt) == ("starting", "n1", 1)
    assert any("it had room" in detail for detail in starting.details)
    lab.started(lab.attempt())
    lab.pass_time(2.0)
    running = told(lab)
    assert running.kind == "running"
    assert "runs on n1, where it has been for 2.0 s" in running.summary


def test_look_ahead(lab: Lab) -> None:
    lab.node("n1", cores=1)
    lab.open()
    lab.submit(10)
    lab.ended(success(lab.attempt(0), 0, wall_s=0.01))
    explanation = told(lab, 3)
    assert explanation.kind == "look_ahead"
    assert "behind 1 others" in explanation.summary


def test_how_it_ended_with_every_attempt(lab: Lab) -> None:
    lab.node("n1")
    lab.open(retries=1)
    lab.submit(2)
    lab.ended(failed(lab.attempt(), Cause.EXCEPTION))
    lab.ended(failed(lab.attempt(), Cause.SIGNAL, Outcome.CRASHED))
    explanation = told(lab)
    assert (explanation.kind, explanation.outcome, explanation.cause) == ("crashed", Outcome.CRASHED, Cause.SIGNAL)
    assert (explanation.attempts[0].outcome, explanation.attempt) == (Outcome.FAILED, 2)
    assert "it ended by signal" in explanation.summary


def test_what_is_unknown_is_not_explained(lab: Lab) -> None:
    lab.open()
    lab.submit(1)
    assert explain(lab.state, JobId("none"), 0) is None
    assert explain(lab.state, JOB, 1) is None
    assert explain(lab.state, JOB, -1) is None


def test_an_ended_task_is_explained_after_its_client_has_the_record(lab: Lab) -> None:
    lab.node("n1")
    lab.open()
    lab.submit(2)
    lab.ended(success(lab.attempt(0), 0))
    lab.do(events.EventsAcked(CLIENT, JOB, 1))
    assert told(lab).kind == "succeeded"
    lab.state.recent = Recent()
    assert "no more of it is kept" in told(lab).summary


def test_the_history_survives_a_restart_and_is_bounded(lab: Lab) -> None:
    lab.node("n1")
    lab.open(retries=100, detached=True)
    lab.submit(1)
    for _ in range(20):
        lab.ended(failed(lab.attempt(), Cause.EXCEPTION))
    numbers = [attempt.attempt for attempt in told(lab).attempts]
    assert numbers == [1, *range(14, 21)]
    for by_snapshot in (False, True):
        lab.restart(by_snapshot=by_snapshot)
        assert [attempt.attempt for attempt in told(lab).attempts] == numbers

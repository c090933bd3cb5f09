"""Who is next, who gets a little ahead, and what can never run."""

from __future__ import annotations

import time
from typing import Any

import pytest

from herder_coordinator.core import events
from herder_coordinator.core.step import step as take_step
from herder_shared import limits
from herder_shared.ids import Incarnation, JobId, NodeName
from herder_shared.states import Cause, Outcome
from herder_shared.wire.messages import CancelAttempts
from support.core_lab import CLIENT, FUNCTION, JOB, Lab, failed, item, starts, success, to_agent

OTHER = Incarnation("client2")
JOB2 = JobId("job2")


@pytest.fixture
def lab() -> Lab:
    lab = Lab()
    lab.client()
    return lab


def order_of(lab: Lab, cores: int = 100) -> list[tuple[str, int]]:
    return [(start.job, start.index) for _, start, _ in starts(lab.node(cores=cores))]


def test_priority_comes_before_submission(lab: Lab) -> None:
    lab.open(JOB)
    lab.submit(2)
    lab.open(JOB2, priority=1)
    lab.submit(2, JOB2)
    assert order_of(lab) == [(JOB2, 0), (JOB2, 1), (JOB, 0), (JOB, 1)]


def test_jobs_of_one_owner_that_use_the_same_go_in_the_order_of_submission(lab: Lab) -> None:
    lab.open(JOB)
    lab.open(JOB2)
    lab.submit(1, JOB2)
    lab.submit(1, JOB)
    lab.submit(1, JOB2)
    assert order_of(lab, cores=2) == [(JOB2, 0), (JOB, 0)]


def test_owners_take_turns(lab: Lab) -> None:
    lab.client(OTHER, owner="you", session=2)
    lab.open(JOB)
    lab.open(JOB2, client=OTHER)
    lab.submit(40, JOB)
    lab.submit(10, JOB2, client=OTHER)
    given = [job for job, _ in [(start.job, 0) for _, start, _ in starts(lab.node(cores=20))]]
    assert given.count(JOB2) >= 8
    assert given.count(JOB) >= 8


def test_a_group_that_fits_nowhere_does_not_hold_up_those_behind_it(lab: Lab) -> None:
    lab.node("n1", cores=2)
    lab.node("n2", session=2, cores=2)
    lab.open(JOB)
    lab.submit(2)
    lab.open(JOB2, cores=2.0)
    lab.submit(1, JOB2)
    assert lab.place(0, JOB2) is None
    job3 = JobId("job3")
    lab.open(job3)
    lab.submit(1, job3)
    assert lab.place(0, job3) is not None


def test_nothing_is_sent_ahead_while_it_is_not_known_how_long_it_takes(lab: Lab) -> None:
    lab.node(cores=1)
    lab.open()
    assert len(starts(lab.submit(100))) == 1


def test_short_tasks_are_sent_ahead_for_about_as_long_as_a_round_trip_may_take(lab: Lab) -> None:
    lab.node(cores=1)
    lab.open()
    lab.submit(100)
    some = lab.ended(success(lab.attempt(0), 0, wall_s=0.01))
    assert len(starts(some)) == 1 + int(limits.LOOK_AHEAD_S / 0.01)


def test_no_more_than_so_many_a_core_are_sent_ahead(lab: Lab) -> None:
    lab.node(cores=2)
    lab.open()
    lab.submit(1000)
    lab.ended(success(lab.attempt(0), 0, wall_s=0.000_001))
    node = lab.state.nodes[NodeName("n1")]
    assert len(node.ahead) == 2 * limits.LOOK_AHEAD_PER_CORE_MAX


@pytest.mark.parametrize(("wall_s", "options"), [(0.2, {}), (0.001, {"idempotent": False})], ids=["long", "once"])
def test_long_tasks_and_those_that_may_run_once_are_never_sent_ahead(
    lab: Lab, wall_s: float, options: dict[str, Any]
) -> None:
    lab.node(cores=1)
    lab.open(**options)
    lab.submit(100)
    assert len(starts(lab.ended(success(lab.attempt(0), 0, wall_s=wall_s)))) == 1


def test_a_free_slot_is_used_before_anything_is_sent_ahead(lab: Lab) -> None:
    lab.node("n1", cores=1)
    lab.open()
    lab.submit(3)
    lab.ended(success(lab.attempt(0), 0, wall_s=0.001))
    lab.node("n2", session=2, cores=4)
    lab.submit(2)
    assert (lab.place(3), lab.place(4)) == ("n2", "n2")


def test_a_request_that_no_known_node_could_meet_ends_and_names_the_largest(lab: Lab) -> None:
    lab.node("n1", cores=2)
    lab.node("n2", session=2, cores=8)
    lab.pass_time(3.0)
    lab.open(cores=64.0)
    lab.submit(2)
    assert lab.outcomes() == {0: Outcome.FAILED, 1: Outcome.FAILED}
    assert lab.failure().cause is Cause.UNSCHEDULABLE
    assert "cores=64" in lab.failure().message
    assert "n2, has cores=8" in lab.failure().message


def test_a_label_that_no_node_has_is_named(lab: Lab) -> None:
    lab.node("n1")
    lab.pass_time(3.0)
    lab.open(nodes=("gpu-rack",))
    lab.submit(1)
    assert "['gpu-rack']" in lab.failure().message


def test_nothing_is_judged_while_new_agents_come(lab: Lab) -> None:
    lab.open(cores=4.0)
    lab.submit(1)
    lab.pass_time(60.0)
    lab.node("n1", cores=2)
    lab.pass_time(1.5)
    assert lab.outcomes() == {}
    lab.node("n2", session=2, cores=4)
    assert lab.place() == "n2"


def test_what_the_first_agents_cannot_run_ends_when_no_other_comes(lab: Lab) -> None:
    lab.open(cores=4.0)
    lab.submit(1)
    lab.node("n1", cores=2)
    lab.pass_time(3.0)
    assert lab.outcomes() == {0: Outcome.FAILED}


def test_a_lost_node_that_could_run_it_is_waited_for(lab: Lab) -> None:
    lab.node("n1", cores=8)
    lab.pass_time(3.0)
    lab.do(events.AgentDisconnected(NodeName("n1"), 1))
    lab.node("n2", session=2, cores=1)
    lab.open(cores=8.0)
    lab.submit(1)
    lab.pass_time(10.0)
    assert lab.outcomes() == {}


@pytest.mark.slow
def test_a_decision_costs_the_same_with_100000_tasks_queued() -> None:
    def cost_s(queued: int) -> float:
        lab = Lab()
        lab.client()
        lab.node(cores=2)
        lab.open()
        step = 20_000
        for _ in range(queued // step):
            first = lab.state.jobs[JOB].count
            tasks = tuple(item(index=first + number) for number in range(step))
            take_step(lab.state, events.TasksSubmitted(CLIENT, JOB, first, FUNCTION, tasks, ""), lab.now_s)
        best_s = 1.0
        for _ in range(30):
            index = next(iter(lab.state.jobs[JOB].tasks))
            event = events.AttemptsEnded(NodeName("n1"), 1, (success(lab.attempt(index), index, wall_s=1.0),))
            start_s = time.perf_counter()
            take_step(lab.state, event, lab.now_s)
            best_s = min(best_s, time.perf_counter() - start_s)
        return best_s

    assert cost_s(100_000) < 5 * cost_s(20_000)


def test_what_is_stuck_in_look_ahead_is_recalled_when_another_node_is_idle(lab: Lab) -> None:
    lab.node("n1", cores=1)
    lab.open()
    lab.submit(4)
    lab.ended(success(lab.attempt(0), 0, wall_s=0.01))
    node = lab.state.nodes[NodeName("n1")]
    (stuck, *others) = node.attempts
    assert list(node.ahead) == others
    lab.started(stuck)
    lab.node("n2", session=2, cores=1)
    some = lab.pass_time(0.5)
    # One for the slot, and as many as may be sent ahead there.
    assert to_agent(some) == [CancelAttempts(tuple(others), limits.KILL_GRACE_S, waiting_only=True)]
    index = node.attempts[others[0]].index
    lab.ended(failed(others[0], Cause.CANCELLED, Outcome.CANCELLED, index))
    assert lab.place(index) == "n2"
    assert lab.state.jobs[JOB].tasks[index].ordinal == 1


def test_an_attempt_that_started_before_it_was_recalled_goes_on(lab: Lab) -> None:
    lab.node("n1", cores=1)
    lab.open()
    lab.submit(3)
    lab.ended(success(lab.attempt(0), 0, wall_s=0.01))
    lab.node("n2", session=2, cores=1)
    ahead = next(iter(lab.state.nodes[NodeName("n1")].ahead))
    index = lab.state.nodes[NodeName("n1")].attempts[ahead].index
    lab.pass_time(0.5)
    lab.started(ahead)
    lab.ended(success(ahead, index))
    assert lab.outcomes()[index] is Outcome.SUCCEEDED


def test_an_end_as_cancelled_that_nobody_asked_for_is_final_once_it_ran(lab: Lab) -> None:
    lab.node("n1", cores=1)
    lab.open()
    lab.submit(1)
    lab.started(lab.attempt())
    lab.ended(failed(lab.attempt(), Cause.CANCELLED, Outcome.CANCELLED))
    assert lab.outcomes() == {0: Outcome.CANCELLED}

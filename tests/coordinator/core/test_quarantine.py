"""A node is lost: who is suspect, who is innocent, and who is blamed in the end."""

from __future__ import annotations

import pytest

from herder_coordinator.core import events, quarantine
from herder_coordinator.core.state import Task
from herder_shared.ids import AttemptId, NodeName
from herder_shared.states import Cause, Outcome, TaskState
from herder_shared.wire.messages import RunningAttempt
from support.core_lab import JOB, Lab, failed, starts, success, told_ends

GRACE_S = 1.0
BACKOFF_S = 0.5


@pytest.fixture
def lab() -> Lab:
    lab = Lab()
    lab.client()
    return lab


def lose(lab: Lab, name: str, session: int) -> list[tuple[str, int]]:
    """Kill the node's agent. What starts elsewhere: `(node, index)`."""
    lab.do(events.AgentDisconnected(NodeName(name), session))
    return started(lab, GRACE_S + BACKOFF_S)


def started(lab: Lab, seconds: float) -> list[tuple[str, int]]:
    return [(node, order.index) for node, order, _ in starts(lab.pass_time(seconds))]


def task(lab: Lab, index: int = 0) -> Task:
    return lab.state.jobs[JOB].tasks[index]


def test_suspects_run_one_to_a_node_and_nothing_is_counted(lab: Lab) -> None:
    lab.node("n1", cores=4)
    lab.open()
    lab.submit(4)
    lab.node("n2", session=2, cores=4)
    lab.node("n3", session=3, cores=4)
    assert sorted(lose(lab, "n1", 1)) == [("n2", 0), ("n3", 1)]
    assert [task(lab, index).crashes for index in range(4)] == [0] * 4
    ((node, order, _),) = starts(lab.ended(success(lab.attempt(0), 0), name="n2", session=2))
    assert (node, order.index) == ("n2", 2)


def test_other_work_runs_beside_a_suspect(lab: Lab) -> None:
    lab.node("n1", cores=1)
    lab.open()
    lab.submit(1)
    lab.node("n2", session=2, cores=2)
    assert lose(lab, "n1", 1) == [("n2", 0)]
    ((node, order, _),) = starts(lab.submit(1))
    assert (node, order.index) == ("n2", 1)


def test_a_suspect_is_trusted_when_it_has_run_for_longer_than_it_had(lab: Lab) -> None:
    lab.node("n1", cores=2)
    lab.open()
    lab.submit(2)
    for _ in range(2):
        lab.pass_time(4.0)
        lab.heard("n1")
    lab.node("n2", session=2, cores=2)
    assert lose(lab, "n1", 1) == [("n2", 0)]
    lab.started(lab.attempt(0), name="n2", session=2)
    assert started(lab, 10.5) == []
    assert started(lab, 1.0) == [("n2", 1)]


def test_a_suspect_that_has_not_started_proves_nothing(lab: Lab) -> None:
    lab.node("n1", cores=2)
    lab.open()
    lab.submit(2)
    lab.node("n2", session=2, cores=2)
    assert lose(lab, "n1", 1) == [("n2", 0)]
    assert started(lab, 20.0) == []


def test_a_suspect_whose_node_is_lost_again_is_blamed_and_its_neighbours_are_not(lab: Lab) -> None:
    lab.node("n1", cores=1)
    lab.open()
    lab.submit(1)
    lab.node("n2", session=2, cores=3)
    assert lose(lab, "n1", 1) == [("n2", 0)]
    lab.submit(2)
    lab.node("n3", session=3, cores=3)
    assert sorted(lose(lab, "n2", 2)) == [("n3", 0), ("n3", 1), ("n3", 2)]
    assert [(task(lab, n).crashes, task(lab, n).killed_on) for n in range(3)] == [(1, ("n2",)), (0, ()), (0, ())]
    assert [task(lab, n).quarantine_s > 0 for n in range(3)] == [True, False, False]


def test_a_task_that_costs_three_nodes_as_a_suspect_is_poison(lab: Lab) -> None:
    lab.open()
    lab.node("n0", cores=1)
    lab.submit(1)
    for number in range(1, 4):
        lab.node(f"n{number}", session=number + 1, cores=1)
        assert lose(lab, f"n{number - 1}", number) == [(f"n{number}", 0)]
    lab.do(events.AgentDisconnected(NodeName("n3"), 4))
    (end,) = told_ends(lab.pass_time(GRACE_S))
    assert end.outcome is Outcome.CRASHED
    assert end.failure is not None
    assert end.failure.cause is Cause.POISONED
    assert "n1, n2, n3" in end.failure.message


def test_losses_under_suspicion_use_up_max_crashes(lab: Lab) -> None:
    lab.open(max_crashes=0)
    lab.node("n1", cores=1)
    lab.submit(1)
    lab.node("n2", session=2, cores=1)
    assert lose(lab, "n1", 1) == [("n2", 0)]
    lab.do(events.AgentDisconnected(NodeName("n2"), 2))
    (end,) = told_ends(lab.pass_time(GRACE_S))
    assert end.outcome is Outcome.LOST


def test_what_was_sent_ahead_is_innocent(lab: Lab) -> None:
    lab.node("n1", cores=1)
    lab.open()
    lab.submit(1)
    lab.ended(success(lab.attempt(), wall_s=0.001, core_s=0.001))
    lab.submit(3)
    assert len(lab.state.nodes[NodeName("n1")].ahead) == 2
    lab.do(events.AgentDisconnected(NodeName("n1"), 1))
    lab.pass_time(GRACE_S)
    assert [task(lab, n).quarantine_s > 0 for n in (1, 2, 3)] == [True, False, False]


def test_an_end_of_its_own_acquits(lab: Lab) -> None:
    lab.node("n1", cores=1)
    lab.open(retries=1)
    lab.submit(1)
    lab.node("n2", session=2, cores=1)
    lose(lab, "n1", 1)
    lab.ended(failed(lab.attempt(), Cause.EXCEPTION), name="n2", session=2)
    assert task(lab).quarantine_s == 0.0


def test_an_agent_that_comes_back_with_it_acquits(lab: Lab) -> None:
    lab.node("n1", cores=1)
    lab.open()
    lab.submit(1)
    attempt = lab.attempt()
    lose(lab, "n1", 1)
    assert task(lab).quarantine_s > 0
    lab.connect("n1", session=2, cores=1)
    lab.sync("n1", session=2, running=[running(attempt)])
    assert (lab.place(), task(lab).quarantine_s) == ("n1", 0.0)


def test_what_an_agent_gives_back_as_it_ends_is_counted_for_nothing_and_runs_elsewhere_at_once(lab: Lab) -> None:
    lab.node("n1", cores=1)
    lab.open(max_crashes=0)
    lab.submit(1)
    lab.node("n2", session=2, cores=1)
    given_back = failed(lab.attempt(), Cause.NODE_LOST, Outcome.LOST, start_method="fork")
    ((node, _, _),) = starts(lab.ended(given_back))
    assert (node, task(lab).crashes, task(lab).quarantine_s) == ("n2", 0, 0.0)


@pytest.mark.parametrize(("start_method", "is_lost"), [("fork", True), ("", False)])
def test_what_may_run_once_and_is_given_back_runs_if_it_had_no_child(
    lab: Lab, start_method: str, is_lost: bool
) -> None:
    lab.node("n1", cores=1)
    lab.open(idempotent=False)
    lab.submit(1)
    lab.node("n2", session=2, cores=1)
    some = lab.ended(failed(lab.attempt(), Cause.NODE_LOST, Outcome.LOST, start_method=start_method))
    assert bool(told_ends(some)) is is_lost
    assert bool(starts(some)) is not is_lost


@pytest.mark.parametrize("by_snapshot", [False, True])
def test_suspicion_outlives_the_coordinator(lab: Lab, by_snapshot: bool) -> None:
    lab.node("n1", cores=2)
    lab.open()
    lab.submit(2)
    lab.node("n2", session=2, cores=2)
    assert lose(lab, "n1", 1) == [("n2", 0)]
    lab.restart(by_snapshot=by_snapshot)
    assert [task(lab, n).quarantine_s > 0 for n in range(2)] == [True, True]
    assert quarantine.holds_suspect(lab.state.nodes[NodeName("n2")])
    assert task(lab, 1).state is TaskState.PENDING


@pytest.mark.parametrize(("ran_s", "expected_s"), [(0.0, 1.0), (8.0, 10.0), (9999.0, 60.0)])
def test_quarantine_is_as_long_as_it_ran_within_bounds(ran_s: float, expected_s: float) -> None:
    assert quarantine.quarantine_s(ran_s) == expected_s


def running(attempt: AttemptId) -> RunningAttempt:
    return RunningAttempt(attempt, JOB, 0, started=True)

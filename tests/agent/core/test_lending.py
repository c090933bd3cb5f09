"""Cores of a task that waits for tasks of its own: given up, and back before it goes on."""

from __future__ import annotations

import pytest

from agent.core.test_step import CLEAN, KEY, ONE, SPEC, Machine, ended, ident, order, send
from herder_agent.core import effects as fx
from herder_agent.core import events as ev
from herder_agent.core import lending
from herder_shared.states import CoreState, Outcome
from herder_shared.wire.messages import JobBrief, TaskOptions


def lent(n: int) -> fx.ReportSlot:
    return fx.ReportSlot(ident(n), lent=True)


def back(n: int) -> fx.ReportSlot:
    return fx.ReportSlot(ident(n), lent=False)


def resumed(n: int, wait: int, *cpus: int) -> fx.ResumeTask:
    return fx.ResumeTask(ident(n), wait, cpus)


@pytest.fixture
def machine() -> Machine:
    """One core, and attempt 1 that runs on it in child 1; children 2 and 3 are idle."""
    machine = Machine(cores=1).serving()
    machine.take(ev.ChildStarted(1))
    return machine


def exited(machine: Machine, child: int) -> list[fx.Effect]:
    three = (ev.ChildAnswered(child, ONE), ev.ChildExited(child, CLEAN), ev.LeftoversGone())
    return [effect for event in three for effect in machine.take(event)]


def test_its_cores_run_others_while_it_waits_and_it_goes_on_before_what_is_queued(machine: Machine) -> None:
    assert machine.order(2, 3) == []
    assert machine.take(ev.WaitBegan(ident(1))) == [lent(1), send(2, 2)]
    assert machine.take(ev.WaitEnded(ident(1), 1)) == [back(1)]
    effects = exited(machine, 2)
    assert resumed(1, 1, 0) in effects
    assert not any(isinstance(effect, fx.SendTask) for effect in effects)
    assert list(machine.state.queue) == [ident(3)]


def test_what_wants_to_go_on_does_so_at_once_where_cores_are_free(machine: Machine) -> None:
    machine.take(ev.WaitBegan(ident(1)))
    assert machine.take(ev.WaitEnded(ident(1), 7)) == [back(1), resumed(1, 7, 0)]
    assert machine.take(ev.WaitEnded(ident(1), 8)) == [resumed(1, 8, 0)]  # it holds them


def test_first_come_first_served() -> None:
    machine = Machine(cores=1).serving()
    machine.take(ev.ChildStarted(1))
    machine.take(ev.WaitBegan(ident(1)))
    machine.order(2, 3)
    machine.take(ev.WaitBegan(ident(2)))  # not started yet, as far as we know: it has, or it could not wait
    (running,) = [
        child.id for child in machine.state.children.values() if child.attempt and child.attempt.id == ident(3)
    ]
    machine.take(ev.WaitEnded(ident(2), 1))
    machine.take(ev.WaitEnded(ident(1), 1))
    effects = exited(machine, running)
    assert resumed(2, 1, 0) in effects
    assert resumed(1, 1, 0) not in effects
    assert machine.take(ev.WaitBegan(ident(2))) == [lent(2), resumed(1, 1, 0)]


def test_a_wait_that_begins_while_it_wants_to_go_on_ends_the_wish(machine: Machine) -> None:
    machine.take(ev.WaitBegan(ident(1)))
    machine.order(2)
    assert machine.take(ev.WaitEnded(ident(1), 1)) == [back(1)]
    assert machine.take(ev.WaitEnded(ident(1), 2)) == []
    assert machine.take(ev.WaitBegan(ident(1))) == [lent(1)]
    assert machine.take(ev.WaitBegan(ident(1))) == []
    assert not machine.state.returning


def test_time_given_up_is_not_charged_and_counts_as_idle(machine: Machine) -> None:
    machine.take(ev.WaitBegan(ident(1)), after_s=2.0)
    machine.take(ev.WaitEnded(ident(1), 1), after_s=5.0)
    machine.tick(1.0)
    (report,) = ended(exited(machine, 1))
    assert report.usage.core_s == 3.0
    assert machine.state.account.seconds[CoreState.TASK] == 3.0
    assert machine.state.account.seconds[CoreState.IDLE] == 5.0


def test_memory_stays_with_it() -> None:
    machine = Machine(cores=1, memory_bytes=1 << 29).serving()
    machine.take(ev.ChildStarted(1))
    machine.take(ev.WaitBegan(ident(1)))
    assert machine.state.slots.memory_bytes == 1 << 29
    exited(machine, 1)
    assert machine.state.slots.memory_bytes == 1 << 30


@pytest.mark.parametrize("returns", [False, True])
def test_one_that_ends_while_its_cores_are_lent_leaves_nothing(machine: Machine, returns: bool) -> None:
    machine.take(ev.WaitBegan(ident(1)))
    machine.order(2)
    if returns:
        machine.take(ev.WaitEnded(ident(1), 1))
    machine.take(ev.CancelOrdered((ident(1),), 1.0))
    machine.take(ev.ChildExited(1, ev.Exit(15)))
    (report,) = ended(machine.take(ev.LeftoversGone()))
    assert report.outcome is Outcome.CANCELLED
    assert not machine.state.lent
    assert not machine.state.returning
    assert machine.state.slots.used == 1  # attempt 2


def test_a_wide_one_that_wants_to_go_on_is_not_overtaken_for_ever() -> None:
    machine = Machine(cores=2)
    machine.options = TaskOptions(cores=2)
    machine.serving()
    machine.take(ev.ChildStarted(1))
    machine.take(ev.WaitBegan(ident(1)))
    narrow = JobBrief(order(2).job, "job", KEY, TaskOptions())
    machine.take(ev.AttemptsOrdered(1, (order(2), order(3), order(4)), (SPEC,), (narrow,)))
    assert list(machine.state.queue) == [ident(4)]
    machine.take(ev.WaitEnded(ident(1), 1))
    first, second = (
        child.id for child in list(machine.state.children.values()) if child.attempt and child.attempt.id != ident(1)
    )
    assert not any(isinstance(effect, fx.SendTask) for effect in exited(machine, first))
    assert resumed(1, 1, 0, 1) in exited(machine, second)


def test_a_node_does_not_drown_in_processes_that_wait(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending, "LENT_MAX", 1)
    machine.take(ev.WaitBegan(ident(1)))
    machine.order(2)
    machine.take(ev.ChildStarted(2))
    (refused,) = machine.take(ev.WaitBegan(ident(2)))
    assert isinstance(refused, fx.RefuseClient)
    assert "1 tasks of node n1 wait for tasks of their own already" in refused.message


def test_the_coordinator_is_told_again_after_a_reconnection(machine: Machine) -> None:
    machine.take(ev.WaitBegan(ident(1)))
    machine.take(ev.Disconnected(1))
    (sync,) = [effect for effect in machine.take(ev.Connected(2)) if isinstance(effect, fx.SendSync)]
    assert [one.lent for one in sync.running] == [True]


def test_late_words_of_what_has_ended_are_nothing(machine: Machine) -> None:
    exited(machine, 1)
    assert machine.take(ev.WaitBegan(ident(1))) == []
    assert machine.take(ev.WaitEnded(ident(1), 1)) == []

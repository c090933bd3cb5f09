"""Short tasks in a crowd come with their fork; nothing else does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from agent.core.test_step import CLEAN, KEY, ONE, SPEC, Machine, ended, ident, order
from herder_agent.core import effects as fx
from herder_agent.core import events as ev
from herder_agent.core.branches import FORKS
from herder_agent.core.launchers import BRIEF_S
from herder_shared.ids import BlobId
from herder_shared.states import Outcome
from herder_shared.wire.messages import Payload, TaskOptions, WorkloadSpec

SHORT = replace(ONE, wall_s=BRIEF_S / 10)


def crowd(answer: ev.Answer = SHORT, spec: WorkloadSpec = SPEC, **options: Any) -> Machine:
    """One core, a task that has taken so long, and attempts 2 to 9 queued behind it; no child is idle."""
    machine = Machine(cores=1, spec=spec, **options)
    machine.order(*range(1, 10))
    forks = machine.ready()
    assert isinstance(forks[0], fx.ForkChildren)
    machine.forked(forks[0].children[0])
    machine.take(ev.ChildAnswered(1, answer))
    for child in forks[0].children[1:]:
        machine.take(ev.ChildForkFailed(child, "as a test says"))
    machine.now_s += 10.0
    return machine


def run(child: int, n: int) -> fx.RunTask:
    return fx.RunTask(1, child, order(n), "job", TaskOptions(), fx.Grant((0,), 1, ()))


def leave(machine: Machine) -> list[fx.Effect]:
    """The first task's process ends, and its slot is free."""
    machine.take(ev.ChildExited(1, CLEAN))
    return machine.take(ev.LeftoversGone())


def kinds(effects: Sequence[fx.Effect]) -> list[str]:
    return [type(effect).__name__ for effect in effects]


def test_short_task_of_a_crowd_is_sent_to_the_template() -> None:
    machine = crowd()
    number = machine.state.last_child + 1
    assert leave(machine) == [run(number, 2)]


def test_its_end_is_reported_and_the_next_one_is_sent_in_one_step() -> None:
    machine = crowd()
    leave(machine)
    child = machine.state.last_child
    effects = machine.take(ev.ChildDone(child, 77, replace(SHORT, user_s=0.25), CLEAN))
    assert effects[1:] == [run(child + 1, 3)]
    (end,) = ended(effects)
    assert (end.attempt, end.outcome, end.result) == (ident(2), Outcome.SUCCEEDED, Payload(b"1", None, 1))
    assert (end.usage.pid, end.usage.start_method, end.usage.cpu_user_s) == (77, "fork", 0.25)


def test_one_that_crashed_ends_as_any_other() -> None:
    machine = crowd()
    leave(machine)
    child = machine.state.last_child
    effects = machine.take(ev.ChildDone(child, 77, None, ev.Exit(11)))
    (end,) = ended(effects + machine.take(ev.LeftoversGone()))
    assert (end.outcome, end.failure.signal if end.failure else 0) == (Outcome.CRASHED, 11)


def test_one_that_takes_longer_is_known_by_its_process_and_can_be_stopped() -> None:
    machine = crowd(timeout_s=5.0)
    leave(machine)
    child = machine.state.last_child
    assert machine.take(ev.ChildForked(child, 78)) == [fx.ReportStarted(ident(2))]
    assert fx.SignalChild(child, 15) in machine.tick(5.0)
    (end,) = ended(machine.take(ev.ChildExited(child, ev.Exit(15))) + machine.take(ev.LeftoversGone()))
    assert (end.outcome, end.usage.pid) == (Outcome.TIMED_OUT, 78)


def test_one_that_is_cancelled_before_anybody_hears_of_it_is_signalled() -> None:
    machine = crowd()
    leave(machine)
    child = machine.state.last_child
    assert machine.take(ev.CancelOrdered((ident(2),), 1.0)) == [fx.SignalChild(child, 15)]
    (end,) = ended(machine.take(ev.ChildDone(child, 77, SHORT, CLEAN)))
    assert end.outcome is Outcome.CANCELLED


def test_template_that_dies_loses_them_without_blame() -> None:
    machine = crowd()
    leave(machine)
    child = machine.state.last_child
    effects = machine.take(ev.TemplateExited(1, "killed"))
    assert fx.DropChild(child) in effects
    (end,) = ended(machine.take(ev.LeftoversGone()))
    assert end.outcome is Outcome.LOST


@pytest.mark.parametrize(
    ("answer", "spec", "options"),
    [
        (replace(ONE, wall_s=BRIEF_S * 2), SPEC, {}),
        (SHORT, SPEC, {"memory_bytes": 1 << 20}),
        (SHORT, WorkloadSpec(KEY, pids=7), {}),
    ],
    ids=["long", "with a memory limit", "with a process limit"],
)
def test_others_wait_for_a_child(answer: ev.Answer, spec: WorkloadSpec, options: dict[str, Any]) -> None:
    machine = crowd(answer, spec, **options)
    assert "RunTask" not in kinds(leave(machine))
    assert machine.state.children, "children are asked for"


def test_one_that_needs_files_waits_for_a_child() -> None:
    machine = Machine(cores=1)
    machine.order(1)
    machine.ready()
    machine.forked(1)
    machine.take(ev.ChildAnswered(1, SHORT))
    for child in list(machine.state.children):
        if child > 1:
            machine.take(ev.ChildForkFailed(child, "as a test says"))
    machine.now_s += 10.0
    machine.order(2, args=Payload(b"", BlobId("b"), 100_000))
    machine.order(*range(3, 9))
    machine.take(ev.BlobsArrived(ident(2)))
    assert set(kinds(leave(machine))) == {"ForkChildren"}


def test_few_tasks_find_children_ready() -> None:
    machine = Machine(cores=1).serving()
    machine.take(ev.ChildAnswered(1, SHORT))
    leave(machine)
    assert kinds(machine.order(2)) == ["SendTask"]


def test_a_crowd_of_them_soon_has_two_templates_to_fork_them() -> None:
    machine = Machine(cores=2)
    machine.order(*range(1, 200))
    forks = machine.ready()
    assert isinstance(forks[0], fx.ForkChildren)
    machine.forked(*forks[0].children[:2])
    for child in forks[0].children[2:]:
        machine.take(ev.ChildForkFailed(child, "as a test says"))
    machine.now_s += 10.0
    for child in forks[0].children[:2]:
        machine.take(ev.ChildAnswered(child, SHORT))
        machine.take(ev.ChildExited(child, CLEAN))
    running = [effect for effect in machine.take(ev.LeftoversGone()) if isinstance(effect, fx.RunTask)]
    seen: list[str] = []
    for _ in range(FORKS):
        effects = machine.take(ev.ChildDone(running.pop(0).child, 77, SHORT, CLEAN))
        running += [effect for effect in effects if isinstance(effect, fx.RunTask)]
        seen += kinds(effects)
    assert seen.count("BranchTemplate") == 1
    machine.ready(template=2)
    effects = machine.take(ev.ChildDone(running.pop(0).child, 77, SHORT, CLEAN))
    assert [effect.template for effect in effects if isinstance(effect, fx.RunTask)] == [2], "it has fewest children"

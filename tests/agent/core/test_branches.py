"""Which templates are forked from which, when there are more than one, and how long they are kept."""

from __future__ import annotations

from typing import Any

import pytest

from herder_agent.core import effects as fx
from herder_agent.core import events as ev
from herder_agent.core.branches import FORKS, order_children
from herder_agent.core.launchers import IDLE_CHILD_S, IDLE_TEMPLATE_S, report_of
from herder_agent.core.state import State, Workload, check_invariants, new_state
from herder_agent.core.step import next_deadline_s, step
from herder_shared.ids import AttemptId, BlobId, JobId, NodeName, WorkloadKey
from herder_shared.states import Cause
from herder_shared.wire.messages import AttemptStart, JobBrief, Payload, TaskOptions, WorkloadSpec

MIB = 1 << 20


def spec(name: str, *preload: str, **fields: Any) -> WorkloadSpec:
    return WorkloadSpec(WorkloadKey(name * 16), preload=preload, **fields)


ONE = spec("a", "numpy")
TWO = spec("b", "numpy", "pandas")


class Machine:
    """The core with several workloads; templates and children come when a test says so."""

    def __init__(self, cores: int = 4) -> None:
        self.now_s = 100.0
        self.state: State = new_state(NodeName("n1"), cores, 1 << 30, self.now_s)
        self.last = 0
        self.take(ev.Connected(1))

    def take(self, event: ev.Event) -> list[fx.Effect]:
        effects = step(self.state, event, self.now_s)
        check_invariants(self.state)
        return [each for each in effects if not isinstance(each, fx.ReportWorkload | fx.Observe)]

    def order(self, workload: WorkloadSpec, count: int = 1) -> list[fx.Effect]:
        job = JobId(workload.key)
        ids = range(self.last + 1, self.last + 1 + count)
        self.last += count
        orders = tuple(AttemptStart(AttemptId(1, n), job, n, 1, BlobId("f"), Payload(b"x")) for n in ids)
        return self.take(
            ev.AttemptsOrdered(1, orders, (workload,), (JobBrief(job, "job", workload.key, TaskOptions()),))
        )

    def ready(self, template: int, point: str = "import numpy", start: str = "fork") -> list[fx.Effect]:
        return self.take(ev.TemplateReady(template, start, point, "", "3.11/3.1", 50 + template, 0.5, MIB))

    def fork_all(self, effects: list[fx.Effect]) -> None:
        """The children of these orders come, those that come of it too; each that is given a task ends it."""
        orders = [each for each in effects if isinstance(each, fx.ForkChildren)]
        while orders:
            for child in orders.pop(0).children:
                orders += [e for e in self.take(ev.ChildForked(child, 1000 + child)) if isinstance(e, fx.ForkChildren)]

    def finish(self) -> None:
        """All attempts end, and their children."""
        for _ in range(1000):
            busy = [child for child in self.state.children.values() if child.attempt is not None]
            if not busy:
                return
            for child in busy:
                self.take(ev.ChildAnswered(child.id, ev.Answer(Payload(b"1"), wall_s=0.1)))
                self.fork_all(self.take(ev.ChildExited(child.id, ev.Exit(0))))
                self.fork_all(self.take(ev.LeftoversGone()))
        raise AssertionError("no end")

    def stop_idle(self) -> None:
        """Children that were asked to end do so."""
        for child in [child for child in self.state.children.values() if child.phase == "stopping"]:
            self.take(ev.ChildExited(child.id, ev.Exit(0)))

    def pass_time(self, seconds: float) -> list[fx.Effect]:
        until_s, effects = self.now_s + seconds, []
        while (due_s := next_deadline_s(self.state)) is not None and due_s <= until_s:
            self.now_s = max(self.now_s, due_s)
            effects += self.take(ev.Ticked())
            self.stop_idle()
        self.now_s = until_s
        return effects

    def workload(self, which: WorkloadSpec) -> Workload:
        return self.state.workloads[which.key]

    def serving(self, which: WorkloadSpec = ONE) -> Machine:
        """Its template is ready and a task has run."""
        self.order(which)
        self.fork_all(self.ready(self.state.last_template, f"import {which.preload[-1]}"))
        self.finish()
        return self


# --- trees -----------------------------------------------------------------------------------------------------------


def test_workload_whose_preload_extends_anothers_is_forked_from_its_template() -> None:
    machine = Machine().serving()
    assert machine.order(TWO) == [fx.BranchTemplate(2, 1, TWO)]


def test_setup_beyond_the_same_preload_extends_it_too() -> None:
    with_setup = spec("c", "numpy", setup=b"s")
    assert Machine().serving().order(with_setup) == [fx.BranchTemplate(2, 1, with_setup)]


def test_the_longest_of_several_is_taken() -> None:
    machine = Machine().serving()
    machine.serving(TWO)
    three = spec("c", "numpy", "pandas", "pyarrow")
    assert machine.order(three) == [fx.BranchTemplate(3, 2, three)]


@pytest.mark.parametrize(
    "new",
    [
        pytest.param(spec("b", "pandas", "numpy"), id="another order"),
        pytest.param(spec("b", "numpy"), id="the same steps"),
        pytest.param(spec("b"), id="fewer steps"),
        pytest.param(spec("b", "numpy", "pandas", env={"A": "1"}), id="environment"),
        pytest.param(spec("b", "numpy", "pandas", python="/usr/bin/python3"), id="interpreter"),
        pytest.param(spec("b", "numpy", "pandas", prologue="module load x"), id="prologue"),
        pytest.param(spec("b", "numpy", "pandas", working_dir="/tmp"), id="folder"),
        pytest.param(spec("b", "numpy", "pandas", paths=("/tmp",)), id="paths"),
        pytest.param(spec("b", "numpy", "pandas", allow_threads=("x",)), id="allowed threads"),
    ],
)
def test_what_differs_otherwise_is_started_by_itself(new: WorkloadSpec) -> None:
    assert Machine().serving().order(new) == [fx.StartTemplate(2, new)]


def test_template_with_setup_or_with_steps_left_to_its_children_is_no_stem() -> None:
    with_setup = spec("a", "numpy", setup=b"s")
    machine = Machine()
    machine.order(with_setup)
    machine.ready(1, "setup")
    assert machine.order(TWO) == [fx.StartTemplate(2, TWO)]
    machine = Machine()
    machine.order(ONE)
    machine.ready(1, "start")
    assert machine.order(TWO) == [fx.StartTemplate(2, TWO)]


def test_template_that_is_not_ready_or_was_demoted_is_no_stem() -> None:
    machine = Machine()
    machine.order(ONE)
    assert machine.order(TWO) == [fx.StartTemplate(2, TWO)]
    machine = Machine().serving()
    machine.take(ev.AttemptsOrdered(1, (), (spec("a", "numpy", demoted="crashes"),)))
    effects = machine.order(TWO)
    assert [each.workload for each in effects if isinstance(each, fx.StartTemplate)] == [TWO]


@pytest.mark.parametrize("how", ["not branched", "ended"])
def test_tree_that_does_not_come_is_started_by_itself_and_no_failure_counted(how: str) -> None:
    machine = Machine().serving()
    machine.order(TWO)
    gone: ev.Event = ev.TemplateNotBranched(2, "EAGAIN") if how == "not branched" else ev.TemplateExited(2, "gone")
    assert fx.StartTemplate(3, TWO) in machine.take(gone)
    assert machine.workload(TWO).tries == 0
    machine.fork_all(machine.ready(3, "import pandas"))
    machine.finish()
    assert machine.workload(TWO).pool("fork").started == 0 or not machine.state.attempts


def test_tree_whose_setup_fails_has_failed() -> None:
    machine = Machine().serving()
    machine.order(TWO)
    machine.take(ev.TemplateFailed(2, Cause.SETUP_FAILED, "no pandas"))
    assert machine.workload(TWO).tries == 1


def test_trees_time_for_setup_is_limited() -> None:
    machine = Machine().serving()
    machine.order(TWO)
    assert fx.StopTemplate(2) in machine.pass_time(TWO.setup_timeout_s + 1)
    assert "took longer than setup_timeout" in machine.workload(TWO).error


def test_idle_template_is_kept_while_it_has_branches() -> None:
    machine = Machine().serving()
    machine.serving(TWO)
    machine.pass_time(IDLE_TEMPLATE_S - 5)
    machine.fork_all(machine.order(TWO))
    machine.finish()
    assert fx.StopTemplate(1) not in machine.pass_time(IDLE_TEMPLATE_S - 5)
    assert fx.StopTemplate(2) in machine.pass_time(40)
    machine.take(ev.TemplateExited(2))
    assert fx.StopTemplate(1) in machine.pass_time(IDLE_CHILD_S + 1)


def test_template_that_is_replaced_takes_its_trees_along_and_outlives_them() -> None:
    machine = Machine().serving()
    machine.serving(TWO)
    machine.order(TWO)  # runs
    machine.take(ev.TemplateSeen(1, 1, 0, 10 * MIB))
    effects = machine.take(ev.TemplateSeen(1, 2, 0, 10 * MIB))
    assert fx.StopTemplate(1) not in effects
    assert 2 not in [template.id for template in machine.workload(TWO).templates]
    machine.stop_idle()
    machine.finish()
    machine.stop_idle()
    assert machine.state.templates[2].state == "stopped"
    effects = machine.take(ev.TemplateExited(2))
    assert fx.StopTemplate(1) in effects


# --- replicas --------------------------------------------------------------------------------------------------------


def wanting(cores: int, spec_: WorkloadSpec = ONE) -> tuple[Machine, list[fx.Effect]]:
    """Tasks end as soon as they begin, one after the other, while all slots wait for children."""
    machine = Machine(cores)
    machine.order(spec_, cores + 4 * FORKS + 4 * cores)
    orders = [e for e in machine.ready(1) if isinstance(e, fx.ForkChildren)]
    effects: list[fx.Effect] = []
    pending = [child for order in orders for child in order.children]
    for _ in range(2 * FORKS + 2 * cores):
        child = pending.pop(0)
        got = machine.take(ev.ChildForked(child, 1000 + child))
        if machine.state.children[child].attempt is not None:
            machine.take(ev.ChildAnswered(child, ev.Answer(Payload(b"1"), wall_s=0.1)))
            got += machine.take(ev.ChildExited(child, ev.Exit(0)))
            got += machine.take(ev.LeftoversGone())
        effects += got
        pending += [each for e in got if isinstance(e, fx.ForkChildren) for each in e.children]
    return machine, effects


def test_template_that_cannot_feed_the_cores_is_forked() -> None:
    machine, effects = wanting(32)
    assert [e for e in effects if isinstance(e, fx.BranchTemplate)] == [fx.BranchTemplate(2, 1, ONE)]
    assert effects.index(fx.BranchTemplate(2, 1, ONE)) >= FORKS
    assert [info.replica for info in report_of(machine.workload(ONE)).templates] == [True, True]


def test_few_cores_need_one_template() -> None:
    _, effects = wanting(8)
    assert not [e for e in effects if isinstance(e, fx.BranchTemplate)]


def test_a_burst_that_is_answered_by_one_fork_a_slot_makes_no_replica() -> None:
    machine = Machine(128)
    machine.order(ONE, 128)
    effects = machine.ready(1)
    children = [child for e in effects if isinstance(e, fx.ForkChildren) for child in e.children]
    for child in children:
        effects += machine.take(ev.ChildForked(child, 1000 + child))
    assert len(children) >= 128 > FORKS
    assert not [e for e in effects if isinstance(e, fx.BranchTemplate)]


def with_replica() -> Machine:
    machine, _ = wanting(32)
    machine.ready(2)
    return machine


def test_children_are_asked_of_the_template_that_has_the_fewest() -> None:
    machine = with_replica()
    first, second = machine.workload(ONE).templates
    before = first.children
    effects: list[fx.Effect] = []
    order_children(machine.state, machine.workload(ONE).pool("fork"), before - second.children + 6, effects)
    assert (first.children, second.children) == (before + 3, before + 3)
    assert {each.template: len(each.children) for each in effects if isinstance(each, fx.ForkChildren)}[1] == 3


def test_replica_that_fails_to_come_is_done_without() -> None:
    machine, _ = wanting(32)
    machine.take(ev.TemplateNotBranched(2, "EAGAIN"))
    assert [template.id for template in machine.workload(ONE).templates] == [1]
    machine.workload(ONE).pool("fork").in_want = 10 * FORKS
    assert not [e for e in machine.order(ONE, 100) if isinstance(e, fx.BranchTemplate)]
    assert machine.workload(ONE).tries == 0


def test_replica_that_is_not_ready_in_time_is_stopped() -> None:
    machine, _ = wanting(32)
    assert fx.StopTemplate(2) in machine.pass_time(ONE.setup_timeout_s + 1)
    assert machine.workload(ONE).error == ""
    assert machine.workload(ONE).template is not None


def test_attempts_of_a_replica_that_dies_are_lost_and_others_go_on() -> None:
    machine = with_replica()
    machine.take(ev.TemplateExited(2, "killed"))
    assert [template.id for template in machine.workload(ONE).templates] == [1]
    assert all(child.template == 1 for child in machine.state.children.values())


def test_template_that_dies_takes_its_replicas_along() -> None:
    machine = with_replica()
    effects = machine.take(ev.TemplateExited(1, "killed"))
    assert fx.StartTemplate(3, ONE) in effects
    machine.take(ev.TemplateExited(2, "killed with it"))
    assert [template.id for template in machine.workload(ONE).templates] == [3]
    assert machine.workload(ONE).tries == 0


def test_replicas_end_when_they_are_not_needed_and_their_template_stays() -> None:
    machine = with_replica()
    for attempt in list(machine.state.queue):
        machine.take(ev.AttemptsAcked((attempt,)))
    machine.finish()
    for attempt in list(machine.state.attempts):
        machine.take(ev.AttemptsAcked((attempt,)))
    for child in list(machine.state.children.values()):
        if child.phase == "forking":
            machine.take(ev.ChildForked(child.id, 1))
    machine.finish()
    effects = machine.pass_time(2 * IDLE_CHILD_S + 2)
    assert fx.StopTemplate(2) in effects or machine.state.templates[2].state == "stopped"
    assert fx.StopTemplate(1) not in effects


def test_replica_that_changed_has_all_of_them_replaced() -> None:
    machine = with_replica()
    machine.take(ev.TemplateSeen(2, 1, 0, 10 * MIB))
    assert [template.id for template in machine.workload(ONE).templates] == [1, 2]
    effects = machine.take(ev.TemplateSeen(2, 3, 0, 10 * MIB))
    assert not {1, 2} & {template.id for template in machine.workload(ONE).templates}
    stopped = {each.template for each in effects if isinstance(each, fx.StopTemplate)}
    assert stopped | set(machine.state.retiring) == {1, 2}

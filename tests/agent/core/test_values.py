"""Setup's value for fresh interpreters: publisher, limits, fallback."""

from __future__ import annotations

from agent.core.test_step import CLEAN, KEY, ONE, Machine, ended, ident, send
from herder_agent.core import effects as fx
from herder_agent.core import events as ev
from herder_agent.core.launchers import IDLE_TEMPLATE_S, report_of
from herder_agent.core.state import ChildPhase
from herder_shared.limits import TEMPLATE_TRIES_MAX
from herder_shared.states import Cause
from herder_shared.wire.messages import WorkloadReport, WorkloadSpec

FRESH = WorkloadSpec(KEY, start="fresh", setup=b"setup", setup_timeout_s=20.0)
FORKS = WorkloadSpec(KEY, setup=b"setup", setup_timeout_s=20.0)


def _published(template: int, *, refusal: str = "") -> ev.TemplateReady:
    return ev.TemplateReady(
        template,
        "fresh",
        "",
        "asked for",
        "3.11/3.1",
        900,
        0.1,
        1000,
        setup_mode="per child" if refusal else "mapped",
        setup_s=2.0,
        has_value=not refusal,
        not_published=refusal,
    )


def _report(machine: Machine) -> WorkloadReport:
    return report_of(machine.state.workloads[KEY])


def test_fresh_interpreters_wait_for_the_publisher() -> None:
    machine = Machine(cores=1, spec=FRESH)
    assert machine.order(1) == [fx.StartTemplate(1, FRESH, publish=True)]
    effects = machine.take(_published(1))
    assert effects == [fx.StopTemplate(1), fx.StartTemplate(2, None), fx.SpawnFresh(2, 1, FRESH)]
    assert machine.take(ev.TemplateExited(1)) == []
    machine.forked(1)
    assert machine.take(ev.ChildIdle(1))[0] == send(1, 1)
    report = _report(machine)
    assert (report.setup_mode, report.setup_s, report.notes) == ("mapped", 2.0, ())


def test_value_that_does_not_pickle_makes_children_be_used_again() -> None:
    machine = Machine(cores=1, spec=FRESH)
    machine.order(1, 2)
    machine.take(_published(1, refusal="a lock"))
    machine.forked(1)
    assert machine.take(ev.ChildIdle(1))[0] == send(1, 1, reuses=True)
    machine.take(ev.ChildStarted(1))
    effects = machine.take(ev.ChildAnswered(1, ONE))
    assert [effect.child for effect in effects if isinstance(effect, fx.SendTask)] == [1]
    report = _report(machine)
    assert report.setup_mode == "per child"
    assert "a lock" in report.notes[0]
    assert "saved 2 s" in report.notes[0]


def test_who_asked_for_one_task_per_child_gets_it() -> None:
    spec = WorkloadSpec(KEY, start="fresh", setup=b"setup", max_tasks_given=True)
    machine = Machine(cores=1, spec=spec)
    machine.order(1, 2)
    machine.take(_published(1, refusal="a lock"))
    machine.forked(1)
    assert machine.take(ev.ChildIdle(1))[0] == send(1, 1)
    assert "used again" not in _report(machine).notes[0]


def test_fresh_attempt_of_a_forking_workload_has_a_publisher_of_its_own() -> None:
    machine = Machine(cores=2, spec=FORKS)
    assert machine.order(1) == [fx.StartTemplate(1, FORKS)]
    ready = ev.TemplateReady(1, "fork", "setup", "", "3.11/3.1", 900, 0.1, 1000, setup_mode="forked", setup_s=2.0)
    machine.take(ready)
    assert machine.order(2, start="fresh") == [fx.StartTemplate(2, FORKS, publish=True)]
    assert machine.take(_published(2))[0] == fx.StopTemplate(2)
    assert _report(machine).setup_mode == "forked"
    assert machine.state.workloads[KEY].template is machine.state.templates[1]


def test_template_that_published_makes_a_publisher_superfluous() -> None:
    machine = Machine(cores=2, spec=FORKS)
    machine.order(1)
    ready = ev.TemplateReady(1, "fork", "setup", "", "", 9, 0.1, 1, setup_mode="mapped", setup_s=2.0, has_value=True)
    machine.take(ready)
    effects = machine.order(2, start="fresh")
    assert [type(effect) for effect in effects] == [fx.StartTemplate, fx.SpawnFresh]
    assert effects[0] == fx.StartTemplate(2, None)


def test_failing_publisher_is_tried_so_often_and_then_fails_the_attempts() -> None:
    machine = Machine(cores=1, spec=FRESH)
    machine.order(1)
    for template in range(1, TEMPLATE_TRIES_MAX):
        assert ended(machine.take(ev.TemplateFailed(template, Cause.SETUP_FAILED, "no"))) == []
        assert machine.take(ev.TemplateExited(template)) == [fx.StartTemplate(template + 1, FRESH, publish=True)]
    (end,) = ended(machine.take(ev.TemplateFailed(TEMPLATE_TRIES_MAX, Cause.SETUP_FAILED, "no")))
    assert (end.attempt, end.failure and end.failure.cause) == (ident(1), Cause.SETUP_FAILED)


def test_setup_that_takes_too_long_is_a_failed_try() -> None:
    for spec in (FRESH, FORKS):
        machine = Machine(cores=1, spec=spec)
        machine.order(1)
        assert machine.tick(19.0) == []
        assert machine.tick(1.0) == [fx.StopTemplate(1)]
        (restart,) = machine.take(ev.TemplateExited(1))
        assert isinstance(restart, fx.StartTemplate)
        assert "setup_timeout (20 s)" in _report(machine).error


def test_setup_that_was_in_time_is_left_alone() -> None:
    machine = Machine(cores=1, spec=FORKS)
    machine.order(1)
    machine.take(ev.TemplateReady(1, "fork", "setup", "", "", 9, 0.1, 1))
    assert fx.StopTemplate(1) not in machine.tick(20.0)


def test_fresh_interpreter_that_does_not_become_warm_in_time_is_killed() -> None:
    machine = Machine(cores=1, spec=FRESH)
    machine.order(1)
    machine.take(_published(1, refusal="a lock"))
    machine.forked(1)
    effects = machine.tick(20.0)
    assert effects[0] == fx.SignalChild(1, 9)
    assert isinstance(effects[1], fx.SpawnFresh)
    assert machine.state.children[1].phase is ChildPhase.STOPPING


def test_value_is_let_go_of_with_the_template() -> None:
    machine = Machine(cores=1, spec=FRESH)
    machine.order(1)
    machine.take(_published(1))
    machine.take(ev.TemplateExited(1))
    machine.forked(1)
    machine.take(ev.ChildIdle(1))
    machine.take(ev.ChildStarted(1))
    machine.take(ev.ChildAnswered(1, ONE))
    machine.take(ev.ChildExited(1, CLEAN))
    machine.take(ev.LeftoversGone())
    machine.forked(2)
    machine.take(ev.ChildIdle(2))
    effects: list[fx.Effect] = []
    for _ in range(10):
        effects += machine.tick(IDLE_TEMPLATE_S / 5)
    assert fx.DropValue(KEY) in effects
    machine.take(ev.ChildExited(2, CLEAN))
    assert fx.StartTemplate(3, FRESH, publish=True) in machine.order(3)

"""Setup's value for fresh interpreters: who publishes it, who waits for it, when it is let go of.

Theory of operation. A fresh interpreter of a workload with `setup` is not started before it is known whether setup's
value can be mapped. Where the workload's template has said so (its own setup was published, or does not pickle), it is
known; else a publisher is started: a template process that preloads, runs setup, hands over the memory file and ends.
The shell keeps the file's descriptor until `DropValue`. A value that does not pickle is made in each child; children
are then used again, so that it is not made for each task.
"""

from __future__ import annotations

from herder_agent.core import branches, launchers
from herder_agent.core.attempts import add_deadline
from herder_agent.core.effects import DropValue, Effect, ReportWorkload, SignalChild, StopTemplate
from herder_agent.core.events import TemplateReady
from herder_agent.core.state import ChildPhase, State, Template, TemplateState, Workload
from herder_shared.states import Cause

_SIGKILL = 9


def wait_for_value(state: State, workload: Workload, now_s: float, effects: list[Effect]) -> bool:
    """Whether fresh interpreters must wait for setup's value; its publisher is started when there is none."""
    if not workload.has_setup or workload.value:
        return False
    if workload.publisher is None and workload.refusal is None:
        workload.publisher = launchers.start_template(state, workload, now_s, effects, publish=True)
        effects.append(ReportWorkload(launchers.report_of(workload)))
    return True


def note_setup(workload: Workload, event: TemplateReady) -> None:
    """What a template that is ready says of setup's value."""
    if event.setup_mode:
        workload.setup_mode = event.setup_mode
    if event.setup_s is not None:
        workload.setup_s = event.setup_s
    if event.has_value:
        workload.value = "mapped"
    elif event.not_published:
        workload.value, workload.not_published = "none", event.not_published


def published(state: State, workload: Workload, template: Template, event: TemplateReady) -> list[Effect]:
    """The publisher has run setup."""
    mode = workload.setup_mode
    note_setup(workload, event)
    if not workload.value:
        workload.value = "none"
    if mode and workload.method == "fork":
        workload.setup_mode = mode  # how its forked children get it has not changed
    workload.publisher = None
    workload.tries, workload.error = 0, ""
    workload.python = workload.python or event.python
    template.state = TemplateState.STOPPED
    launchers.touch(state, workload.pool("fresh"))
    return [StopTemplate(template.id), ReportWorkload(launchers.report_of(workload))]


def drop_value(workload: Workload, effects: list[Effect]) -> None:
    """The workload is not used any more: the next fresh interpreter has setup run again."""
    if workload.value == "mapped":
        effects.append(DropValue(workload.spec.key))
    workload.value = ""


def limit_setup(state: State, template: Template, now_s: float) -> None:
    """A template's preload and setup must be done by then."""
    if template.workload is not None:
        add_deadline(state, now_s + template.workload.spec.setup_timeout_s, "setup", template.id)


def setup_due(state: State, number: int, now_s: float, effects: list[Effect]) -> None:
    """This template's time for preload and setup is over."""
    template = state.templates.get(number)
    if template is None or template.workload is None or template.state is not TemplateState.STARTING:
        return
    workload = template.workload
    if template in workload.replicas:
        branches.replica_overdue(state, template, effects)
        return
    template.state = TemplateState.FAILED
    effects.append(StopTemplate(template.id))
    launchers.start_failed(state, workload, Cause.SETUP_FAILED, _overdue(workload), "", now_s, effects)


def warming_due(state: State, number: int, now_s: float, effects: list[Effect]) -> None:
    """This fresh interpreter's time for preload and setup is over."""
    child = state.children.get(number)
    if child is None or child.phase is not ChildPhase.WARMING:
        return
    child.pool.coming -= 1
    child.phase = ChildPhase.STOPPING
    effects.append(SignalChild(child.id, _SIGKILL))
    workload = child.pool.workload
    launchers.start_failed(state, workload, Cause.SETUP_FAILED, _overdue(workload), "", now_s, effects)
    launchers.touch(state, child.pool)


def _overdue(workload: Workload) -> str:
    done = f"; the last step done was {workload.steps[-1].step!r}" if workload.steps else ""
    return f"preload and setup took longer than setup_timeout ({workload.spec.setup_timeout_s:g} s){done}"


def setup_mode(workload: Workload) -> str:
    """How tasks get setup's value, as reported."""
    if not workload.has_setup:
        return ""
    if workload.method == "fresh":
        return {"mapped": "mapped", "none": "per child"}.get(workload.value, "")
    return workload.setup_mode


def notes(workload: Workload) -> tuple[str, ...]:
    """What the user may want to know of how setup's value is had."""
    if setup_mode(workload) != "per child":
        return ()
    seconds = f" ({workload.setup_s:.3g} s each time)" if workload.setup_s is not None else ""
    text = f"setup runs in each child{seconds}: its value cannot be shared: {workload.not_published}".rstrip(": ")
    if workload.spec.max_tasks_per_child == 1 and not workload.spec.max_tasks_given:
        saved_s = workload.reused * (workload.setup_s or 0.0)
        text += (
            f". So children are used again, which saved {saved_s:.3g} s until now; "
            "max_tasks_per_child=1 gives each task its own process all the same"
        )
    return (text,)

"""What is done about children that hang, templates that change, and workloads which are not to be forked any more.

**Children.** `Watch` decides, look by look, whether a child's process can ever go on. A look is cheap (its state and
its CPU time). One that sleeps and has used no CPU time since the last look is looked at thoroughly, `POLLS` times
within `PROOF_S`: when all of its threads sit in untimed private futex waits each time (`template/canary.py` says why
nothing can wake them), and none of them has run in between, it is deadlocked. The second condition matters: threads
that hand a lock to and fro can be seen waiting one after the other. Whatever speaks against it puts the next look off,
later and later. A child that has not begun its task's code (it unpickles, imports) and uses no CPU time for `STALL_S`
is given up as well, without proof.

**Templates.** One that grows or gets threads after it was sealed, or whose children hang, is replaced: idle children
end, running ones finish, then it is stopped; a new one, with audit and canary of its own, is built meanwhile. At most
`REPLACED_MAX` times in `REPLACED_WITHIN_S`: what happens again and again is not cured by it, and is told instead.

**Workloads.** Whether crashes are the fork's fault is the coordinator's verdict (its core/blame.py), as the rerun may
be on another node. Here it is carried out: no more forks of this workload for the rest of this agent's life.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from herder_agent.core import branches, launchers
from herder_agent.core.attempts import kill
from herder_agent.core.effects import Effect, Observe, ReportWorkload, StopTemplate
from herder_agent.core.events import ChildHung, OracleDenied, TemplateSeen
from herder_agent.core.state import Phase, State, Template, TemplateState, Workload
from herder_shared.limits import MIB

#: Most tasks are over by the first look.
FIRST_LOOK_S = 0.1
LOOK_S_MAX = 2.0
#: Polls in a row that must agree, and how long they take: measured, hangs are recognised in 0.1 to 0.25 s.
POLLS = 5
PROOF_S = 0.2
#: Unpickling may wait for a slow file server. Longer without any CPU time it does not.
STALL_S = 120.0
#: A sealed template allocates next to nothing.
GROWTH_RATIO = 1.2
GROWTH_BYTES_MIN = 32 * MIB
#: Fewer tell nothing of the template, and under `auto` the coordinator's verdict comes first.
HUNG_MAX = 4
REPLACED_MAX = 3
REPLACED_WITHIN_S = 3600.0


@dataclass(frozen=True, slots=True)
class Sight:
    """One look at a process. `waits` comes with a thorough one only, `is_alone` where `Watch.is_old`."""

    cpu_ticks: int
    #: Its main thread sleeps, interruptibly.
    is_asleep: bool
    #: How often each thread has been switched, by its id, if all of them wait for what only another could give.
    waits: tuple[tuple[int, int], ...] | None = None
    #: It has no processes of its own, for which it might wait.
    is_alone: bool = False


@dataclass(frozen=True, slots=True)
class Next:
    """What follows from a look: the next one, or the end."""

    wait_s: float
    is_thorough: bool = False
    hung: str = ""


@dataclass(slots=True)
class Watch:
    """The looks at one child. Invariant: `polls` > 0 exactly while `waits` is what the last look saw."""

    since_s: float
    period_s: float = FIRST_LOOK_S
    cpu_ticks: int = -1
    polls: int = 0
    waits: tuple[tuple[int, int], ...] = field(default=())
    is_armed: bool = False

    def take(self, sight: Sight, now_s: float) -> Next:
        """Take one look's result."""
        was_armed, self.is_armed = self.is_armed, False
        if sight.cpu_ticks != self.cpu_ticks:
            is_first, self.cpu_ticks = self.cpu_ticks < 0, sight.cpu_ticks
            self.since_s = now_s if not is_first else self.since_s
            if not is_first or not sight.is_asleep:
                return self._later()
        if not was_armed:
            if not sight.is_asleep:
                return self._later()
            self.is_armed, self.polls = True, 0
            return Next(0.0, is_thorough=True)
        return self._take_thorough(sight, now_s)

    def is_old(self, now_s: float) -> bool:
        """It has used no CPU time for so long that it may have stalled."""
        return now_s - self.since_s >= STALL_S

    def _take_thorough(self, sight: Sight, now_s: float) -> Next:
        if sight.waits is None or (self.polls and sight.waits != self.waits):
            return Next(LOOK_S_MAX, hung="stall") if sight.is_alone and self.is_old(now_s) else self._later()
        self.waits = sight.waits
        self.polls += 1
        if self.polls >= POLLS:
            return Next(LOOK_S_MAX, hung="deadlock")
        self.is_armed = True
        return Next(PROOF_S / (POLLS - 1), is_thorough=True)

    def _later(self) -> Next:
        self.polls = 0
        self.period_s = min(2.0 * self.period_s, LOOK_S_MAX)
        return Next(self.period_s)


# --- children --------------------------------------------------------------------------------------------------------


def child_hung(state: State, event: ChildHung, now_s: float, effects: list[Effect]) -> None:
    """Kill a child that cannot go on. One that only stalls is left alone once its task's code runs."""
    child = state.children.get(event.child)
    attempt = child.attempt if child is not None else None
    if child is None or attempt is None or attempt.answer is not None or attempt.ending is not None or attempt.hung:
        return
    if attempt.phase is not Phase.SENT and (event.how == "stall" or attempt.phase is not Phase.RUNNING):
        return
    attempt.hung = event.how
    effects.append(Observe("hung", attempt.method, text=f"child {child.pid} of {attempt.workload.spec.name!r}"))
    kill(state, attempt, now_s, effects)
    template = state.templates.get(child.template)
    if template is None or template.workload is None or child.pool.method != "fork":
        return
    template.hung += 1
    if template.hung >= HUNG_MAX:
        replace(state, template, "hung", f"{template.hung} of its children hung", now_s, effects)


def oracle_denied(state: State, event: OracleDenied, effects: list[Effect]) -> None:
    """Deadlocks cannot be proved on this node: say so with each workload that forks."""
    note = f"deadlocks of forked children cannot be proved on {state.node}: {event.reason}. Give tasks a timeout"
    if note not in state.notes:
        state.notes.append(note)
        effects.append(Observe("oracle_off", text=note))
        effects.extend(ReportWorkload(launchers.report_of(w)) for w in state.workloads.values() if w.method == "fork")


# --- templates -------------------------------------------------------------------------------------------------------


def template_seen(state: State, event: TemplateSeen, now_s: float, effects: list[Effect]) -> None:
    """Compare a template with what it was when it was sealed."""
    template = state.templates.get(event.template)
    if template is None or template.workload is None or template not in template.workload.templates:
        return
    template.shared_bytes, template.private_bytes = event.shared_bytes, event.private_bytes
    if template.sealed is None:
        template.sealed = event
        effects.append(ReportWorkload(launchers.report_of(template.workload)))
        return
    kind, why = drift(template.sealed, event)
    if kind:
        replace(state, template, kind, why, now_s, effects)


def drift(sealed: TemplateSeen, seen: TemplateSeen) -> tuple[str, str]:
    """In what a template differs from its sealed self so that it should not fork any more: a word, and a sentence."""
    if seen.threads > sealed.threads:
        return "threads", f"it has {seen.threads} threads, and had {sealed.threads} when it was sealed"
    grown_bytes = seen.private_bytes - sealed.private_bytes
    if grown_bytes > max(GROWTH_BYTES_MIN, (GROWTH_RATIO - 1.0) * sealed.private_bytes):
        return "memory", f"its memory grew by {grown_bytes >> 20} MiB since it was sealed"
    return "", ""


def replace(  # noqa: PLR0917 - the core's functions all take state, subject, time, effects
    state: State, template: Template, kind: str, why: str, now_s: float, effects: list[Effect]
) -> None:
    """Let a workload have a new template, if it has not had too many."""
    workload = template.workload
    if workload is None or template not in workload.templates:
        return
    workload.replaced_s = [at_s for at_s in workload.replaced_s if now_s - at_s < REPLACED_WITHIN_S]
    if len(workload.replaced_s) >= REPLACED_MAX:
        note = f"its template was replaced {REPLACED_MAX} times within an hour and is kept although {why}"
        if note not in workload.own_notes:
            workload.own_notes = [note]
            effects.append(ReportWorkload(launchers.report_of(workload)))
        return
    workload.replaced_s.append(now_s)
    effects.append(Observe("template_replaced", kind, text=f"{workload.spec.name!r}: {why}"))
    retire_template(state, workload, effects)
    for pool in workload.pools.values():
        launchers.touch(state, pool)
    effects.append(ReportWorkload(launchers.report_of(workload)))


def retire_template(state: State, workload: Workload, effects: list[Effect]) -> None:
    """No more forks from the workload's templates. Each is stopped when its running children have ended, and those of
    its branches; the branches of other workloads that serve retire, too."""
    template = workload.template
    branches.retire_replicas(state, workload)
    if template is None:
        return
    workload.template = None
    state.retiring[template.id] = template
    for branch in branches.branches_of(state, template):
        other = branch.workload
        if other is not None and other.template is branch and branch.state is TemplateState.READY:
            retire_template(state, other, effects)
            for pool in other.pools.values():
                launchers.touch(state, pool)
            effects.append(ReportWorkload(launchers.report_of(other)))
    _retire_children(template, effects)


def _retire_children(template: Template, effects: list[Effect]) -> None:
    pools = template.workload.pools.values() if template.workload is not None else ()
    for pool in pools:
        for child in [child for child in pool.idle if child.template == template.id]:
            launchers.retire(child, effects)


def settle(state: State, effects: list[Effect]) -> None:
    """End the idle children of retiring templates, and those templates that have no child left."""
    for template in list(state.retiring.values()):
        _retire_children(template, effects)
        if template.id not in state.templates or not (template.children or branches.has_branches(state, template)):
            del state.retiring[template.id]
            template.state = TemplateState.STOPPED
            effects.append(StopTemplate(template.id))


# --- workloads -------------------------------------------------------------------------------------------------------


def demote(state: State, workload: Workload, reason: str, effects: list[Effect]) -> None:
    """The coordinator's verdict: give this workload fresh interpreters. What runs in forked children finishes."""
    if workload.demoted or workload.spec.start != "auto" or workload.spec.kind != "python":
        return
    workload.demoted = reason
    retire_template(state, workload, effects)
    waiting, workload.undecided = workload.undecided, {}
    forked = workload.pools.get("fork")
    if forked is not None:
        waiting, forked.waiting = {**forked.waiting, **waiting}, {}
    fresh = workload.pool("fresh")
    fresh.waiting.update(waiting)
    workload.method, workload.reason, workload.fork_point = "fresh", reason, ""
    launchers.touch(state, fresh)
    effects.append(Observe("demoted", text=f"workload {workload.spec.name!r}: {reason}"))
    effects.append(ReportWorkload(launchers.report_of(workload)))

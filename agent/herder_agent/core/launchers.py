"""Which template is started, how many children are made ahead, and which attempt gets which child.

Theory of operation. A workload's `method` is known at once for `start="fresh"` and for commands; otherwise its template
says, after its audit, whether it forks. Each method has a pool of children. Attempts that hold a slot wait in the
pool (or in `undecided`) until a child is there; children are asked for ahead of demand, as many as the slots could
need, and end when their workload has not been used for `IDLE_CHILD_S`; its template follows after `IDLE_TEMPLATE_S`.

A start that fails is tried again `TEMPLATE_TRIES_MAX` times; then the attempts that wait end with its failure, and
so do those that come within `REFUSAL_S`. A fork that fails is tried again later and later, `FORK_TRIES_MAX` times.
"""

from __future__ import annotations

from math import ceil
from typing import Literal

from herder_agent.core import branches, demand, values
from herder_agent.core.attempts import add_deadline, end, move
from herder_agent.core.effects import (
    Effect,
    Grant,
    LookAtTemplate,
    Observe,
    ReportStarted,
    ReportWorkload,
    RunTask,
    SendTask,
    SpawnCommand,
    SpawnFresh,
    StartTemplate,
    StopChild,
    StopTemplate,
)
from herder_agent.core.state import (
    Attempt,
    Child,
    ChildPhase,
    Phase,
    Pool,
    Refusal,
    State,
    Template,
    TemplateState,
    Workload,
)
from herder_shared.limits import TEMPLATE_TRIES_MAX
from herder_shared.states import Cause, Outcome
from herder_shared.wire.messages import Failure, TemplateInfo, WorkloadReport

#: Children that nobody has used for this long end. Longer than the pauses of interactive work.
IDLE_CHILD_S = 30.0
#: ... and templates: longer than a coffee break, as a template may have loaded gigabytes.
IDLE_TEMPLATE_S = 600.0
#: Attempts of a workload that does not start end at once for so long, before its start is tried again.
REFUSAL_S = 30.0
FORK_TRIES_MAX = 6
FORK_RETRY_S = 0.05
#: Forked children kept ready beyond the demand that is known: what a burst finds waiting.
FORK_RESERVE = 4
#: While children are idle no fewer than this are asked for at once: one message for several.
FORK_BATCH = 3
#: Fresh ones: each costs a whole interpreter, and is of use at the next task at the latest.
FRESH_RESERVE = 1
#: With so many queued attempts per core, throughput counts and not a single answer's latency.
CROWD_PER_CORE = 2
#: Tasks which take less than this, when throughput counts, are given to the fork itself: a child ahead of demand saves
#: a fork's time in each slot, and costs more than that in all.
BRIEF_S = 0.005
#: The start times' medians are reported after so many starts, and then every `_REPORT_EVERY`.
_REPORT_AT = frozenset({1, 8, 64})
_REPORT_EVERY = 512
_STATE_WORDS: dict[TemplateState, Literal["starting", "ready", "failed", "stopped"]] = {
    TemplateState.STARTING: "starting",
    TemplateState.READY: "ready",
    TemplateState.FAILED: "failed",
    TemplateState.STOPPED: "stopped",
}


def touch(state: State, pool: Pool) -> None:
    """Look at `pool` before the step ends."""
    if pool not in state.touched:
        state.touched.append(pool)


def method_of(workload: Workload, attempt: Attempt) -> str:
    """How this attempt is started; "" when the template has not said."""
    if workload.spec.kind == "command":
        return "command"
    if workload.spec.start == "fresh" or attempt.start.start == "fresh":
        return "fresh"
    return workload.method


def place(state: State, attempt: Attempt, now_s: float, effects: list[Effect]) -> None:
    """An attempt has its slot and its blobs: let it wait for a child."""
    workload = attempt.workload
    workload.used_s = now_s
    _watch(state, workload, now_s)
    refusal = workload.refusal
    if refusal is not None:
        if now_s < refusal.until_s:
            _end_refused(state, attempt, refusal, now_s, effects)
            return
        workload.refusal, workload.tries = None, 0
    move(state, attempt, Phase.WAITING)
    method = method_of(workload, attempt)
    if method:
        pool = workload.pool(method)
        pool.waiting[attempt.id] = attempt
        pool.demand.note_arrival(now_s)
        touch(state, pool)
    else:
        workload.undecided[attempt.id] = attempt
        need_template(state, workload, now_s, effects)


def need_template(state: State, workload: Workload, now_s: float, effects: list[Effect]) -> Template:
    """The workload's template; started when there is none."""
    if workload.template is None:
        workload.steps = []
        workload.has_no_replicas = False
        stem = branches.stem_for(state, workload)
        if stem is None:
            workload.template = start_template(state, workload, now_s, effects)
        else:
            workload.template = branches.branch(state, workload, stem, now_s, effects)
            values.limit_setup(state, workload.template, now_s)
        effects.append(ReportWorkload(report_of(workload)))
    return workload.template


def start_template(
    state: State, workload: Workload | None, now_s: float, effects: list[Effect], *, publish: bool = False
) -> Template:
    """Start a template process; None: the spawner; `publish`: one that only runs setup."""
    state.last_template += 1
    template = Template(state.last_template, workload, now_s)
    state.templates[template.id] = template
    effects.append(StartTemplate(template.id, workload.spec if workload is not None else None, publish))
    values.limit_setup(state, template, now_s)
    return template


def _need_spawner(state: State, now_s: float, effects: list[Effect]) -> Template | None:
    """The node's spawner. Orders can be given before it is ready: they wait in its socket. None: it failed just now."""
    if state.spawner is None and now_s >= state.spawner_retry_s:
        state.spawner = start_template(state, None, now_s, effects)
    return state.spawner


def settle(state: State, pool: Pool, now_s: float, effects: list[Effect]) -> None:
    """Give children to attempts that wait, and ask for as many more as could be needed."""
    if pool.method == "command":
        _spawn_commands(state, pool, now_s, effects)
        return
    has_handed_over = False
    while pool.waiting and pool.idle:
        attempt = pool.waiting.pop(next(iter(pool.waiting)))
        # Of new children the oldest: it has had most time to warm up. Of used ones the last: it is in the caches.
        child = pool.idle.pop(-1 if pool.reuses else 0)
        _hand_over(state, child, attempt, now_s, effects)
        has_handed_over = True
    is_brief = _is_brief(state, pool)
    if is_brief and pool.waiting:
        _fork_with_tasks(state, pool, now_s, effects)
    if has_handed_over and pool.idle:
        # The template is not kept busy forking just when it may have to reap: the pool is looked at again at the exit.
        return
    missing = len(pool.waiting) - len(pool.idle) - pool.coming if is_brief else _missing(state, pool, now_s)
    if (
        missing <= 0
        or (missing < FORK_BATCH and pool.method == "fork" and not pool.waiting and pool.idle)
        or now_s < pool.retry_s
    ):
        return
    if pool.method == "fork":
        template = need_template(state, pool.workload, now_s, effects)
        if template.state is TemplateState.READY:
            branches.look_for_want(state, pool, now_s, effects)
            branches.order_children(state, pool, missing, effects)
        return
    if values.wait_for_value(state, pool.workload, now_s, effects):
        return
    spawner = _need_spawner(state, now_s, effects)
    if spawner is not None:
        for _ in range(missing):
            child = new_child(state, pool, spawner)
            effects.append(SpawnFresh(spawner.id, child.id, pool.workload.spec))


def _is_brief(state: State, pool: Pool) -> bool:
    """Whether so many short tasks wait that each had better be forked with its child. Not where children have steps to
    take before their task."""
    return (
        pool.method == "fork"
        and not pool.reuses
        and pool.pace_s is not None
        and pool.pace_s < BRIEF_S
        and not pool.workload.reason
        and not pool.workload.spec.pids
        and _is_crowd(state)
    )


def _is_crowd(state: State) -> bool:
    return len(state.queue) >= CROWD_PER_CORE * state.slots.total.cores


def _fork_with_tasks(state: State, pool: Pool, now_s: float, effects: list[Effect]) -> None:
    """Have children forked that have their tasks from the start. What needs more than that keeps waiting."""
    branches.look_for_want(state, pool, now_s, effects, is_brief=True)
    ready = [each for each in pool.workload.templates if each.state is TemplateState.READY]
    if not ready or now_s < pool.retry_s:
        return
    for attempt in list(pool.waiting.values()):
        if attempt.blobs or attempt.options.memory_bytes:
            continue
        del pool.waiting[attempt.id]
        child = new_child(state, pool, ready[0] if len(ready) == 1 else min(ready, key=lambda each: each.children))
        pool.coming -= 1
        _occupy(state, child, attempt, now_s)
        order = RunTask(
            child.template, child.id, attempt.start, attempt.job_name, attempt.options, grant(state, attempt)
        )
        effects.append(order)
        start_running(state, attempt, now_s, effects, is_told=False)


def _missing(state: State, pool: Pool, now_s: float) -> int:
    """How many more children to ask for."""
    workload = pool.workload
    demand = len(pool.waiting)
    reserve = 0
    if pool.method == workload.method:
        demand += workload.queued
        if demand or now_s - workload.used_s < IDLE_CHILD_S:
            reserve = _reserve(state, pool, now_s)
    limit = ceil(state.slots.total.cores)
    if pool.reuses:
        limit -= pool.busy
    elif pool.method == "fork":
        # While some run others are made, so that a slot never waits for a fork.
        limit += FORK_RESERVE
    else:
        limit = max(limit, reserve)
    wanted = max(len(pool.waiting), min(limit, demand + reserve))
    return wanted - len(pool.idle) - pool.coming


def _reserve(state: State, pool: Pool, now_s: float) -> int:
    warm = pool.workload.spec.warm
    if warm is not None:
        return warm
    return FORK_RESERVE if pool.method == "fork" else max(FRESH_RESERVE, demand.reserve(state, pool, now_s))


def new_child(state: State, pool: Pool, template: Template) -> Child:
    """One more is asked for of this template."""
    state.last_child += 1
    child = Child(state.last_child, pool, template.id)
    state.children[child.id] = child
    template.children += 1
    pool.coming += 1
    return child


def _hand_over(state: State, child: Child, attempt: Attempt, now_s: float, effects: list[Effect]) -> None:
    _occupy(state, child, attempt, now_s)
    reuses = child.pool.reuses
    workload = child.pool.workload
    if child.tasks_done and workload.spec.max_tasks_per_child == 1:
        workload.reused += 1
    in_crowd = not reuses and _is_crowd(state)
    # Nobody waits to hear that it started; unless it has steps to take first, it starts at once.
    starts_at_once = child.tasks_done > 0 if reuses else in_crowd and not workload.reason
    is_quiet = starts_at_once and not attempt.blobs
    slot = grant(state, attempt)
    options = attempt.options
    effects.append(SendTask(child.id, attempt.start, attempt.job_name, options, slot, reuses, is_quiet, in_crowd))
    if is_quiet:
        start_running(state, attempt, now_s, effects)


def _occupy(state: State, child: Child, attempt: Attempt, now_s: float) -> None:
    child.phase = ChildPhase.BUSY
    child.attempt = attempt
    child.pool.busy += 1
    attempt.child = child.id
    attempt.pid = child.pid
    attempt.method = child.pool.method
    attempt.sent_s = now_s
    move(state, attempt, Phase.SENT)
    if attempt.options.timeout_s is not None:
        add_deadline(state, now_s + attempt.options.timeout_s, "timeout", attempt.id)


def _spawn_commands(state: State, pool: Pool, now_s: float, effects: list[Effect]) -> None:
    if not pool.waiting or now_s < pool.retry_s:
        return
    spawner = _need_spawner(state, now_s, effects)
    if spawner is None:
        return
    waiting, pool.waiting = pool.waiting, {}
    for attempt in waiting.values():
        child = new_child(state, pool, spawner)
        pool.coming -= 1
        _occupy(state, child, attempt, now_s)
        order = SpawnCommand(
            spawner.id, child.id, attempt.start, pool.workload.spec, attempt.options, grant(state, attempt)
        )
        effects.append(order)


def grant(state: State, attempt: Attempt) -> Grant:
    """The CPUs, threads and GPUs of an attempt's slot."""
    slot = attempt.slot
    assert slot is not None
    spec = attempt.workload.spec
    indices = slot.indices
    threads = max(1, len(slot.whole)) if spec.blas_threads == "cores" else spec.blas_threads
    if not state.cpus:
        return Grant((), threads, slot.gpus, spec.pids or 0)
    # More slots than CPUs: several slots share one.
    cpus = tuple(dict.fromkeys(state.cpus[index % len(state.cpus)] for index in indices))
    return Grant(cpus, threads, slot.gpus, spec.pids or 0)


def child_ready(state: State, child: Child) -> None:
    """A child that was asked for waits for a task."""
    pool = child.pool
    pool.coming -= 1
    child.phase = ChildPhase.IDLE
    pool.idle.append(child)
    if pool.method == "fork":
        branches.note_fork(pool)
    touch(state, pool)
    if child.pool.workload.refusal is not None:
        child.pool.workload.refusal = None


def child_failed(state: State, pool: Pool, message: str, now_s: float, effects: list[Effect]) -> None:
    """A child did not come, or ended before it was of use: ask again, later and later."""
    pool.failures += 1
    if pool.failures >= FORK_TRIES_MAX:
        pool.failures = 0
        failure = Failure(Cause.START_FAILED, f"no child could be started on {state.node}: {message}")
        for attempt in list(pool.waiting.values()):
            end(state, attempt, Outcome.LOST, failure, now_s, effects)
    pool.retry_s = now_s + FORK_RETRY_S * 2.0**pool.failures
    add_deadline(state, pool.retry_s, "pool", pool.workload.spec.key, pool.method)


def forget_child(state: State, child: Child) -> None:
    """A child is gone: out of its pool and its template's count."""
    pool = child.pool
    match child.phase:
        case ChildPhase.FORKING | ChildPhase.WARMING:
            pool.coming -= 1
        case ChildPhase.IDLE:
            pool.idle.remove(child)
        case ChildPhase.BUSY:
            pool.busy -= 1
        case ChildPhase.STOPPING:
            pass
    child.phase = ChildPhase.STOPPING
    child.attempt = None
    template = state.templates.get(child.template)
    if template is not None:
        template.children -= 1
    del state.children[child.id]
    touch(state, pool)


def retire(child: Child, effects: list[Effect]) -> None:
    """Ask a child that is idle, or has just ended its last task, to end."""
    pool = child.pool
    if child.phase is ChildPhase.IDLE:
        pool.idle.remove(child)
    else:
        assert child.phase is ChildPhase.BUSY
        pool.busy -= 1
    child.phase = ChildPhase.STOPPING
    child.attempt = None
    effects.append(StopChild(child.id))


def start_running(state: State, attempt: Attempt, now_s: float, effects: list[Effect], is_told: bool = True) -> None:
    """Its child says that the task's code runs from now on; or needs not say so. Not `is_told`: its end will be."""
    if attempt.phase is not Phase.SENT:
        return
    attempt.started_s = now_s
    move(state, attempt, Phase.RUNNING)
    _note_start(attempt, effects)
    if is_told and not attempt.dropped:
        effects.append(ReportStarted(attempt.id))


def _note_start(attempt: Attempt, effects: list[Effect]) -> None:
    """Note how long the start took, and report medians now and then."""
    pool = attempt.workload.pool(attempt.method)
    pool.failures = 0
    pool.started += 1
    start_s = max(0.0, attempt.started_s - attempt.slot_s)
    pool.starts_s.append(start_s)
    effects.append(Observe("task_start", attempt.method, start_s))
    if pool.started in _REPORT_AT or pool.started % _REPORT_EVERY == 0:
        effects.append(ReportWorkload(report_of(attempt.workload)))


def decided(state: State, workload: Workload, method: str, effects: list[Effect]) -> None:
    """The template has said how this workload's tasks start."""
    workload.method = method
    workload.tries = 0
    workload.error = ""
    waiting, workload.undecided = workload.undecided, {}
    pool = workload.pool(method)
    pool.waiting.update(waiting)
    touch(state, pool)
    effects.append(ReportWorkload(report_of(workload)))


def note_unsafe(workload: Workload, reason: str, effects: list[Effect]) -> None:
    """Count each rule that forbade forking; say why in words once."""
    rules = dict.fromkeys(f.rule for step in workload.steps for f in step.findings if f.verdict == "unsafe")
    for rule in rules or ("unknown",):
        effects.append(Observe("fork_unsafe", rule, text=reason))
        reason = ""


def start_failed(  # noqa: PLR0917
    state: State, workload: Workload, cause: Cause, message: str, traceback: str, now_s: float, effects: list[Effect]
) -> None:
    """A template, or a fresh interpreter's preload, failed. What the audit finds once it finds again: no second try."""
    workload.tries += 1
    workload.error = message
    effects.append(Observe("template_failed", cause.value))
    if cause is Cause.FORK_UNSAFE:
        note_unsafe(workload, message, effects)
    if cause is not Cause.FORK_UNSAFE and workload.tries < TEMPLATE_TRIES_MAX:
        return
    refusal = Refusal(cause, message, traceback, now_s + REFUSAL_S)
    workload.refusal = refusal
    waiting = list(workload.undecided.values())
    for pool in workload.pools.values():
        waiting.extend(pool.waiting.values())
    for attempt in waiting:
        _end_refused(state, attempt, refusal, now_s, effects)
    effects.append(ReportWorkload(report_of(workload)))


def _end_refused(state: State, attempt: Attempt, refusal: Refusal, now_s: float, effects: list[Effect]) -> None:
    outcome = Outcome.LOST if refusal.cause is Cause.START_FAILED else Outcome.FAILED
    failure = Failure(refusal.cause, refusal.message, traceback=refusal.traceback, retryable=False)
    end(state, attempt, outcome, failure, now_s, effects)


def _watch(state: State, workload: Workload, now_s: float) -> None:
    if not workload.watched:
        workload.watched = True
        add_deadline(state, now_s + IDLE_CHILD_S, "idle", workload.spec.key)


def look_whether_idle(state: State, workload: Workload, now_s: float, effects: list[Effect]) -> None:
    """Retire children, then the template, of a workload that is not used. The next look is put on the list."""
    in_use = workload.queued or any(a.workload is workload for a in state.attempts.values())
    if in_use:
        workload.used_s = now_s
    unused_s = now_s - workload.used_s
    if unused_s >= IDLE_CHILD_S and workload.spec.warm is None:
        for pool in workload.pools.values():
            for child in list(pool.idle):
                retire(child, effects)
    if unused_s >= IDLE_CHILD_S:
        branches.retire_replicas(state, workload)
    template = workload.template
    if unused_s >= IDLE_TEMPLATE_S and (template is None or not branches.has_branches(state, template)):
        for pool in workload.pools.values():
            for child in list(pool.idle):
                retire(child, effects)
        values.drop_value(workload, effects)
        if template is not None:
            template.state = TemplateState.STOPPED
            workload.template = None
            effects.append(StopTemplate(template.id))
            effects.append(ReportWorkload(report_of(workload)))
        workload.watched = False
        return
    effects.extend(LookAtTemplate(each.id) for each in workload.templates if each.state is TemplateState.READY)
    wait_s = IDLE_CHILD_S - unused_s if unused_s < IDLE_CHILD_S else IDLE_TEMPLATE_S - unused_s
    if wait_s <= 0.0:
        wait_s = IDLE_CHILD_S  # it has branches yet
    add_deadline(state, now_s + max(wait_s, 1.0), "idle", workload.spec.key)


def notes_of(workload: Workload) -> tuple[str, ...]:
    """What the user may want to know: of the template, of setup's value, of what was learned, of the node."""
    of_node = workload.node_notes if workload.method == "fork" else []
    return (*workload.notes, *values.notes(workload), *workload.own_notes, *of_node)


def report_of(workload: Workload) -> WorkloadReport:
    """How this workload fares here."""
    infos = tuple(
        TemplateInfo(
            _STATE_WORDS[template.state],
            template.pid,
            template.start_s,
            template.rss_bytes,
            template.children,
            template.shared_bytes,
            template.private_bytes,
            bool(workload.replicas),
        )
        for template in workload.templates
    )
    return WorkloadReport(
        key=workload.spec.key,
        name=workload.spec.name,
        start_method=workload.method,
        reason=workload.reason,
        fork_point=workload.fork_point,
        fork_cost_s=workload.fork_cost_s,
        steps=tuple(workload.steps),
        templates=infos,
        fork_start_s=_median(workload, "fork"),
        fresh_start_s=_median(workload, "fresh"),
        error=workload.error,
        python=workload.python,
        setup_mode=values.setup_mode(workload),
        setup_s=workload.setup_s,
        demoted=workload.demoted,
        notes=notes_of(workload),
        immortal_objects=workload.immortal_objects,
        immortal_off=workload.immortal_off,
    )


def _median(workload: Workload, method: str) -> float | None:
    pool = workload.pools.get(method)
    if pool is None or not pool.starts_s:
        return None
    return sorted(pool.starts_s)[len(pool.starts_s) // 2]

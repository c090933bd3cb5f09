"""`step(state, event, now_s) -> effects`: the only decision maker of an agent.

Each event changes the state and may touch pools or free slots; then, before the step returns, queued attempts take free
slots in their order and touched pools are settled, until nothing changes any more.
"""

from __future__ import annotations

from heapq import heappop
from typing import assert_never

from herder_agent.core import branches, launchers, lending, values, watch
from herder_agent.core.attempts import (
    EXIT_GRACE_S,
    accept,
    add_deadline,
    conclude,
    drop,
    end,
    give_back,
    keep_stuck,
    keep_unkillable,
    kill,
    move,
    note_memory,
    pids_limit,
    report_answer,
    stop,
)
from herder_agent.core.effects import (
    DropChild,
    Effect,
    Observe,
    ReportEnd,
    ReportStarted,
    ReportWorkload,
    SendSync,
    StopTemplate,
    SweepLeftovers,
    UploadBlob,
)
from herder_agent.core.events import (
    AttemptsAcked,
    AttemptsOrdered,
    BlobsArrived,
    BlobsLost,
    BlobUploaded,
    CancelOrdered,
    ChildAnswered,
    ChildDone,
    ChildExited,
    ChildForked,
    ChildForkFailed,
    ChildHung,
    ChildIdle,
    ChildSetupFailed,
    ChildStarted,
    Connected,
    Disconnected,
    Event,
    JobsForgotten,
    LeaseRenewed,
    LeftoversGone,
    LeftoversStuck,
    MemorySeen,
    OracleDenied,
    StopOrdered,
    StuckGone,
    TemplateExited,
    TemplateFailed,
    TemplateNotBranched,
    TemplateReady,
    TemplateSeen,
    TemplateStepped,
    Ticked,
    WaitBegan,
    WaitEnded,
    WorkWaitingHeard,
)
from herder_agent.core.state import Attempt, Child, ChildPhase, Deadline, Phase, State, TemplateState, Workload
from herder_shared.ids import AttemptId
from herder_shared.limits import KILL_GRACE_S
from herder_shared.states import Cause, Outcome
from herder_shared.wire.messages import AttemptEnd, Failure, Logs, RunningAttempt


def step(state: State, event: Event, now_s: float) -> list[Effect]:
    """Take one event. `now_s` is monotonic and never decreases."""
    effects: list[Effect] = []
    state.account.clock_s = now_s
    _take(state, event, now_s, effects)
    while state.queue or state.touched or state.returning:
        _take_slots(state, now_s, effects)
        if not state.touched:
            break
        touched, state.touched = state.touched, []
        for pool in touched:
            launchers.settle(state, pool, now_s, effects)
    if state.retiring:
        watch.settle(state, effects)
    return effects


def next_deadline_s(state: State) -> float | None:
    """When `Ticked` is due, or None."""
    return state.deadlines[0].at_s if state.deadlines else None


def _take(state: State, event: Event, now_s: float, effects: list[Effect]) -> None:
    match event:
        case ChildStarted():
            _child_started(state, event, now_s, effects)
        case ChildAnswered():
            _child_answered(state, event, now_s, effects)
        case ChildDone():
            _child_done(state, event, now_s, effects)
        case ChildExited():
            _child_exited(state, event, now_s, effects)
        case LeftoversGone():
            for attempt in list(state.leaving.values()):
                outcome, failure = conclude(attempt)
                end(state, attempt, outcome, failure, now_s, effects)
        case StopOrdered():
            for attempt in state.attempts.values():
                give_back(state, attempt, event.reason, now_s, effects)
        case LeftoversStuck():
            for attempt in list(state.leaving.values()):
                keep_stuck(state, attempt, now_s, effects)
        case StuckGone():
            for attempt in list(state.stuck.values()):
                outcome, failure = conclude(attempt)
                end(state, attempt, outcome, failure, now_s, effects)
        case ChildForked():
            _child_forked(state, event, now_s, effects)
        case AttemptsOrdered():
            _attempts_ordered(state, event, now_s, effects)
        case AttemptsAcked():
            for attempt_id in event.attempts:
                _forget(state, attempt_id, now_s, effects)
        case CancelOrdered():
            for attempt_id in event.attempts:
                unwanted = state.attempts.get(attempt_id)
                if unwanted is not None and not (event.waiting_only and unwanted.has_child):
                    stop(state, unwanted, Outcome.CANCELLED, event.grace_s, now_s, effects)
        case LeaseRenewed():
            state.lease_until_s = max(state.lease_until_s, event.until_s)
        case WorkWaitingHeard():
            state.account.advance(now_s)
            state.account.work_waiting = event.waiting
        case WaitBegan():
            if (waiting := state.attempts.get(event.attempt)) is not None:
                lending.wait_began(state, waiting, now_s, effects)
        case WaitEnded():
            if (waiting := state.attempts.get(event.attempt)) is not None:
                lending.wait_ended(state, waiting, event.n, effects)
        case MemorySeen():
            _memory_seen(state, event, now_s, effects)
        case ChildHung():
            watch.child_hung(state, event, now_s, effects)
        case TemplateSeen():
            watch.template_seen(state, event, now_s, effects)
        case OracleDenied():
            watch.oracle_denied(state, event, effects)
        case BlobsArrived():
            _blobs_arrived(state, event, now_s, effects)
        case BlobsLost():
            if (lacking := state.attempts.get(event.attempt)) is not None:
                end(state, lacking, Outcome.LOST, Failure(Cause.DATA_LOST, event.message), now_s, effects)
        case BlobUploaded():
            for attempt_id in state.uploading.pop(event.blob, ()):
                if (report := state.ends.get(attempt_id)) is not None:
                    effects.append(ReportEnd(report))
        case ChildIdle():
            if (child := state.children.get(event.child)) is not None and child.phase is ChildPhase.WARMING:
                child.pool.workload.python = event.python
                child.pool.demand.note_warm(now_s - child.forked_s, event.anon_bytes)
                launchers.child_ready(state, child)
        case ChildForkFailed():
            _child_fork_failed(state, event, now_s, effects)
        case ChildSetupFailed():
            _child_setup_failed(state, event, now_s, effects)
        case TemplateStepped() | TemplateReady() | TemplateFailed() | TemplateNotBranched() | TemplateExited():
            _take_template(state, event, now_s, effects)
        case Connected():
            _connected(state, event, effects)
        case Disconnected():
            if event.session == state.session:
                state.connected = False
                state.account.advance(now_s)
                state.account.work_waiting = False
        case JobsForgotten():
            for job in event.jobs:
                state.jobs.pop(job, None)
        case Ticked():
            state.account.advance(now_s)
            while state.deadlines and state.deadlines[0].at_s <= now_s:
                _deadline_came(state, heappop(state.deadlines), now_s, effects)
        case _:
            assert_never(event)


def _take_slots(state: State, now_s: float, effects: list[Effect]) -> None:
    if state.returning:
        lending.take_back(state, now_s, effects)
        if state.returning:
            return  # what is free is kept for it
    while state.queue and not state.slots.is_full:
        attempt = _next_in_queue(state, now_s)
        slot = state.slots.take(attempt.request) if attempt is not None else None
        if attempt is None or slot is None:
            return
        del state.queue[attempt.id]
        attempt.workload.queued -= 1
        attempt.slot = slot
        attempt.slot_s = now_s
        move(state, attempt, Phase.FETCHING)
        if attempt.fetched:
            launchers.place(state, attempt, now_s, effects)


def _next_in_queue(state: State, now_s: float) -> Attempt | None:
    """Out of its lease the coordinator may have written off what may run once: that waits for the next `SyncOk`."""
    first = next(iter(state.queue.values()))
    if first.options.idempotent or now_s < state.lease_until_s:
        return first
    return next((attempt for attempt in state.queue.values() if attempt.options.idempotent), None)


# --- orders ----------------------------------------------------------------------------------------------------------


def _attempts_ordered(state: State, event: AttemptsOrdered, now_s: float, effects: list[Effect]) -> None:
    if event.session != state.session or not state.connected:
        return  # Of an earlier connection: its coordinator knows from our Sync that we do not have them.
    for spec in event.workloads:
        if spec.key not in state.workloads:
            method = "command" if spec.kind == "command" else "fresh" if spec.start == "fresh" else ""
            reason = "the workload asks for it" if method == "fresh" else ""
            state.workloads[spec.key] = Workload(spec, method, reason, node_notes=state.notes)
        if spec.demoted:
            watch.demote(state, state.workloads[spec.key], spec.demoted, effects)
    for job in event.jobs:
        state.jobs[job.job] = job
    state.blob_functions.update(event.blob_functions)
    for start in event.attempts:
        if start.attempt in state.attempts or start.attempt in state.ends:
            continue
        brief = state.jobs.get(start.job)
        workload = state.workloads.get(brief.workload) if brief is not None else None
        if brief is None or workload is None:
            failure = Failure(Cause.START_FAILED, f"node {state.node} was not told of the job or its workload")
            report = AttemptEnd(start.attempt, start.job, start.index, Outcome.LOST, None, failure)
            state.ends[start.attempt] = report
            effects.append(ReportEnd(report))
            continue
        accept(state, start, brief, workload, now_s, effects)


def _forget(state: State, attempt_id: AttemptId, now_s: float, effects: list[Effect]) -> None:
    report = state.ends.pop(attempt_id, None)
    if report is not None:
        blob = report.result.blob if report.result is not None else None
        if blob is not None and attempt_id in state.uploading.get(blob, ()):
            # Superseded while its result was on the way: the store keeps that no longer.
            state.uploading[blob].remove(attempt_id)
            if not state.uploading[blob]:
                del state.uploading[blob]
        return
    attempt = state.attempts.get(attempt_id)
    if attempt is not None:
        drop(state, attempt, now_s, effects)


def _connected(state: State, event: Connected, effects: list[Effect]) -> None:
    state.session = event.session
    state.connected = True
    state.jobs.clear()
    state.blob_functions.clear()
    in_use = {attempt.workload.spec.key for attempt in state.attempts.values()}
    for key, workload in list(state.workloads.items()):
        has_children = any(child.pool.workload is workload for child in state.children.values())
        if workload.template is None and workload.publisher is None and key not in in_use and not has_children:
            values.drop_value(workload, effects)
            del state.workloads[key]
    uploading = {attempt_id for ids in state.uploading.values() for attempt_id in ids}
    begun = {Phase.RUNNING, Phase.ANSWERED, Phase.LEAVING}
    lent = state.lent.keys() - state.returning.keys()
    running = [
        RunningAttempt(a.id, a.start.job, a.start.index, a.phase in begun, a.id in lent)
        for a in state.attempts.values()
        if not a.dropped
    ]
    running += [RunningAttempt(e.attempt, e.job, e.index, True) for i, e in state.ends.items() if i in uploading]
    ended = tuple(report for attempt_id, report in state.ends.items() if attempt_id not in uploading)
    effects.append(SendSync(tuple(running), ended))
    effects.extend(UploadBlob(blob) for blob in state.uploading)
    effects.extend(ReportWorkload(launchers.report_of(w)) for w in state.workloads.values() if w.method or w.template)


def _blobs_arrived(state: State, event: BlobsArrived, now_s: float, effects: list[Effect]) -> None:
    attempt = state.attempts.get(event.attempt)
    if attempt is None or attempt.fetched:
        return
    attempt.fetched = True
    if attempt.phase is Phase.FETCHING:
        launchers.place(state, attempt, now_s, effects)


# --- children --------------------------------------------------------------------------------------------------------


def _child_forked(state: State, event: ChildForked, now_s: float, effects: list[Effect]) -> None:
    child = state.children.get(event.child)
    if child is None:
        return
    child.pid = event.pid
    if child.template and state.spawner is not None and child.template == state.spawner.id:
        state.spawner_failures = 0
    if child.attempt is not None:
        child.attempt.pid = event.pid
        if child.pool.method == "command":
            launchers.start_running(state, child.attempt, now_s, effects)
        elif not child.attempt.dropped:
            # It came with its task, and takes long enough for somebody to hear of it.
            effects.append(ReportStarted(child.attempt.id))
    elif child.phase is ChildPhase.FORKING:
        if child.pool.method == "fresh":
            child.phase = ChildPhase.WARMING
            child.forked_s = now_s
            add_deadline(state, now_s + child.pool.workload.spec.setup_timeout_s, "warming", child.id)
        else:
            launchers.child_ready(state, child)


def _child_started(state: State, event: ChildStarted, now_s: float, effects: list[Effect]) -> None:
    child = state.children.get(event.child)
    if child is not None and child.attempt is not None:
        launchers.start_running(state, child.attempt, now_s, effects)


def _child_answered(state: State, event: ChildAnswered, now_s: float, effects: list[Effect]) -> None:
    child = state.children.get(event.child)
    if child is None or child.attempt is None or child.attempt.answer is not None:
        return
    attempt = child.attempt
    attempt.answer = event.answer
    attempt.logs = event.logs
    note_memory(attempt, event.answer)
    child.pool.note_wall(event.answer.wall_s)
    child.tasks_done += 1
    most = child.pool.tasks_max
    if attempt.ending is not None or event.ends or (most and child.tasks_done >= most):
        if attempt.ending is None:
            report_answer(state, attempt, now_s, effects)
            add_deadline(state, now_s + EXIT_GRACE_S, "kill", attempt.id)
        move(state, attempt, Phase.ANSWERED)
        return
    outcome, failure = conclude(attempt)
    child.phase = ChildPhase.IDLE
    child.attempt = None
    child.pool.busy -= 1
    child.pool.idle.append(child)
    child.pool.workload.used_s = now_s
    launchers.touch(state, child.pool)
    end(state, attempt, outcome, failure, now_s, effects)


def _child_exited(state: State, event: ChildExited, now_s: float, effects: list[Effect]) -> None:
    child = state.children.get(event.child)
    if child is None:
        return
    attempt, phase, pool = child.attempt, child.phase, child.pool
    launchers.forget_child(state, child)
    if attempt is None:
        if phase is not ChildPhase.STOPPING:
            launchers.child_failed(state, pool, _exit_text(event), now_s, effects)
        if child.tasks_done:
            effects.append(SweepLeftovers())
        return
    attempt.exit = event.exit
    note_memory(attempt, event.exit)
    attempt.check = event.check
    if event.result is not None:
        attempt.result = event.result
    attempt.logs = _join(attempt.logs, event.logs)
    _leave(state, attempt, now_s, effects)


def _child_done(state: State, event: ChildDone, now_s: float, effects: list[Effect]) -> None:
    child = state.children.get(event.child)
    if child is None or child.attempt is None:
        return
    attempt, pool = child.attempt, child.pool
    launchers.forget_child(state, child)
    attempt.pid = event.pid
    attempt.logs = event.logs
    attempt.exit = event.exit
    if event.answer is None:
        note_memory(attempt, event.exit)
        _leave(state, attempt, now_s, effects)
        return
    attempt.answer = event.answer
    note_memory(attempt, event.answer)
    pool.note_wall(event.answer.wall_s)
    branches.note_brief(pool)
    pool.workload.used_s = now_s
    outcome, failure = conclude(attempt)
    end(state, attempt, outcome, failure, now_s, effects)


def _leave(state: State, attempt: Attempt, now_s: float, effects: list[Effect]) -> None:
    attempt.exited_s = now_s
    attempt.workload.used_s = now_s
    if attempt.answer is None and attempt.ending is None and not attempt.hung and not attempt.is_command:
        effects.append(Observe("crash", attempt.method))
    move(state, attempt, Phase.LEAVING)
    state.leaving[attempt.id] = attempt
    effects.append(SweepLeftovers())


def _join(first: Logs | None, second: Logs | None) -> Logs | None:
    """What a child printed until its answer, and after it."""
    if first is None or second is None:
        return first or second
    return Logs(first.stdout + second.stdout, first.stderr + second.stderr, first.truncated or second.truncated)


def _exit_text(event: ChildExited) -> str:
    tail = event.logs.stderr[-1000:].decode("utf-8", "replace") if event.logs is not None else ""
    return f"it ended with wait status {event.exit.status} before it was ready. {tail}".strip()


def _child_fork_failed(state: State, event: ChildForkFailed, now_s: float, effects: list[Effect]) -> None:
    child = state.children.get(event.child)
    if child is None:
        return
    attempt, pool = child.attempt, child.pool
    launchers.forget_child(state, child)
    if attempt is not None and event.result is not None:
        attempt.result = event.result
        message = f"the command could not be executed on {state.node}: {event.message}"
        end(state, attempt, Outcome.FAILED, Failure(Cause.COMMAND_EXIT, message, exit_status=127), now_s, effects)
        return
    if event.is_exec and pool.method == "fresh":
        spec = pool.workload.spec
        message = f"the workload's interpreter cannot be started on {state.node}: {event.message}"
        cause = Cause.SETUP_FAILED if spec.python is not None else Cause.START_FAILED
        launchers.start_failed(state, pool.workload, cause, message, "", now_s, effects)
        return
    if attempt is not None:
        failure = Failure(Cause.START_FAILED, f"it could not be started on {state.node}: {event.message}")
        end(state, attempt, Outcome.LOST, failure, now_s, effects)
    launchers.child_failed(state, pool, event.message, now_s, effects)


def _child_setup_failed(state: State, event: ChildSetupFailed, now_s: float, effects: list[Effect]) -> None:
    child = state.children.get(event.child)
    if child is None or child.phase is not ChildPhase.WARMING:
        return
    child.pool.coming -= 1
    child.phase = ChildPhase.STOPPING
    launchers.start_failed(state, child.pool.workload, event.cause, event.message, event.traceback, now_s, effects)
    launchers.touch(state, child.pool)


def _memory_seen(state: State, event: MemorySeen, now_s: float, effects: list[Effect]) -> None:
    child = state.children.get(event.child)
    if child is None or child.attempt is None:
        return
    attempt = child.attempt
    attempt.peak_bytes = max(attempt.peak_bytes, event.anon_bytes)
    attempt.peak_tasks = max(attempt.peak_tasks, event.tasks)
    if attempt.ending is not None or attempt.phase not in {Phase.SENT, Phase.RUNNING}:
        return
    limit = attempt.options.memory_bytes
    if limit and event.anon_bytes > limit:
        attempt.ending = Outcome.OUT_OF_MEMORY
    elif event.tasks > pids_limit(state, attempt):
        attempt.ending = Outcome.CRASHED
        attempt.tasks_max = pids_limit(state, attempt)
    else:
        return
    kill(state, attempt, now_s, effects)


# --- templates -------------------------------------------------------------------------------------------------------


def _take_template(
    state: State,
    event: TemplateStepped | TemplateReady | TemplateFailed | TemplateNotBranched | TemplateExited,
    now_s: float,
    effects: list[Effect],
) -> None:
    template = state.templates.get(event.template)
    if template is None:
        return
    workload = template.workload
    match event:
        case TemplateStepped():
            if workload is not None:
                workload.steps.append(event.step)
        case TemplateReady():
            template.pid, template.start_s, template.rss_bytes = event.pid, event.start_s, event.rss_bytes
            template.shared_bytes, template.private_bytes = event.shared_bytes, event.private_bytes
            if workload is None:
                template.state = TemplateState.READY
            elif template in workload.replicas:
                branches.ready(state, template, effects)
            elif template is workload.publisher:
                effects.extend(values.published(state, workload, template, event))
            else:
                _template_ready(state, workload, event, effects)
        case TemplateFailed():
            template.state = TemplateState.FAILED
            if workload is not None and template not in workload.replicas:
                launchers.start_failed(state, workload, event.cause, event.message, event.traceback, now_s, effects)
        case TemplateNotBranched():
            branches.not_branched(state, template, now_s, effects)
        case TemplateExited():
            _template_exited(state, event, now_s, effects)


def _template_ready(state: State, workload: Workload, event: TemplateReady, effects: list[Effect]) -> None:
    template = workload.template
    if template is None or template.id != event.template:
        return
    workload.reason, workload.fork_point, workload.python = event.reason, event.fork_point, event.python
    workload.fork_cost_s = event.fork_cost_s
    values.note_setup(workload, event)
    workload.immortal_objects, workload.immortal_off = event.immortal_objects, event.immortal_off
    workload.notes = event.notes
    workload.has_no_parent = False
    if event.start == "fork":
        template.state = TemplateState.READY
    else:
        template.state = TemplateState.STOPPED
        workload.template = None
        effects.append(StopTemplate(template.id))
        launchers.note_unsafe(workload, event.reason, effects)
    launchers.decided(state, workload, event.start, effects)


def _template_exited(state: State, event: TemplateExited, now_s: float, effects: list[Effect]) -> None:
    template = state.templates.pop(event.template)
    workload, was = template.workload, template.state
    orphans = [child for child in state.children.values() if child.template == template.id]
    for child in orphans:
        attempt = child.attempt
        effects.append(DropChild(child.id))
        launchers.forget_child(state, child)
        if attempt is not None:
            attempt.template_lost = True
            _leave(state, attempt, now_s, effects)
    if orphans:
        effects.append(SweepLeftovers())
    if template is state.spawner:
        state.spawner = None
        state.spawner_failures += 1
        state.spawner_retry_s = now_s + min(5.0, 0.05 * 2.0**state.spawner_failures)
        add_deadline(state, state.spawner_retry_s, "spawner", template.id)
    if workload is not None and workload.publisher is template:
        workload.publisher = None
    elif branches.replica_gone(state, template, effects) or workload is None or workload.template is not template:
        return
    elif branches.is_unfinished_tree(template):
        branches.begin_without(state, workload, now_s, effects)
        return
    else:
        branches.retire_replicas(state, workload)  # they die with it
        workload.template = None
    if was is TemplateState.STARTING:
        message = event.message or "the template ended while it started"
        launchers.start_failed(state, workload, Cause.START_FAILED, message, "", now_s, effects)
    if workload.undecided:
        launchers.need_template(state, workload, now_s, effects)
    for pool in workload.pools.values():
        launchers.touch(state, pool)
    effects.append(ReportWorkload(launchers.report_of(workload)))


# --- time ------------------------------------------------------------------------------------------------------------


def _deadline_came(state: State, deadline: Deadline, now_s: float, effects: list[Effect]) -> None:
    match deadline.kind, deadline.key:
        case "timeout", AttemptId() as attempt_id:
            attempt = state.attempts.get(attempt_id)
            if attempt is not None and attempt.phase in {Phase.SENT, Phase.RUNNING}:
                stop(state, attempt, Outcome.TIMED_OUT, KILL_GRACE_S, now_s, effects)
        case "kill", AttemptId() as attempt_id:
            attempt = state.attempts.get(attempt_id)
            if attempt is not None and attempt.child in state.children and attempt.phase is not Phase.LEAVING:
                kill(state, attempt, now_s, effects)
        case "death", AttemptId() as attempt_id:
            attempt = state.attempts.get(attempt_id)
            if attempt is not None and attempt.child in state.children and attempt.phase is not Phase.LEAVING:
                keep_unkillable(state, attempt, now_s, effects)
        case "idle", str() as key:
            if (workload := state.workloads.get(key)) is not None:
                launchers.look_whether_idle(state, workload, now_s, effects)
        case "pool", str() as key:
            workload = state.workloads.get(key)
            if workload is not None and deadline.method in workload.pools:
                launchers.touch(state, workload.pools[deadline.method])
        case "setup", int() as number:
            values.setup_due(state, number, now_s, effects)
        case "warming", int() as number:
            values.warming_due(state, number, now_s, effects)
        case "spawner", _:
            for workload in state.workloads.values():
                for pool in workload.pools.values():
                    if pool.method != "fork":
                        launchers.touch(state, pool)
        case _:
            raise AssertionError(f"a deadline of kind {deadline.kind!r}")


def is_idle(state: State) -> bool:
    """Nothing is queued, held or unacknowledged."""
    return not state.attempts and not state.ends


def busy_children(state: State) -> list[Child]:
    """Children that run a task."""
    return [child for child in state.children.values() if child.attempt is not None]

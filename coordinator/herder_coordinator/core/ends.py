"""What follows when an attempt is over: the task's terminal record, or another attempt.

Three accounts, kept apart. *Own* ends (an exception, an exit, a signal, too much memory, too long) use up
`retries`. *Infrastructure* (template, start) is never blamed on the task and uses up `max_crashes`; the loss of a node
makes what ran there suspect first (`quarantine.py`), and is counted when it happens again under suspicion. A
task that may run once only is not tried again unless its attempt certainly never started. And *one free rerun* in a
fresh interpreter is granted where a fork may have been the culprit. Whatever remains of these, a task whose own
crashes killed its process, or its node, on `POISON_NODES` nodes is poison.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from herder_coordinator.core import apply, blame, placement, records
from herder_coordinator.core.lease import loss_backoff_s, task_backoff_s
from herder_coordinator.core.quarantine import COUNTED, Part, part_in_end
from herder_coordinator.core.state import NO_ATTEMPT, Job, Node, Queue, State, Task, TaskKey
from herder_coordinator.core.turn import Turn
from herder_shared import limits
from herder_shared.ids import AttemptId, BlobId, NodeName, WorkloadKey, task_id
from herder_shared.states import INFRASTRUCTURE, AgentState, Cause, Outcome, TaskState
from herder_shared.wire.messages import AttemptEnd, Drain, Failure, PastAttempt, TaskEnd, Usage

#: Ends that are the task's own doing, and so use up `retries`.
OWN = frozenset(
    {
        Cause.EXCEPTION,
        Cause.COMMAND_EXIT,
        Cause.EXIT,
        Cause.SIGNAL,
        Cause.DEADLOCK,
        Cause.OUT_OF_MEMORY,
        Cause.TIMEOUT,
    }
)
#: How fast a workload's pace follows: up at once, so that long tasks are not queued behind each other; down slowly.
PACE_UP = 0.5
PACE_DOWN = 0.1
#: Of each past attempt's message.
PAST_TEXT_MAX = 300
#: Nodes that a task remembers to avoid.
AVOIDED_MAX = 4
#: Failed starts in a row, of at least two workloads, after which a node is drained.
START_FAILURES_MAX = 5
NOTHING_STARTS = "several workloads could not be started there; once that is mended, `herder drain --undo` has it back"


def attempt_ended(turn: Turn, node: Node, end: AttemptEnd) -> None:
    """An agent reports an end: for the first time, again, or of an attempt that was given up meanwhile."""
    state = turn.state
    turn.ack(node, end.attempt)
    job = state.jobs.get(end.job)
    if job is None or not 0 <= end.index < job.count or job.outcomes[end.index]:
        return
    known = job.tasks.get(end.index)
    if is_foreign(state, node, known, end.attempt):
        turn.count("foreign_attempt", (("node", node.name),))
        return
    task = known or apply.task_of(state, job, end.index)
    assert task is not None
    if task.attempt == end.attempt and task.node is node:
        _note_start(turn, node, job, end)
        _decide(turn, task, node, end, part_in_end(end))
    elif task.state is TaskState.WAITING and end.outcome is not Outcome.SUCCEEDED:
        # An earlier life started it and lost the record, and that of the tasks it waits for: it will be run again.
        return
    elif end.attempt > task.attempt:
        # Made by an earlier life which lost the record of it: this end is as good as any.
        _supersede(turn, task)
        apply.unplace(state, task)
        task.attempt = end.attempt
        task.ordinal = max(task.ordinal + 1, end.usage.attempt)
        if end.outcome is not Outcome.SUCCEEDED:
            # If it is to be run again, the next life must not take this end for the new one.
            one = records.Assignment(job.id, task.index, task.attempt, task.ordinal, task.fresh)
            turn.record(records.AttemptsAssigned(node.name, node.incarnation, (one,)))
        _decide(turn, task, node, end)
    elif end.outcome is Outcome.SUCCEEDED and job.spec.options.idempotent:
        # It was given up as lost, and here it is after all. The first terminal record wins.
        _supersede(turn, task)
        _terminal(turn, task, end)


def is_foreign(state: State, node: Node, task: Task | None, attempt: AttemptId) -> bool:
    """Whether this agent cannot have the attempt: it is another agent's, or this life, which has lost no record, never
    made it."""
    newest = task.attempt if task is not None else NO_ATTEMPT
    if attempt > newest:
        return attempt.epoch >= state.epoch
    return attempt == newest and task is not None and task.node is not None and task.node is not node


def _supersede(turn: Turn, task: Task) -> None:
    """Whatever attempt the task has elsewhere is not wanted any more."""
    if task.node is not None:
        turn.ack(task.node, task.attempt)


def lost(turn: Turn, task: Task, cause: Cause, message: str, part: Part = COUNTED) -> None:
    """The task's attempt is given up: nobody will report its end."""
    node = task.node
    assert node is not None
    turn.count("attempt_lost", (("reason", cause.value),))
    usage = Usage(node=node.name, attempt=task.ordinal)
    failure = Failure(cause=cause, message=message)
    end = AttemptEnd(task.attempt, task.job.id, task.index, Outcome.LOST, None, failure, usage)
    _decide(turn, task, node, end, part)


def never_arrived(turn: Turn, task: Task) -> None:
    """The agent has never had the attempt: pending again, and nothing is counted."""
    turn.retry(task, account(task, ordinal=max(0, task.ordinal - 1)))
    _end_if_cancelled(turn, task)


def recall_ahead(turn: Turn, tasks: Iterable[Task]) -> None:
    """Have the agents give back those of these attempts that lie in look-ahead. One that starts meanwhile runs on."""
    for task in tasks:
        if task.node is not None and task.attempt in task.node.ahead and task.state is TaskState.ASSIGNED:
            turn.cancel(task.node, task.attempt, waiting_only=True)


def account(
    task: Task,
    *,
    ordinal: int | None = None,
    failures: int | None = None,
    crashes: int | None = None,
    killed_on: tuple[NodeName, ...] | None = None,
    avoid: tuple[NodeName, ...] | None = None,
    rerun: bool = False,
    backoff_s: float = 0.0,
    suspect: Cause | None = None,
    quarantine_s: float | None = None,
    memory_bytes: int | None = None,
    past: tuple[PastAttempt, ...] = (),
) -> records.Retry:
    """The task's account as it is, with these changes."""
    return records.Retry(
        job=task.job.id,
        index=task.index,
        attempt=task.attempt,
        ordinal=task.ordinal if ordinal is None else ordinal,
        failures=task.failures if failures is None else failures,
        crashes=task.crashes if crashes is None else crashes,
        killed_on=task.killed_on if killed_on is None else killed_on,
        avoid=(task.avoid if avoid is None else avoid)[-AVOIDED_MAX:],
        fresh=rerun or task.fresh,
        reran=rerun or task.reran,
        backoff_s=backoff_s,
        suspect=suspect or task.suspect,
        quarantine_s=task.quarantine_s if quarantine_s is None else quarantine_s,
        memory_bytes=(task.grown.group.request.memory_bytes if task.grown else 0)
        if memory_bytes is None
        else memory_bytes,
        past=past,
    )


def _decide(turn: Turn, task: Task, node: Node, end: AttemptEnd, part: Part = COUNTED) -> None:
    """The end of the task's newest attempt: is it the task's? `part`: what it had to do with the loss of its node."""
    blame.note_end(turn, task, end)
    if end.outcome is Outcome.SUCCEEDED:
        _terminal(turn, task, end)
        return
    failure = end.failure or Failure(cause=Cause.EXCEPTION, message=f"the attempt ended {end.outcome}")
    if end.outcome is Outcome.CANCELLED and task.state is TaskState.ASSIGNED and not _is_cancelled(task):
        # Recalled from a node's look-ahead, perhaps by an earlier life of ours: it has never started.
        never_arrived(turn, task)
        return
    if task.cancel or end.outcome is Outcome.CANCELLED:
        _terminal(turn, task, msgspec.structs.replace(end, outcome=Outcome.CANCELLED, failure=_cancelled(failure)))
        return
    if failure.cause in INFRASTRUCTURE:
        again = _after_loss(turn, task, node, end, failure, part)
    elif failure.cause in OWN:
        again = _after_own_end(turn, task, node, end, failure)
    elif failure.cause is Cause.SETUP_FAILED:
        again = _after_failed_setup(turn, task, node, end)
    else:
        _terminal(turn, task, end)
        return
    if again is not None:
        turn.count("task_retried", (("cause", failure.cause.value),))
        turn.retry(task, msgspec.structs.replace(again, past=(past_attempt(task, node, end, failure),)))
        _end_if_cancelled(turn, task)


def past_attempt(task: Task, node: Node, end: AttemptEnd, failure: Failure | None) -> PastAttempt:
    """What is remembered of an attempt."""
    usage = end.usage
    return PastAttempt(
        attempt=task.ordinal,
        node=node.name,
        outcome=end.outcome,
        cause=failure.cause if failure is not None else None,
        message=failure.message[:PAST_TEXT_MAX] if failure is not None else "",
        start_method=usage.start_method,
        queued_s=task.queued_s,
        start_s=usage.start_s,
        wall_s=usage.wall_s,
        peak_memory_bytes=usage.peak_memory_bytes,
        memory_bytes=task.request.memory_bytes,
    )


def _is_cancelled(task: Task) -> bool:
    return task.cancel or task.cancel_pending or task.job.cancelled


def _cancelled(failure: Failure) -> Failure:
    if failure.cause is Cause.CANCELLED:
        return failure
    return Failure(cause=Cause.CANCELLED, message=f"cancelled ({failure.message})" if failure.message else "cancelled")


def _after_loss(  # noqa: PLR0917
    turn: Turn, task: Task, node: Node, end: AttemptEnd, failure: Failure, part: Part
) -> records.Retry | None:
    options = task.job.spec.options
    crashes = task.crashes + part.is_counted
    killed_on = task.killed_on
    if part.is_blamed and node.name not in killed_on:
        killed_on = (*killed_on, node.name)
    text = failure.message or failure.cause.value
    if not options.idempotent and failure.cause is not Cause.START_FAILED and not part.never_began:
        reason = f"{text}; how the attempt ended is unknown, and the task may not run twice (idempotent=False)"
    elif crashes > options.max_crashes:
        reason = f"attempt {task.ordinal}: {text}; that was loss {crashes}, max_crashes is {options.max_crashes}"
    elif part.is_blamed and len(killed_on) >= limits.POISON_NODES:
        _end_poisoned(
            turn, task, end, failure, f"{len(killed_on)} nodes or its process there ended under it", killed_on
        )
        return None
    else:
        avoid = (*(name for name in task.avoid if name != node.name), node.name)
        backoff_s = loss_backoff_s(crashes) if part.is_counted else 0.0
        quarantine_s = part.quarantine_s or task.quarantine_s
        return account(
            task, crashes=crashes, killed_on=killed_on, avoid=avoid, backoff_s=backoff_s, quarantine_s=quarantine_s
        )
    cause = failure.cause if failure.cause is Cause.DATA_LOST else Cause.NODE_LOST
    given_up = msgspec.structs.replace(failure, cause=cause, message=reason)
    _terminal(turn, task, msgspec.structs.replace(end, outcome=Outcome.LOST, failure=given_up))
    return None


def _after_own_end(turn: Turn, task: Task, node: Node, end: AttemptEnd, failure: Failure) -> records.Retry | None:
    options = task.job.spec.options
    if _deserves_rerun(task, end, failure):
        return account(task, rerun=True, suspect=failure.cause, quarantine_s=0.0)
    memory_bytes = _more_memory(turn.state, task) if end.outcome is Outcome.OUT_OF_MEMORY else 0
    if memory_bytes:
        return account(task, memory_bytes=memory_bytes, quarantine_s=0.0)
    killed_on = task.killed_on
    if end.outcome in {Outcome.CRASHED, Outcome.OUT_OF_MEMORY} and node.name not in killed_on:
        killed_on = (*killed_on, node.name)
    if len(killed_on) >= limits.POISON_NODES:
        _end_poisoned(turn, task, end, failure, f"it killed its process on {len(killed_on)} nodes", killed_on)
        return None
    if task.failures < options.retries and (failure.cause is not Cause.EXCEPTION or failure.retryable):
        failures = task.failures + 1
        backoff_s = task_backoff_s(options.backoff_s, failures)
        avoid = killed_on if killed_on != task.killed_on else task.avoid
        return account(task, failures=failures, killed_on=killed_on, avoid=avoid, backoff_s=backoff_s, quarantine_s=0.0)
    _terminal(turn, task, end)
    return None


def _end_poisoned(  # noqa: PLR0917
    turn: Turn, task: Task, end: AttemptEnd, failure: Failure, what: str, nodes: tuple[NodeName, ...]
) -> None:
    text = f"{what} ({', '.join(nodes)}); at last: {failure.message}"
    poisoned = msgspec.structs.replace(failure, cause=Cause.POISONED, message=text)
    outcome = Outcome.CRASHED if end.outcome is Outcome.LOST else end.outcome
    _terminal(turn, task, msgspec.structs.replace(end, outcome=outcome, failure=poisoned))


def _after_failed_setup(turn: Turn, task: Task, node: Node, end: AttemptEnd) -> records.Retry | None:
    """A node has tried often enough; a second one may have what this one lacks. The task's own code has not run."""
    others = any(one.state is AgentState.READY and one is not node for one in turn.state.nodes.values())
    if others and not task.avoid:
        return account(task, avoid=(node.name,))
    _terminal(turn, task, end)
    return None


def _more_memory(state: State, task: Task) -> int:
    """What the next attempt is given after one that ran out of memory: more, as far as the options and the nodes go. 0:
    no more. It needs no `retries`, as it ends by itself."""
    options = task.job.spec.options
    request = task.request
    if not 0 < request.memory_bytes < options.memory_max_bytes:
        return 0
    wanted = min(options.memory_max_bytes, math.ceil(request.memory_bytes * options.memory_growth))
    able = [node.memory_bytes for node in state.nodes.values() if placement.could_ever_fit(node, request)]
    given = min(wanted, max(able, default=0))
    return given if given > request.memory_bytes else 0


def _deserves_rerun(task: Task, end: AttemptEnd, failure: Failure) -> bool:
    """A forked child that died of a signal or a proved deadlock may have died of the fork."""
    return (
        failure.cause in {Cause.SIGNAL, Cause.DEADLOCK}
        and end.usage.start_method == "fork"
        and not task.reran
        and task.job.spec.workload.start == "auto"
        and task.job.spec.options.idempotent
    )


def _terminal(turn: Turn, task: Task, end: AttemptEnd) -> None:
    """Write the terminal record of a task that had an attempt."""
    job = task.job
    usage = msgspec.structs.replace(end.usage, attempt=task.ordinal, queued_s=task.queued_s)
    _note_end(turn, job, task, end, usage)
    turn.end(job, TaskEnd(end.index, end.outcome, end.result, end.failure, usage, end.logs, task.past))


def _note_end(turn: Turn, job: Job, task: Task, end: AttemptEnd, usage: Usage) -> None:
    workload = job.spec.workload
    turn.note_end(workload.name, end.outcome, usage)
    cores = job.spec.options.cores
    hold_s = usage.core_s / cores if usage.core_s and cores > 0 else usage.start_s + usage.wall_s
    if hold_s > 0:
        note_pace(turn.state, (workload.key, task.function), hold_s)


def note_pace(state: State, key: tuple[WorkloadKey, BlobId | None], hold_s: float) -> None:
    """Take one more measurement into the mean time for which such attempts hold their slot."""
    pace_s = state.paces.get(key)
    if pace_s is None:
        if len(state.paces) >= apply.PACES_MAX:
            del state.paces[next(iter(state.paces))]
        pace_s = hold_s
    state.paces[key] = pace_s + (hold_s - pace_s) * (PACE_UP if hold_s > pace_s else PACE_DOWN)


def _note_start(turn: Turn, node: Node, job: Job, end: AttemptEnd) -> None:
    """Watch for a node on which nothing starts any more, whatever the workload."""
    cause = end.failure.cause if end.failure is not None else None
    if cause in {Cause.FORK_UNSAFE, Cause.DEADLOCK}:
        turn.count("fork_unsafe", (("reason", cause.value),))
    if cause is not Cause.START_FAILED:
        if node.start_failures:
            node.start_failures.clear()
        return
    node.start_failures.append(job.spec.workload.key)
    others = [one for one in turn.state.nodes.values() if one.state is AgentState.READY and one is not node]
    if len(node.start_failures) >= START_FAILURES_MAX and len(set(node.start_failures)) > 1 and others:
        node.start_failures.clear()
        set_drain(turn, node.name, on=True, reason=NOTHING_STARTS)
        turn.count("node_drained", (("node", node.name), ("reason", NOTHING_STARTS)))
    del node.start_failures[: -2 * START_FAILURES_MAX]


def set_drain(turn: Turn, name: NodeName, *, on: bool, reason: str = "") -> None:
    """Empty a node, or use it again. `reason`: why, where nobody asked for it."""
    state = turn.state
    apply.set_drain(state, name, on, reason)
    turn.record(records.DrainSet(name, on, reason))
    node = state.nodes.get(name)
    if node is not None:
        _drain(turn, node, on=on or bool(node.fault) or node.is_ending)


def note_fault(turn: Turn, node: Node, fault: str) -> None:
    """Its agent says that nothing more should be started there, and why; or ("") that all is well again. Not durable:
    the agent says it again."""
    if fault and not node.fault:
        turn.count("node_drained", (("node", node.name), ("reason", fault)))
    node.fault = fault
    on = bool(fault) or node.is_ending or node.name in turn.state.drained
    if on != node.draining:
        _drain(turn, node, on=on)


def drain_ending(turn: Turn) -> None:
    """Empty nodes that will end soon."""
    state = turn.state
    for node in state.nodes.values():
        if not node.is_ending and node.ends_s - state.now_s <= limits.NODE_END_MARGIN_S:
            node.is_ending = True
            if not node.draining:
                _drain(turn, node, on=True)
                turn.count("node_drained", (("node", node.name), ("reason", "it will end soon")))


def _drain(turn: Turn, node: Node, *, on: bool) -> None:
    node.draining = on
    if node.session:
        node.state = AgentState.DRAINING if on else AgentState.READY
        turn.to_agent(node, Drain(on), durable=True)
    placement.refresh(turn.state, node)
    turn.wake = True


def end_cancelled(turn: Turn, job: Job, index: int) -> None:
    """End a task that has no attempt."""
    task = job.tasks.get(index)
    usage = Usage(attempt=task.ordinal if task is not None else 0)
    failure = Failure(cause=Cause.CANCELLED, message="cancelled before it was started")
    turn.note_end(job.spec.workload.name, Outcome.CANCELLED, usage)
    past = task.past if task is not None else ()
    turn.end(job, TaskEnd(index, Outcome.CANCELLED, None, failure, usage, None, past))


def _end_if_cancelled(turn: Turn, task: Task) -> None:
    """A cancelled task that came back to the queue ends there."""
    if task.cancel_pending or task.job.cancelled:
        end_cancelled(turn, task.job, task.index)


def end_failed(turn: Turn, job: Job, index: int, outcome: Outcome, failure: Failure) -> None:
    """End a task without an attempt for a reason that lies outside of it."""
    usage = Usage()
    task = job.tasks.get(index)
    turn.note_end(job.spec.workload.name, outcome, usage)
    turn.end(job, TaskEnd(index, outcome, None, failure, usage, None, task.past if task is not None else ()))


def end_pending(turn: Turn, queue: Queue, failure: Failure) -> None:
    """End all tasks of the queue that are pending."""
    for chunk in list(queue.chunks):
        for index in chunk.indices():
            end_failed(turn, chunk.job, index, Outcome.FAILED, failure)
    for task in [task for lane in (queue.again, queue.careful, queue.suspects) for task in lane]:
        if task.queued is not None and task.queue is queue:
            end_failed(turn, task.job, task.index, Outcome.FAILED, failure)


def settle_loose(turn: Turn) -> None:
    """Decide about waiting tasks of whose dependencies something became known. Ends may loosen further tasks."""
    state = turn.state
    while state.loose:
        loose, state.loose = state.loose, []
        for task in loose:
            if task.state is not TaskState.WAITING:
                continue
            if task.values is None:
                apply.resolve(state, task)
            if task.broken is not None:
                _end_broken(turn, task, task.broken)
            elif not task.waiting:
                apply.make_ready(state, task)
                turn.wake = True


def _end_broken(turn: Turn, task: Task, key: TaskKey) -> None:
    """A dependency can give no value: it failed, was cancelled, or nothing is known of it any more."""
    state = turn.state
    end = state.end_of(key)
    root = task_id(*key)
    if end is not None and end.outcome is Outcome.CANCELLED:
        failure = Failure(cause=Cause.CANCELLED, message=f"the task {root}, which this one depends on, was cancelled")
        end_failed(turn, task.job, task.index, Outcome.CANCELLED, failure)
        return
    if end is None or end.failure is None:
        text = f"the value of {root} is not here (any more): the task is unknown, or its result was given up"
        root_failure = Failure(cause=Cause.DATA_LOST, message=text)
    elif end.failure.cause is Cause.DEPENDENCY_FAILED and end.failure.root_failure is not None:
        root, root_failure = end.failure.root, end.failure.root_failure
    else:
        root_failure = end.failure
    failure = Failure(
        cause=Cause.DEPENDENCY_FAILED,
        message=f"the task {root}, which this one depends on, did not succeed: {root_failure.message}",
        root=root,
        root_failure=root_failure,
    )
    end_failed(turn, task.job, task.index, Outcome.FAILED, failure)

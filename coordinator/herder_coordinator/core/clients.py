"""Clients come, open jobs, submit, cancel, read what ended, and go.

Everything a client asks for may be asked for again: it repeats after each reconnection whatever was not acknowledged.
So each of these is idempotent, by the job's id and by the tasks' dense indices, and answers what is already true.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from herder_coordinator.core import apply, events, lease, records, views
from herder_coordinator.core.ends import end_cancelled, recall_ahead
from herder_coordinator.core.room import end_size_bytes
from herder_coordinator.core.state import OUTCOMES, Client, Feed, Job, State, Task
from herder_coordinator.core.turn import FEED_BYTES_MAX, Turn
from herder_shared import limits
from herder_shared.ids import BlobId, Incarnation, JobId
from herder_shared.states import AgentState, Cause, Outcome, TaskState
from herder_shared.wire.messages import (
    Answer,
    CancelOk,
    Failure,
    Function,
    JobSpec,
    Notice,
    Refused,
    SubmitOk,
    TaskEnd,
    TaskItem,
    TasksEnded,
    TasksReset,
)

#: Jobs that one owner may have at a time which have not been forgotten.
JOBS_MAX = 100_000
#: Of one job.
TAGS_MAX = 64
#: Ended detached jobs, whose results nobody need ever have asked for; beyond this the oldest are given up.
DETACHED_KEPT_MAX = limits.ENDED_JOBS_MAX
#: Jobs that are kept only because failed tasks of theirs could be run again; beyond this the oldest are given up.
SPENT_KEPT_MAX = limits.ENDED_JOBS_MAX
#: Acknowledged records of a job which somebody else who attaches is told all at once.
PAST_ENDS_MAX = limits.RECENT_ENDS_MAX
#: Indices in one `TasksReset`: about 5 bytes each.
RESET_INDICES_MAX = 20_000

Refusal = Literal["JobNotFound", "RemoteProtocolError", "Unauthorized", "PayloadTooLarge", "DataLost"]


def connected(turn: Turn, event: events.ClientConnected) -> None:
    """A client is there, for the first time or again: what it has been told counts only once it says so itself."""
    owner, depth = event.owner, 0
    if event.attempt is not None:
        task = _task_of(turn.state, event)
        if task is None:
            text = "the attempt whose task this client is has ended, or was given up: nothing it asks for is done"
            turn.to_client(event.client, Refused("Unauthorized", text), durable=False)
            return
        owner, depth = task.job.owner, task.job.depth + 1
    client = apply.client_of(turn.state, event.client, owner, event.attempt, depth)
    client.session = event.session
    client.grace_s = event.grace_s
    client.gone_s = None
    for job_id in client.watched:
        feed = turn.state.jobs[job_id].feeds[event.client]
        feed.paused = True


def _task_of(state: State, event: events.ClientConnected) -> Task | None:
    """The task that runs as the attempt of which an agent says that this client is; None: it may not be anybody's."""
    node = state.nodes.get(event.node) if event.node is not None else None
    task = node.attempts.get(event.attempt) if node is not None and event.attempt is not None else None
    known = state.clients.get(event.client)
    if task is None or (known is not None and known.attempt != event.attempt):
        return None
    other = state.task_clients.get(task.attempt, event.client)
    return task if other == event.client else None


def disconnected(turn: Turn, event: events.ClientDisconnected) -> None:
    client = turn.state.clients.get(event.client)
    if client is None or client.session != event.session:
        return
    client.session = 0
    client.gone_s = turn.state.now_s + _grace_s(turn.state, client)
    lease.alarm(turn.state, client.gone_s)


def _grace_s(state: State, client: Client) -> float:
    if client.grace_s is None:
        return state.periods.disconnect_grace_s
    return min(max(client.grace_s, 0.0), limits.DISCONNECT_GRACE_S_MAX)


def left(turn: Turn, event: events.ClientLeft) -> None:
    client = turn.state.clients.get(event.client)
    if client is not None:
        _give_up(turn, client, 0.0)


def settle_orphans(turn: Turn) -> None:
    """Attempts have ended, however, that were clients: what they submitted ends with them, unless it is detached."""
    orphans, turn.state.orphans = turn.state.orphans, []
    for incarnation in orphans:
        client = turn.state.clients.get(incarnation)
        if client is not None:
            _give_up(turn, client, 0.0)


def check_gone(turn: Turn) -> None:
    """Give up the jobs of clients that did not come back; forget jobs that were given up long enough ago."""
    state = turn.state
    for client in list(state.clients.values()):
        if client.gone_s is not None and state.now_s >= client.gone_s:
            _give_up(turn, client, lease.FORGET_S)
    for job in list(state.jobs.values()):
        if job.forget_s is not None and state.now_s >= job.forget_s:
            forget_if_over(turn, job)
    kept = [job for job in state.jobs.values() if job.spec.detached and job.closed and job.ended == job.count]
    for job in kept[: max(0, len(kept) - DETACHED_KEPT_MAX)]:
        turn.forget(job)
    spent = [job for job in state.jobs.values() if job.spent and _is_told(job)]
    for job in spent[: max(0, len(spent) - SPENT_KEPT_MAX)]:
        turn.forget(job)


def _is_told(job: Job) -> bool:
    """Its own client has all of its records, and none will follow unless somebody asks for failed tasks again."""
    return job.closed and job.ended == job.count and job.acked >= job.cursor and not job.spec.detached


def _give_up(turn: Turn, client: Client, keep_s: float) -> None:
    """The client is gone for good: its jobs that are not detached end. They can be asked about for `keep_s`."""
    state = turn.state
    client.session = 0
    client.gone_s = None
    for job_id in list(client.jobs):
        job = state.jobs[job_id]
        if not job.closed:
            job.closed = True
            turn.record(records.JobClosed(job_id))
        if job.spec.detached:
            continue
        if job.ended < job.count:
            cancel(turn, job, None, running=True)
        apply.abandon_job(state, job, keep_s)
        forget_if_over(turn, job)
    for job_id in list(client.watched):
        if job_id not in client.jobs:
            del state.jobs[job_id].feeds[client.incarnation]
            del client.watched[job_id]
    if not client.jobs:
        apply.drop_client(state, client)  # forgetting its last job may have done so


def forget_if_over(turn: Turn, job: Job) -> None:
    """A closed job whose tasks have all ended is forgotten when its client has all records, or is gone for good."""
    if job.ended < job.count or not job.closed or job.spec.detached:
        return
    gone = job.forget_s is not None and turn.state.now_s >= job.forget_s
    client = turn.state.clients.get(job.client)
    if job.spent and not gone and client is not None and client.session and client.attempt is None:
        return  # it may ask for its failed tasks to be run again, as long as it is there
    if gone or job.acked >= job.cursor:
        turn.forget(job)
        if gone and client is not None and not client.session and not client.jobs:
            apply.drop_client(turn.state, client)


# --- jobs and tasks --------------------------------------------------------------------------------------------------


def job_opened(turn: Turn, event: events.JobOpened) -> None:
    state = turn.state
    spec = event.spec
    client = state.clients.get(event.client)
    if client is None:
        return
    summary = state.summaries.get(spec.job)
    job = state.jobs.get(spec.job)
    if job is None and summary is not None:
        turn.to_client(event.client, SubmitOk(spec.job, summary.tasks))
    elif job is None and len(client.jobs) >= JOBS_MAX:
        turn.refuse(event.client, spec.job, 0, "RemoteProtocolError", f"more than {JOBS_MAX} jobs are open")
    elif job is None and (text := _too_long(spec)):
        turn.refuse(event.client, spec.job, 0, "PayloadTooLarge", text)
    elif job is None:
        turn.record(records.JobOpened(event.client, client.owner, spec, client.attempt, client.depth, client.grace_s))
        apply.open_job(state, event.client, client.owner, spec, client.attempt, client.depth)
        turn.to_client(event.client, SubmitOk(spec.job, 0))
    elif job.client != event.client:
        turn.refuse(event.client, spec.job, 0, "Unauthorized", f"job {spec.job} belongs to another client")
    else:
        turn.to_client(event.client, SubmitOk(spec.job, job.count))
        if job.feeds[event.client].paused:
            # It does not know that the job was opened, so it has seen nothing of it.
            feed = job.feeds[event.client] = Feed(job.acked, job.acked)
            turn.pump(job, event.client, feed)


def _too_long(spec: JobSpec) -> str:
    """What of the job's names is longer than anybody would read; "" when nothing is."""
    named = {
        "name": spec.name,
        "workload's name": spec.workload.name,
        **{f"tag {tag[:20]!r}": tag for tag in spec.tags},
    }
    for what, text in named.items():
        if len(text) > limits.NAME_CHARS_MAX:
            return f"the job's {what} has {len(text)} characters; at most {limits.NAME_CHARS_MAX} are kept: shorten it"
    if len(spec.tags) > TAGS_MAX:
        return f"the job has {len(spec.tags)} tags; at most {TAGS_MAX} are kept"
    return ""


def _own_job(turn: Turn, client: Incarnation, job_id: JobId, first: int, upto: int) -> Job | None:
    """The client's own job; else it is told why not. One that has been forgotten had all tasks that it now speaks of
    (up to `upto`), or was given up while it was away."""
    job = turn.state.jobs.get(job_id)
    if job is None:
        summary = turn.state.summaries.get(job_id)
        if summary is not None and upto <= summary.tasks:
            turn.to_client(client, SubmitOk(job_id, summary.tasks))
        else:
            turn.refuse(client, job_id, first, "JobNotFound", f"there is no job {job_id}, or it has been forgotten")
        return None
    if job.client != client:
        turn.refuse(client, job_id, first, "Unauthorized", f"job {job_id} belongs to another client")
        return None
    return job


def tasks_submitted(turn: Turn, event: events.TasksSubmitted) -> None:
    """New tasks, or a repetition: below the count there is nothing to do but to say so again."""
    state = turn.state
    upto = event.first + len(event.tasks)
    job = _own_job(turn, event.client, event.job, event.first, upto)
    if job is None:
        return
    if upto <= job.count:
        turn.to_client(event.client, SubmitOk(job.id, job.count))
        return
    if event.first > job.count:
        text = f"tasks from {event.first} on of job {job.id} came, but only {job.count} before them"
        turn.refuse(event.client, job.id, event.first, "RemoteProtocolError", text)
        return
    if job.closed:
        text = f"job {job.id} was closed with {job.count} tasks"
        turn.refuse(event.client, job.id, event.first, "RemoteProtocolError", text)
        return
    if upto > limits.ARRAY_TASKS_MAX:
        text = f"a job may have at most {limits.ARRAY_TASKS_MAX} tasks"
        turn.refuse(event.client, job.id, event.first, "PayloadTooLarge", text)
        return
    _accept(turn, job, event.tasks[job.count - event.first :], event.function, event.python)
    turn.to_client(event.client, SubmitOk(job.id, job.count))
    if not any(node.state is AgentState.READY for node in state.nodes.values()):
        _notice_no_agents(turn, event.client)


def _accept(turn: Turn, job: Job, tasks: tuple[TaskItem, ...], function: Function | None, python: str) -> None:
    state = turn.state
    first = job.count
    name: BlobId | None = None
    if function is not None:
        name = function.id
        if name not in state.functions:
            turn.record(records.FunctionKept(function))
            apply.keep_function(state, function)
    turn.record(records.TasksSubmitted(job.id, first, name, tasks, python))
    apply.add_tasks(state, job, first, function=name, tasks=tasks, python=python)
    turn.wake = True
    if job.cancelled:
        for index in range(first, job.count):
            end_cancelled(turn, job, index)


def _notice_no_agents(turn: Turn, incarnation: Incarnation) -> None:
    client = turn.state.clients[incarnation]
    if not client.noticed:
        client.noticed = True
        text = "no agent is connected: the tasks wait until one is (see `herder nodes`, `herder up`)"
        turn.to_client(incarnation, Notice("warning", text), durable=False)


def job_closed(turn: Turn, event: events.JobClosed) -> None:
    job = _own_job(turn, event.client, event.job, 0, event.count)
    if job is None:
        return
    if event.count > job.count:
        text = f"job {job.id} was to be closed with {event.count} tasks, but {job.count} came"
        turn.refuse(event.client, job.id, job.count, "RemoteProtocolError", text)
        return
    if not job.closed:
        job.closed = True
        turn.record(records.JobClosed(job.id))
    turn.to_client(event.client, SubmitOk(job.id, job.count))
    forget_if_over(turn, job)


def cancel_requested(turn: Turn, event: events.CancelRequested) -> None:
    """Cancelling what is unknown or over is fine: nothing of it runs."""
    state = turn.state
    job = state.jobs.get(event.job)
    client = state.clients.get(event.client)
    if job is not None and client is not None:
        if job.client != event.client and job.owner != client.owner and not event.is_admin:
            turn.refuse(event.client, job.id, 0, "Unauthorized", f"job {job.id} belongs to {job.owner!r}")
            return
        cancel(turn, job, event.indices, event.running)
    turn.to_client(event.client, CancelOk(event.job, event.indices, event.running))


def job_change_requested(turn: Turn, event: events.JobChangeRequested) -> None:
    """Pause, resume, or give another priority. What runs goes on; what lies in look-ahead is recalled by a pause."""
    state = turn.state
    job = state.jobs.get(event.job)
    client = state.clients.get(event.client)
    if client is None:
        return
    if job is None:
        text = (
            f"there is no job {event.job}, or it has ended and been forgotten: `herder jobs` lists those that are known"
        )
        turn.to_client(event.client, Answer(event.number, error="JobNotFound", message=text))
        return
    if job.client != event.client and job.owner != client.owner and not event.is_admin:
        text = f"job {job.id} belongs to {job.owner!r}"
        turn.to_client(event.client, Answer(event.number, error="Unauthorized", message=text))
        return
    paused = job.paused if event.paused is None else event.paused
    priority = job.priority if event.priority is None else event.priority
    if (paused, priority) != (job.paused, job.priority):
        turn.record(records.JobChanged(job.id, paused, priority))
        apply.change_job(state, job, paused=paused, priority=priority)
        turn.wake = True
        if paused:
            recall_ahead(turn, [task for task in job.tasks.values() if task.node is not None])
    turn.to_client(event.client, Answer(event.number, jobs=(views.job_info(job, state.now_s),)))


def cancel(turn: Turn, job: Job, indices: tuple[int, ...] | None, running: bool) -> None:
    """Cancel these tasks (None: all, and what still comes): at once where no attempt exists, else through the agent,
    which knows better whether an attempt has started: without `running` it stops only those that have not."""
    turn.record(records.CancelRequested(job.id, indices, running))
    held = [task for task in job.tasks.values() if task.node is not None and not task.cancel]
    for index in apply.cancel_tasks(job, indices, running):
        end_cancelled(turn, job, index)
    for task in held:
        if task.node is not None and (task.cancel or (task.cancel_pending and task.state is TaskState.ASSIGNED)):
            turn.cancel(task.node, task.attempt, waiting_only=not task.cancel)


def retry_requested(turn: Turn, event: events.RetryRequested) -> None:
    """Run the job's failed tasks again. Asked twice, the second time finds none that has failed."""
    job = turn.state.jobs.get(event.job)
    client = turn.state.clients.get(event.client)
    error = message = ""
    if job is None:
        error = "JobNotFound"
        message = (
            f"there is no job {event.job}, or it has been forgotten: failed tasks are kept while the client that "
            "submitted them is there, and those of detached jobs"
        )
    elif client is None or (job.client != event.client and job.owner != client.owner):
        error, message = "Unauthorized", f"job {job.id} belongs to {job.owner!r}"
    elif job.cancelled:
        error, message = "HerderError", f"job {job.id} was cancelled: what had not ended by then will not be run"
    if job is None or error:
        turn.to_client(event.client, Answer(event.number, error=error, message=message))
        return
    indices = tuple(sorted(index for index in job.spent if _may_run_again(job, index)))
    if indices:
        turn.record(records.TasksReset(job.id, indices))
        apply.reset_tasks(turn.state, job, indices)
        job.forget_s = None
        turn.wake = True
        for incarnation in job.feeds:
            _tell_reset(turn, job, incarnation, indices)
    turn.to_client(event.client, Answer(event.number, count=len(indices)))


def _tell_reset(turn: Turn, job: Job, incarnation: Incarnation, indices: tuple[int, ...]) -> None:
    for first in range(0, len(indices), RESET_INDICES_MAX):
        turn.to_client(incarnation, TasksReset(job.id, indices[first : first + RESET_INDICES_MAX]))


def _may_run_again(job: Job, index: int) -> bool:
    """At most once means: not even when asked to, if nobody knows how its last attempt ended."""
    return job.spec.options.idempotent or OUTCOMES[job.outcomes[index]] is not Outcome.LOST


# --- what ended ------------------------------------------------------------------------------------------------------


def attached(turn: Turn, event: events.Attached) -> None:
    """Send the job's terminal records from the cursor on, now and in future."""
    state = turn.state
    job = state.jobs.get(event.job)
    client = state.clients.get(event.client)
    if client is None:
        return
    summary = state.summaries.get(event.job)
    if job is None and summary is not None and event.cursor >= summary.tasks:
        # It has everything, and does not know that we know.
        turn.to_client(event.client, SubmitOk(event.job, summary.tasks))
        return
    if job is None:
        text = f"there is no job {event.job}, or it has ended and been forgotten"
        turn.refuse(event.client, event.job, 0, "JobNotFound", text)
        return
    if not event.cursor and job.base and job.client != event.client and not job.resets and job.base <= PAST_ENDS_MAX:
        past = _past(state, job)
        for first in range(0, job.base, limits.BATCH_TASKS_MAX):
            turn.to_client(event.client, TasksEnded(job.id, first, past[first : first + limits.BATCH_TASKS_MAX]))
        event = replace(event, cursor=job.base)
    if event.cursor < job.base:
        text = f"the first {job.base} results of job {job.id} were delivered to its client and are no longer kept"
        turn.refuse(event.client, job.id, 0, "DataLost", text)
        return
    cursor = min(event.cursor, job.cursor)
    feed = job.feeds[event.client] = Feed(cursor, cursor)
    client.watched[job.id] = None
    if job.client == event.client:
        job.forget_s = None
        client.jobs[job.id] = None
        _acked(turn, job, cursor)
    turn.pump(job, event.client, feed)
    if job.resets:
        # Those that have ended before and run again are among these. It may have missed that, or been told it already.
        _tell_reset(turn, job, event.client, tuple(sorted(job.tasks)))


def _past(state: State, job: Job) -> tuple[TaskEnd, ...]:
    """The records that the job's own client has acknowledged, for somebody else who comes later: by index, as their
    order is not kept, and what is gone of them as lost."""
    ended = [index for index, outcome in enumerate(job.outcomes) if outcome and not job.ends.has(index)]
    left_bytes = FEED_BYTES_MAX
    text = "it was delivered to the job's own client, and is not kept any more"
    gone = Failure(cause=Cause.DATA_LOST, message=text)
    past: list[TaskEnd] = []
    for index in ended:
        end = state.recent.get((job.id, index))
        left_bytes -= end_size_bytes(end) if end is not None else 0
        past.append(end if end is not None and left_bytes > 0 else TaskEnd(index, Outcome.LOST, failure=gone))
    assert len(past) == job.base
    return tuple(past)


def events_acked(turn: Turn, event: events.EventsAcked) -> None:
    state = turn.state
    job = state.jobs.get(event.job)
    if job is None:
        return
    feed = job.feeds.get(event.client)
    if feed is None:
        return
    cursor = min(event.cursor, job.cursor)
    feed.acked = max(feed.acked, cursor)
    while feed.flights and feed.flights[0][0] <= feed.acked:
        feed.flight_bytes -= feed.flights.popleft()[1]
    if job.client == event.client:
        _acked(turn, job, cursor)
    if job.id in state.jobs:
        turn.pump(job, event.client, feed)


def _acked(turn: Turn, job: Job, cursor: int) -> None:
    """The job's own client has these: they need not be kept for it."""
    if cursor <= job.acked:
        return
    if not job.spec.detached:
        turn.record(records.EventsAcked(job.id, cursor))
    apply.ack_events(turn.state, job, cursor)
    forget_if_over(turn, job)


def sweep(turn: Turn) -> None:
    """After a replay: finish cancellations whose ends were in a tail that was cut."""
    for job in list(turn.state.jobs.values()):
        if job.cancelled and job.ended < job.count:
            cancel(turn, job, None, running=False)
        for task in list(job.tasks.values()):
            if task.cancel_pending and task.node is None:
                end_cancelled(turn, job, task.index)


def set_grace(state: State) -> None:
    """After a replay: every client has the disconnect grace to be back, but for tasks' own whose attempt has ended."""
    running = {attempt for node in state.nodes.values() for attempt in node.attempts}
    state.task_clients = {each: name for each, name in state.task_clients.items() if each in running}
    state.orphans = [
        client.incarnation
        for client in state.clients.values()
        if client.attempt is not None and client.attempt not in running
    ]
    for client in state.clients.values():
        client.gone_s = state.now_s + _grace_s(state, client)

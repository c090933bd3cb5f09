"""The state as records: what a journal begins with, so that nothing older is needed."""

from __future__ import annotations

from collections.abc import Iterator

from herder_coordinator.core import records, shares
from herder_coordinator.core.ends import account
from herder_coordinator.core.records import Record
from herder_coordinator.core.room import shelved_items
from herder_coordinator.core.state import NO_ATTEMPT, Job, State, Task, TaskKey
from herder_shared import limits
from herder_shared.ids import BlobId
from herder_shared.states import TaskState
from herder_shared.wire.messages import Payload, TaskItem

#: Tasks, and bytes of their arguments, in one record.
PART_TASKS_MAX = 20_000
PART_BYTES_MAX = 4 * limits.MIB


def snapshot(state: State, *, goes_on: bool = False) -> Iterator[Record]:
    """Records which, replayed into an empty state, give this one: but for who is connected, and for what a fresh start
    forgets anyway (measurements, acknowledged records). One after the other, so that what lies on the shelf is in
    memory a part at a time; the state must not change meanwhile.

    `goes_on`: the journal of the same life goes on behind it, so it keeps what only a fresh start forgets.
    """
    yield records.EpochStarted(state.cluster, state.epoch)
    yield from (records.JobSummarized(info) for info in state.summaries.values())
    yield from (records.FunctionKept(kept.function) for kept in state.functions.values())
    for job in state.jobs.values():
        yield from _job(state, job)
    if goes_on:
        yield from (records.EndsRemembered(job_id, (end,)) for (job_id, _), end in state.recent.items())
    for key, value in _values(state).items():
        yield records.DependencyKept(key[0], key[1], value)
    yield from (records.DrainSet(name, True, reason) for name, reason in state.drained.items())
    revoked = tuple(state.revoked.values())
    for first in range(0, len(revoked), limits.BATCH_TASKS_MAX):
        yield records.KeysRevoked(revoked[first : first + limits.BATCH_TASKS_MAX])
    for workload, kept in state.workloads.items():
        if kept.demoted:
            yield records.WorkloadDemoted(workload, kept.demoted, None if kept.jobs else kept.spec)
    account = shares.kept(state)
    if account.owners or account.jobs:
        yield account
    for job in state.jobs.values():
        if job.paused or job.priority != job.spec.options.priority:
            yield records.JobChanged(job.id, job.paused, job.priority)
        yield from _accounts(job)
    for node in state.nodes.values():
        assigned = tuple(
            records.Assignment(task.job.id, task.index, attempt, task.ordinal, task.fresh)
            for attempt, task in node.attempts.items()
        )
        if assigned:
            yield records.AttemptsAssigned(node.name, node.incarnation, assigned)
    for job in state.jobs.values():
        yield from _cancels(job)


def _job(state: State, job: Job) -> Iterator[Record]:
    client = state.clients.get(job.client)
    yield records.JobRestored(
        client=job.client,
        owner=job.owner,
        spec=job.spec,
        cursor=job.base,
        closed=job.closed,
        cancelled=job.cancelled,
        age_s=max(0.0, state.now_s - job.opened_s),
        attempt=client.attempt if client is not None else None,
        depth=job.depth,
        resets=job.resets,
        grace_s=client.grace_s if client is not None else None,
    )
    yield from _tasks(state, job)
    for first in range(job.base, job.cursor, limits.BATCH_TASKS_MAX):
        yield records.EndsRestored(job.id, tuple(job.ends.between(first, first + limits.BATCH_TASKS_MAX)))
    yield from _spent(job)


def _spent(job: Job) -> Iterator[Record]:
    part: list[records.SpentTask] = []
    size_bytes = 0
    for index, one in job.spent.items():
        part.append(records.SpentTask(index, one.item, one.function, one.python, one.attempt, one.ordinal))
        size_bytes += len(one.item.args.inline)
        if len(part) >= PART_TASKS_MAX or size_bytes >= PART_BYTES_MAX:
            yield records.SpentKept(job.id, tuple(part))
            part, size_bytes = [], 0
    if part:
        yield records.SpentKept(job.id, tuple(part))


_Kind = tuple[BlobId | None, str]


def _tasks(state: State, job: Job) -> Iterator[Record]:
    """The tasks in order of their indices, cut where the function changes and where a record becomes large."""
    first, size_bytes = 0, 0
    items: list[TaskItem | None] = []
    kind_here: _Kind | None = None
    for index, (item, kind) in enumerate(_entries(state, job)):
        changes = kind is not None and kind_here is not None and kind != kind_here
        if changes or len(items) >= PART_TASKS_MAX or size_bytes >= PART_BYTES_MAX:
            yield _part(job, first, items, kind_here)
            first, items, size_bytes, kind_here = index, [], 0, None
        if item is not None:
            kind_here = kind
            size_bytes += len(item.args.inline)
        items.append(item)
    if items:
        yield _part(job, first, items, kind_here)


_NO_ENTRY = (None, None)


def _entries(state: State, job: Job) -> Iterator[tuple[TaskItem | None, _Kind | None]]:
    """Of each task in order: None once it has ended. Reads one chunk from the shelf at a time."""
    index = 0
    for chunk in job.chunks:
        if not chunk.left:
            continue
        yield from (_entry(job, before) for before in range(index, chunk.first))
        kind = (chunk.function, chunk.python)
        items = chunk.tasks if chunk.ticket is None else shelved_items(state.room, chunk.ticket)
        for index, (item, pending) in enumerate(zip(items, chunk.pending, strict=True), chunk.first):
            yield (item, kind) if pending else _entry(job, index)
        index += 1
    yield from (_entry(job, after) for after in range(index, job.count))


def _entry(job: Job, index: int) -> tuple[TaskItem | None, _Kind | None]:
    task = job.tasks.get(index)
    return (task.item, (task.function, task.python)) if task is not None else _NO_ENTRY


def _part(job: Job, first: int, items: list[TaskItem | None], kind: _Kind | None) -> Record:
    outcomes = bytes(job.outcomes[first : first + len(items)])
    function, python = kind or (None, "")
    return records.TasksRestored(job.id, first, function, tuple(items) if kind else (), python, outcomes)


def _values(state: State) -> dict[TaskKey, Payload]:
    """Values with which unended tasks wait and which no kept terminal record has."""
    values: dict[TaskKey, Payload] = {}
    for job in state.jobs.values():
        for task in job.tasks.values():
            for key, value in (task.values or {}).items():
                other = state.jobs.get(key[0])
                unended = other is not None and not other.outcomes[key[1]]
                if not unended and not (other is not None and other.ends.has(key[1])):
                    values[key] = value
    return values


def _accounts(job: Job) -> Iterator[Record]:
    tried = [task for task in job.tasks.values() if _has_history(task)]
    for first in range(0, len(tried), limits.BATCH_TASKS_MAX):
        part = tried[first : first + limits.BATCH_TASKS_MAX]
        yield records.TasksRetried(tuple(account(task, past=task.past) for task in part))


def _has_history(task: Task) -> bool:
    return task.attempt != NO_ATTEMPT and task.state is not TaskState.WAITING


def _cancels(job: Job) -> Iterator[Record]:
    hard = tuple(index for index, task in job.tasks.items() if task.cancel)
    soft = tuple(index for index, task in job.tasks.items() if task.cancel_pending and not task.cancel)
    if hard:
        yield records.CancelKept(job.id, hard, running=True)
    if soft:
        yield records.CancelKept(job.id, soft, running=False)

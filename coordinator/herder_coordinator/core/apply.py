"""How the state changes: one function for each thing that can become true, used by `step` and by the replay alike.

These functions decide nothing and know no effects. What needs a decision afterwards (a dependant whose last dependency
ended, a blob that nobody needs) is noted in `State.loose` and `State.unused`.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

import msgspec

from herder_coordinator.core import placement, records, reserve, shares
from herder_coordinator.core.lease import FORGET_S
from herder_coordinator.core.room import Ends, Room, items_size_bytes, shelve_items, shelved_items
from herder_coordinator.core.room import drop as drop_from_shelf
from herder_coordinator.core.state import (
    OUTCOME_CODES,
    OUTCOMES,
    Chunk,
    Client,
    Feed,
    Group,
    GroupKey,
    Job,
    KeptFunction,
    KeptWorkload,
    Node,
    Queue,
    Share,
    Spent,
    State,
    Task,
    TaskKey,
)
from herder_shared import limits
from herder_shared.ids import AttemptId, BlobId, Incarnation, JobId, NodeName, WorkloadKey
from herder_shared.states import TASK_TRANSITIONS, AgentState, Outcome, TaskState
from herder_shared.wire.messages import (
    Function,
    JobInfo,
    JobSpec,
    Key,
    PastAttempt,
    Payload,
    TaskEnd,
    TaskItem,
    WorkloadSpec,
)

#: Attempts of a task that are remembered beside the newest.
PAST_MAX = 8
#: Workloads and paces of workloads that no job uses.
WORKLOADS_KEPT_MAX = 1_000
#: Arguments of failed tasks which are kept so that they can be run again, and what each costs beside its bytes.
SPENT_BYTES_MAX = 256 * limits.MIB
SPENT_OVERHEAD_BYTES = 500
SPENT_OUTCOMES = frozenset(set(Outcome) - {Outcome.SUCCEEDED, Outcome.CANCELLED})
PACES_MAX = 2_000


# --- blobs, functions ------------------------------------------------------------------------------------------------


def use_blob(state: State, blob: BlobId) -> None:
    state.blobs[blob] = state.blobs.get(blob, 0) + 1


def release_blob(state: State, blob: BlobId) -> None:
    uses = state.blobs[blob] - 1
    if uses:
        state.blobs[blob] = uses
    else:
        del state.blobs[blob]
        state.unused.append(blob)


def keep_function(state: State, function: Function) -> None:
    """From now on tasks may name it. A function without content is a blob of the same id."""
    if function.id in state.functions:
        return
    state.functions[function.id] = KeptFunction(function)
    state.idle_functions[function.id] = None
    if not function.content:
        use_blob(state, function.id)


def drop_functions(state: State, functions: Sequence[BlobId]) -> None:
    for function_id in functions:
        kept = state.functions.pop(function_id)
        del state.idle_functions[function_id]
        if not kept.function.content:
            release_blob(state, function_id)
        for node in state.nodes.values():
            for told in node.told_jobs.values():
                told.discard(function_id)


def _use_function(state: State, function: BlobId | None) -> None:
    if function is not None:
        kept = state.functions[function]
        kept.uses += 1
        if kept.uses == 1:
            del state.idle_functions[function]


def _release_function(state: State, function: BlobId | None) -> None:
    if function is not None:
        kept = state.functions[function]
        kept.uses -= 1
        if not kept.uses:
            state.idle_functions[function] = None


# --- clients and jobs ------------------------------------------------------------------------------------------------


def client_of(
    state: State, incarnation: Incarnation, owner: str, attempt: AttemptId | None = None, depth: int = 0
) -> Client:
    client = state.clients.get(incarnation)
    if client is None:
        client = state.clients[incarnation] = Client(incarnation, owner, attempt=attempt, depth=depth)
        if attempt is not None:
            state.task_clients[attempt] = incarnation
    return client


def drop_client(state: State, client: Client) -> None:
    """Nothing of it is left to be known."""
    state.clients.pop(client.incarnation, None)
    if client.attempt is not None and state.task_clients.get(client.attempt) == client.incarnation:
        del state.task_clients[client.attempt]


def open_job(  # noqa: PLR0917
    state: State,
    incarnation: Incarnation,
    owner: str,
    spec: JobSpec,
    attempt: AttemptId | None = None,
    depth: int = 0,
) -> Job:
    options = spec.options
    request = placement.request_of(options)
    key = GroupKey(options.priority, owner, spec.workload.key, request, options.idempotent, depth)
    owner_share = shares.owner_of(state, owner)
    share = Share(at_s=state.now_s)
    job = Job(
        spec=spec,
        client=incarnation,
        owner=owner,
        opened_s=state.now_s,
        share=share,
        owner_share=owner_share,
        ends=Ends(state.room),
        depth=depth,
        priority=options.priority,
    )
    job.queue = Queue(job, _join_group(state, key))
    job.feeds[incarnation] = Feed(0, 0)
    state.jobs[spec.job] = job
    client = client_of(state, incarnation, owner, attempt, depth)
    client.jobs[spec.job] = None
    client.watched[spec.job] = None
    kept = state.workloads.get(spec.workload.key)
    if kept is None:
        _bound_workloads(state)
        kept = state.workloads[spec.workload.key] = KeptWorkload(spec.workload)
    kept.jobs += 1
    return job


def _join_group(state: State, key: GroupKey) -> Group:
    group = state.groups.get(key)
    if group is None:
        group = state.groups[key] = Group(key, state.next_number, key.request)
        state.next_number += 1
    group.users += 1
    return group


def _leave_group(state: State, group: Group) -> None:
    group.users -= 1
    if not group.users:
        del state.groups[group.key]
        reserve.release(state, group)


def change_job(state: State, job: Job, *, paused: bool, priority: int) -> None:
    """Whether tasks of the job may be started, and before which others."""
    for each in job.queues:
        _withdraw(state, each)
    job.paused = paused
    if priority != job.priority:
        job.priority = priority
        for each in job.queues:
            left = each.group
            each.group = _join_group(state, replace(left.key, priority=priority))
            _leave_group(state, left)
    for each in job.queues:
        _enlist(state, each)


def _enlist(state: State, queue: Queue) -> None:
    """Have the queue take part, if it has pending tasks and its job is not paused."""
    group = queue.group
    if queue.pending and not queue.job.paused:
        group.queues[queue.job.id] = queue
        group.pending += queue.pending
        state.busy[group.number] = group


def _withdraw(state: State, queue: Queue) -> None:
    group = queue.group
    if group.queues.pop(queue.job.id, None) is not None:
        group.pending -= queue.pending
        if not group.pending:
            del state.busy[group.number]


def grown_queue(state: State, job: Job, memory_bytes: int) -> Queue:
    """Where tasks of the job belong that are given so much memory."""
    queue = job.grown.get(memory_bytes)
    if queue is None:
        key = job.group.key
        grown_key = replace(key, request=replace(key.request, memory_bytes=memory_bytes))
        queue = job.grown[memory_bytes] = Queue(job, _join_group(state, grown_key))
    return queue


def _bound_workloads(state: State) -> None:
    if len(state.workloads) >= WORKLOADS_KEPT_MAX:
        for key in [key for key, kept in state.workloads.items() if not kept.jobs][: WORKLOADS_KEPT_MAX // 10]:
            del state.workloads[key]


def demote(state: State, key: WorkloadKey, reason: str, spec: WorkloadSpec | None = None) -> None:
    """The workload is not forked any more. Forgotten with the workload, some time after the last job that had it.
    `spec`: it is kept, though no job has it."""
    kept = state.workloads.get(key)
    if kept is None and spec is not None:
        kept = state.workloads[key] = KeptWorkload(spec)
    if kept is not None:
        kept.demoted = reason
        kept.evidence.clear()


def told_spec(state: State, spec: WorkloadSpec) -> WorkloadSpec:
    """The workload as agents are told of it: with the verdict, where there is one."""
    kept = state.workloads.get(spec.key)
    return msgspec.structs.replace(spec, demoted=kept.demoted) if kept is not None and kept.demoted else spec


def abandon_job(state: State, job: Job, after_s: float = FORGET_S) -> None:
    """Its client is gone for good: nobody will acknowledge its records."""
    if job.forget_s is None:
        job.forget_s = state.now_s + after_s


def forget_job(state: State, job: Job, info: JobInfo) -> None:
    for end in job.ends.clear():
        _release_result(state, end)
    for index in list(job.spent):
        _drop_spent(state, job, index)
    for queue in job.queues:
        _leave_group(state, queue.group)
    kept = state.workloads.get(job.spec.workload.key)
    if kept is not None:
        kept.jobs -= 1
    del state.jobs[job.id]
    for incarnation in job.feeds:
        client = state.clients.get(incarnation)
        if client is not None:
            client.watched.pop(job.id, None)
            client.jobs.pop(job.id, None)
    # What refers to the job and to which it refers: cycles would lie about until a full collection, which comes rarely.
    job.chunks.clear()
    job.grown.clear()
    del job.queue
    summarize(state, info)


def summarize(state: State, info: JobInfo) -> None:
    state.summaries[info.job] = info
    while len(state.summaries) > limits.ENDED_JOBS_MAX:
        del state.summaries[next(iter(state.summaries))]


# --- tasks come ------------------------------------------------------------------------------------------------------


def add_tasks(
    state: State, job: Job, first: int, *, function: BlobId | None, tasks: Sequence[TaskItem | None], python: str
) -> None:
    """Append tasks (None: has ended, from a snapshot). Invariant: `first` is the job's count."""
    assert first == job.count
    job.count += len(tasks)
    job.outcomes.extend(bytes(len(tasks)))
    plain: list[TaskItem | None] = list(tasks)
    pending = bytearray(b"\1" * len(plain))
    chunk = Chunk(job, first, pending, plain, function, python, state.now_s, state.next_number, 0, len(plain))
    state.next_number += 1
    for offset, item in enumerate(tasks):
        if item is None:
            pending[offset] = 0
            chunk.left -= 1
            continue
        if item.args.blob is not None:
            use_blob(state, item.args.blob)
        if item.deps:
            plain[offset] = None
            pending[offset] = 0
            chunk.left -= 1
            task = Task(job, first + offset, item, function, python, TaskState.WAITING, state.now_s)
            _use_function(state, function)
            job.tasks[task.index] = task
            state.loose.append(task)
    if chunk.left:
        _find_room(state.room, chunk)
        _use_function(state, function)
        job.chunks.append(chunk)
        job.pending += chunk.left
        job.queue.chunks.append(chunk)
        _add_pending(state, job.queue, chunk.left)


def _find_room(room: Room, chunk: Chunk) -> None:
    """In memory, or on the shelf."""
    size_bytes = items_size_bytes(chunk.tasks)
    chunk.ticket = shelve_items(room, chunk.tasks, size_bytes)
    if chunk.ticket is not None:
        chunk.tasks = []
    else:
        chunk.size_bytes = size_bytes
        room.queued_bytes += size_bytes


def _fetch(room: Room, chunk: Chunk) -> None:
    """From the shelf: its tasks begin to be started, and it is in memory until they all are."""
    assert chunk.ticket is not None
    chunk.tasks = [
        item if pending else None
        for item, pending in zip(shelved_items(room, chunk.ticket), chunk.pending, strict=True)
    ]
    drop_from_shelf(room, chunk.ticket)
    chunk.ticket = None
    chunk.size_bytes = items_size_bytes(chunk.tasks)
    room.queued_bytes += chunk.size_bytes


def _add_pending(state: State, queue: Queue, count: int) -> None:
    queue.pending += count
    if queue.job.paused:
        return
    group = queue.group
    group.pending += count
    if count > 0:
        if queue.pending == count:
            group.queues[queue.job.id] = queue
        state.busy[group.number] = group
    elif not queue.pending:
        del group.queues[queue.job.id]
        if not group.pending:
            del state.busy[group.number]


def _item_of(state: State, chunk: Chunk, offset: int) -> TaskItem:
    """Of a task that is pending in the chunk, wherever that lies."""
    if chunk.ticket is not None:
        _fetch(state.room, chunk)
    item = chunk.tasks[offset]
    assert item is not None
    return item


def take(state: State, chunk: Chunk, offset: int) -> Task:
    """Make an object of an entry of a chunk. The caller gives it a place at once."""
    item = _item_of(state, chunk, offset)
    job = chunk.job
    index = chunk.first + offset
    task = Task(job, index, item, chunk.function, chunk.python, TaskState.PENDING, chunk.since_s)
    job.tasks[index] = task
    _use_function(state, chunk.function)
    _leave_chunk(state, chunk, offset)
    return task


def _leave_chunk(state: State, chunk: Chunk, offset: int) -> None:
    if chunk.ticket is None:
        chunk.tasks[offset] = None
    chunk.pending[offset] = 0
    chunk.left -= 1
    chunk.job.pending -= 1
    _add_pending(state, chunk.job.queue, -1)
    if not chunk.left:
        state.room.queued_bytes -= chunk.size_bytes
        if chunk.ticket is not None:
            drop_from_shelf(state.room, chunk.ticket)
        _release_function(state, chunk.function)
        job = chunk.job
        job.dead += 1
        if (job.dead > 32 and job.dead * 2 > len(job.chunks)) or job.dead == len(job.chunks):
            job.chunks = [one for one in job.chunks if one.left]
            job.dead = 0


def chunk_of(job: Job, index: int) -> tuple[Chunk, int] | None:
    """The chunk in which the task is pending, and its place there."""
    place = bisect_right(job.chunks, index, key=_first_of) - 1
    if place < 0:
        return None
    chunk = job.chunks[place]
    offset = index - chunk.first
    if offset >= len(chunk.pending) or not chunk.pending[offset]:
        return None
    return chunk, offset


def _first_of(chunk: Chunk) -> int:
    return chunk.first


def task_of(state: State, job: Job, index: int) -> Task | None:
    """The object of an unended task, made on the spot (and not yet in any place) if it was an entry of a chunk."""
    task = job.tasks.get(index)
    if task is None:
        found = chunk_of(job, index)
        if found is not None:
            task = take(state, *found)
    return task


# --- dependencies ----------------------------------------------------------------------------------------------------


def resolve(state: State, task: Task) -> None:
    """Find what a waiting task waits for: values that exist, tasks that have not ended, one that can give nothing."""
    task.values = {}
    for key in task.item.deps:
        if key in task.values:
            continue
        job = state.jobs.get(key[0])
        later = job is task.job and key[1] >= task.index
        if job is not None and key[1] < job.count and not later and not job.outcomes[key[1]]:
            task.waiting += 1
            state.dependants.setdefault(key, []).append(task)
            task.values[key] = Payload()
        else:
            value = value_of(state, key)
            if value is None:
                task.broken = task.broken or key
            else:
                _give_value(state, task, key, value)


def value_of(state: State, key: TaskKey) -> Payload | None:
    """What an ended task returned, if it succeeded and its value is still here."""
    end = state.end_of(key)
    if end is not None:
        return (end.result or Payload()) if end.outcome is Outcome.SUCCEEDED else None
    return state.restored_values.get(key)


def _give_value(state: State, task: Task, key: TaskKey, value: Payload) -> None:
    assert task.values is not None
    task.values[key] = value
    if value.blob is not None:
        use_blob(state, value.blob)


def _tell_dependants(state: State, key: TaskKey, end: TaskEnd) -> None:
    for task in state.dependants.pop(key, ()):
        task.waiting -= 1
        if end.outcome is Outcome.SUCCEEDED:
            _give_value(state, task, key, end.result or Payload())
        else:
            assert task.values is not None
            del task.values[key]
            task.broken = task.broken or key
        if not task.waiting or task.broken:
            state.loose.append(task)


def make_ready(state: State, task: Task) -> None:
    """All that it waited for is there."""
    move(task, TaskState.PENDING)
    task.since_s = state.now_s
    queue(state, task)


# --- a task's way ----------------------------------------------------------------------------------------------------


def move(task: Task, to: TaskState) -> None:
    assert to in TASK_TRANSITIONS[task.state], f"{task.job.id}.{task.index}: {task.state} to {to}"
    task.state = to


def queue(state: State, task: Task) -> None:
    """Put a pending task that has no place into its group's queue."""
    assert task.queued is None
    assert not task.delay
    queue = task.queue
    task.queued = queue.suspects if task.quarantine_s else queue.careful if task.avoid else queue.again
    task.queued.append(task)
    _add_pending(state, queue, 1)


def unplace(state: State, task: Task) -> None:
    """Take a task out of wherever it is."""
    if task.node is not None:
        placement.detach(state, task.node, task.attempt)
        task.node = None
        if state.task_clients and task.attempt in state.task_clients:
            state.orphans.append(state.task_clients.pop(task.attempt))
    elif task.queued is not None:
        task.queued = None
        _add_pending(state, task.queue, -1)
    elif task.delay:
        task.delay = 0
    elif task.state is TaskState.WAITING:
        _stop_waiting(state, task)


def _stop_waiting(state: State, task: Task) -> None:
    for key in task.values or ():
        others = state.dependants.get(key)
        if others is not None and task in others:
            others.remove(task)
            task.waiting -= 1
            if not others:
                del state.dependants[key]


def assign(state: State, task: Task, node: Node, attempt: AttemptId, *, ordinal: int, fresh: bool) -> None:
    """The attempt exists and is (or is about to be) on this node."""
    unplace(state, task)
    if task.state is not TaskState.PENDING:  # a higher attempt takes the place of the one that was known
        move(task, TaskState.PENDING)
    move(task, TaskState.ASSIGNED)
    task.attempt = attempt
    task.ordinal = ordinal
    task.fresh = fresh
    task.node = node
    task.queued_s = max(0.0, state.now_s - task.since_s)
    placement.attach(state, node, task)
    if task.quarantine_s:
        node.suspect = task


def retry(state: State, task: Task, account: records.Retry) -> None:
    """The newest attempt was not the last: pending again, after its back-off."""
    unplace(state, task)
    if task.state is not TaskState.PENDING:
        move(task, TaskState.PENDING)
    task.since_s = state.now_s
    if account.attempt >= task.attempt:  # else, in a replay, a record of the same turn has told of a later one already
        task.attempt = account.attempt
        task.ordinal = account.ordinal
    task.failures = account.failures
    task.crashes = account.crashes
    task.killed_on = account.killed_on
    task.avoid = account.avoid
    task.fresh = account.fresh
    task.reran = account.reran
    task.suspect = account.suspect
    task.quarantine_s = account.quarantine_s
    if account.memory_bytes:
        task.grown = grown_queue(state, task.job, account.memory_bytes)
    if account.past:
        task.past = trimmed((*task.past, *account.past))
    if account.backoff_s > 0:
        task.delay = state.next_number
        state.next_number += 1
        heapq.heappush(state.delayed, (state.now_s + account.backoff_s, task.delay, task))
    else:
        queue(state, task)


def trimmed(past: tuple[PastAttempt, ...]) -> tuple[PastAttempt, ...]:
    """The first of these attempts and the last ones."""
    return past if len(past) <= PAST_MAX else (past[0], *past[1 - PAST_MAX :])


def end_task(state: State, job: Job, end: TaskEnd) -> None:
    """The terminal record. Nothing follows for this task."""
    index = end.index
    assert not job.outcomes[index], f"{job.id}.{index} ended twice"
    task = job.tasks.pop(index, None)
    if end.outcome in SPENT_OUTCOMES:
        _keep_spent(state, job, index, task)
    if task is not None:
        unplace(state, task)
        task.state = TaskState.ENDED
        blob = task.item.args.blob
        _release_function(state, task.function)
        if task.values:
            _release_values(state, task)
    else:
        found = chunk_of(job, index)
        assert found is not None
        chunk, offset = found
        item = chunk.tasks[offset] if chunk.ticket is None else None  # on the shelf nothing names a blob
        blob = item.args.blob if item is not None else None
        _leave_chunk(state, chunk, offset)
    if blob is not None:
        release_blob(state, blob)
    job.outcomes[index] = OUTCOME_CODES[end.outcome]
    job.ended += 1
    job.ended_by[end.outcome] = job.ended_by.get(end.outcome, 0) + 1
    state.ended_total += 1
    job.ends.add(end)
    if end.result is not None and end.result.blob is not None:
        use_blob(state, end.result.blob)
    if state.dependants:
        _tell_dependants(state, (job.id, index), end)


def _keep_spent(state: State, job: Job, index: int, task: Task | None) -> None:
    """Keep what it takes to run this task again, if there is room."""
    if task is not None:
        keep_spent(state, job, index, Spent(task.item, task.function, task.python, task.attempt, task.ordinal))
        return
    if state.spent_bytes >= SPENT_BYTES_MAX:
        return
    found = chunk_of(job, index)
    assert found is not None
    chunk, offset = found
    keep_spent(state, job, index, Spent(_item_of(state, chunk, offset), chunk.function, chunk.python))


def keep_spent(state: State, job: Job, index: int, spent: Spent) -> None:
    """As `_keep_spent`; also from a snapshot."""
    size_bytes = _spent_bytes(spent)
    if state.spent_bytes + size_bytes > SPENT_BYTES_MAX:
        return
    state.spent_bytes += size_bytes
    job.spent[index] = spent
    _use_function(state, spent.function)
    if spent.item.args.blob is not None:
        use_blob(state, spent.item.args.blob)


def _drop_spent(state: State, job: Job, index: int) -> Spent:
    spent = job.spent.pop(index)
    state.spent_bytes -= _spent_bytes(spent)
    _release_function(state, spent.function)
    if spent.item.args.blob is not None:
        release_blob(state, spent.item.args.blob)
    return spent


def _spent_bytes(spent: Spent) -> int:
    return SPENT_OVERHEAD_BYTES + spent.item.args.size_bytes + len(spent.item.args.inline)


def reset_tasks(state: State, job: Job, indices: Sequence[int]) -> None:
    """These failed tasks have not ended any more: as submitted, but for the numbers of their attempts."""
    for index in indices:
        kept = job.spent[index]
        _use_function(state, kept.function)
        if kept.item.args.blob is not None:
            use_blob(state, kept.item.args.blob)
        _drop_spent(state, job, index)
        outcome = OUTCOMES[job.outcomes[index]]
        job.outcomes[index] = 0
        job.ended -= 1
        job.resets += 1
        job.ended_by[outcome] -= 1
        if not job.ended_by[outcome]:
            del job.ended_by[outcome]
        job.ends.forget(index)
        if (job.id, index) in state.recent:
            _drop_recent(state, (job.id, index))
        waits = TaskState.WAITING if kept.item.deps else TaskState.PENDING
        task = Task(job, index, kept.item, kept.function, kept.python, waits, state.now_s)
        task.attempt, task.ordinal = kept.attempt, kept.ordinal
        job.tasks[index] = task
        if kept.item.deps:
            state.loose.append(task)
        else:
            queue(state, task)


def _release_values(state: State, task: Task) -> None:
    for value in (task.values or {}).values():
        if value.blob is not None:
            release_blob(state, value.blob)


def cancel_tasks(job: Job, indices: Sequence[int] | None, running: bool) -> list[int]:
    """Mark tasks as being cancelled. Returns those without an attempt, which the caller ends (in the same records)."""
    if indices is None:
        job.cancelled = True
    ready: list[int] = []
    for index in _unended(job, indices):
        task = job.tasks.get(index)
        if task is None or task.node is None:
            ready.append(index)
        elif running:
            task.cancel = True
        else:
            task.cancel_pending = True
        if task is not None:
            task.cancel_pending = True
    return ready


def _unended(job: Job, indices: Sequence[int] | None) -> list[int]:
    if indices is None:
        return [index for index, outcome in enumerate(job.outcomes) if not outcome]
    return sorted({index for index in indices if 0 <= index < job.count and not job.outcomes[index]})


# --- events acknowledged ---------------------------------------------------------------------------------------------


def ack_events(state: State, job: Job, cursor: int) -> None:
    """The job's own client has everything below `cursor`."""
    job.acked = max(job.acked, min(cursor, job.cursor))
    if job.spec.detached or job.acked <= job.base:
        return
    for end, counts in job.ends.drop(job.acked):
        if counts:
            _remember(state, (job.id, end.index), end)
        else:
            _release_result(state, end)  # another took its place


def remember(state: State, job: JobId, end: TaskEnd) -> None:
    """From a snapshot: an acknowledged terminal record that was not forgotten yet."""
    if end.result is not None and end.result.blob is not None:
        use_blob(state, end.result.blob)
    _remember(state, (job, end.index), end)


def _remember(state: State, key: TaskKey, end: TaskEnd) -> None:
    for blob in state.recent.add(key, end):
        release_blob(state, blob)


def _drop_recent(state: State, key: TaskKey) -> None:
    blob = state.recent.pop(key)
    if blob is not None:
        release_blob(state, blob)


def _release_result(state: State, end: TaskEnd) -> None:
    if end.result is not None and end.result.blob is not None:
        release_blob(state, end.result.blob)


def forget_recent(state: State) -> None:
    """After a replay: a snapshot does not have them, so the next life must not rely on them either."""
    for key in list(state.recent):
        _drop_recent(state, key)


# --- nodes ---------------------------------------------------------------------------------------------------------


def node_of(state: State, name: NodeName, incarnation: Incarnation) -> Node:
    node = state.nodes.get(name)
    if node is None:
        node = state.nodes[name] = Node(name, incarnation, AgentState.DISCONNECTED, draining=name in state.drained)
    return node


def set_drain(state: State, name: NodeName, on: bool, reason: str = "") -> None:
    if on:
        state.drained[name] = reason
    else:
        state.drained.pop(name, None)


def revoke(state: State, keys: tuple[Key, ...]) -> None:
    """These certificates are not let in any more."""
    state.revoked.update((key.serial, key) for key in keys)

"""All that the coordinator knows, and what must always hold of it.

Every task that has not ended is in exactly one place:

=========  ============================================================================================
waiting    `Job.tasks`, and `State.dependants` under each task that it waits for
pending    its `Chunk` (as submitted, never tried), or `Queue.again`, `careful` or `suspects` (tried
           before, or it waited for others), or `State.delayed` (its back-off is not over)
assigned   `Node.attempts`; it holds its request there, or is in `Node.ahead` and holds nothing yet
running    the same; the agent has said that its child started
=========  ============================================================================================

An ended task is a byte in `Job.outcomes`, plus its terminal record in `Job.ends` until the job's client has
acknowledged it. So a job of ten million tasks costs its submitted chunks, and an object only for what runs; of chunks
and records a budget lies in memory (core/room.py).

Nothing here decides: `core/apply.py` changes the state, `core/step.py` and what it calls decide.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field

import msgspec

from herder_coordinator.core.records import SharesKept
from herder_coordinator.core.room import Ends, Recent, Room
from herder_shared import limits
from herder_shared.ids import AttemptId, BlobId, ClusterId, Incarnation, JobId, NodeName, WorkloadKey
from herder_shared.states import AgentState, Cause, Outcome, TaskState
from herder_shared.wire.messages import (
    Function,
    JobInfo,
    JobSpec,
    Key,
    NodeFacts,
    NodeReport,
    PastAttempt,
    Payload,
    TaskEnd,
    TaskItem,
    WorkloadReport,
    WorkloadSpec,
)

#: Cores and named resources are counted in whole parts of this size, so that tenths add up.
UNITS = 10_000

#: The byte of each outcome in `Job.outcomes`; 0 = not ended. On disk: only ever append.
OUTCOME_CODES: dict[Outcome, int] = {
    Outcome.SUCCEEDED: 1,
    Outcome.FAILED: 2,
    Outcome.CRASHED: 3,
    Outcome.OUT_OF_MEMORY: 4,
    Outcome.TIMED_OUT: 5,
    Outcome.CANCELLED: 6,
    Outcome.LOST: 7,
}
OUTCOMES: dict[int, Outcome] = {code: outcome for outcome, code in OUTCOME_CODES.items()}

NO_ATTEMPT = AttemptId(0, 0)

#: A task's identity as the core uses it.
TaskKey = tuple[JobId, int]


@dataclass(frozen=True, slots=True)
class Request:
    """What one attempt holds. Cores and resources in `UNITS`."""

    cores: int = UNITS
    memory_bytes: int = 0
    gpus: int = 0
    resources: tuple[tuple[str, int], ...] = ()
    #: Names or labels, any of which will do; empty = any node.
    nodes: tuple[str, ...] = ()
    #: It ends by itself within this time, counted from its start; inf = nobody said so.
    limit_s: float = math.inf
    #: Fill one node after the other, rather than all evenly.
    pack: bool = False


@dataclass(slots=True, eq=False)
class Share:
    """What a contender for cores (an owner, a job) has of them: see core/shares.py. Cores in `UNITS`."""

    weight: float = 1.0
    #: Cores that its attempts hold, and the cores that its look-ahead will keep busy.
    held: int = 0
    ahead: int = 0
    #: The exponential mean of `held` over the past, as of `at_s`.
    mean: float = 0.0
    at_s: float = 0.0


@dataclass(slots=True, eq=False)
class Chunk:
    """Tasks as they were submitted together, in index order, of which `left` are pending here."""

    job: Job
    first: int
    #: A byte each: whether the task is pending here.
    pending: bytearray
    #: None where the task is not pending here; of no length while the tasks are on the shelf.
    tasks: list[TaskItem | None]
    function: BlobId | None
    python: str
    since_s: float
    #: Order of submission.
    number: int
    #: Entries before this are not pending here.
    next: int = 0
    left: int = 0
    #: What is counted of it in `Room.queued_bytes`; and its ticket while it is on the shelf.
    size_bytes: int = 0
    ticket: int | None = None

    def indices(self) -> list[int]:
        """Of the tasks that are pending here."""
        return [index for index, pending in enumerate(self.pending, self.first) if pending]


class Task(msgspec.Struct, eq=False):
    """A task that is more than an entry of a chunk. (A msgspec struct, because making one is a third of the price.)"""

    job: Job
    index: int
    item: TaskItem
    function: BlobId | None
    python: str
    state: TaskState
    #: When it became pending: its wait in the queue counts from here.
    since_s: float
    #: Its newest attempt, and how many it had.
    attempt: AttemptId = NO_ATTEMPT
    ordinal: int = 0
    node: Node | None = None
    queued_s: float = 0.0
    #: It waits for tasks of its own, and its node has its cores back meanwhile.
    lent: bool = False
    #: The one of `Queue.again`, `careful` and `suspects` in which it stands. Where it stood before, it may still be
    #: found: an entry counts while this says so.
    queued: deque[Task] | None = None
    #: Its ticket in `State.delayed`; 0 = not there.
    delay: int = 0
    failures: int = 0
    crashes: int = 0
    killed_on: tuple[NodeName, ...] = ()
    avoid: tuple[NodeName, ...] = ()
    fresh: bool = False
    reran: bool = False
    #: Why it was run again in a fresh interpreter, while that has not told whether the fork was to blame.
    suspect: Cause | None = None
    #: It may have cost its node (core/quarantine.py): for so long it has to run before it is trusted; 0 = it is.
    quarantine_s: float = 0.0
    #: Cancelled while it had an attempt (`cancel`), or not to be started again (`cancel_pending`).
    cancel: bool = False
    cancel_pending: bool = False
    #: Dependencies that have not ended; the values of those that have; the first that did not succeed.
    waiting: int = 0
    values: dict[TaskKey, Payload] | None = None
    broken: TaskKey | None = None
    #: Where it belongs since it was given more memory than its job asks for.
    grown: Queue | None = None
    #: Its attempts before the newest, as far as they are remembered.
    past: tuple[PastAttempt, ...] = ()
    #: Why its newest attempt is where it is.
    why: str = ""

    @property
    def queue(self) -> Queue:
        """Where it is when it is pending."""
        return self.grown or self.job.queue

    @property
    def request(self) -> Request:
        """What an attempt of it holds."""
        return self.queue.group.request


@dataclass(slots=True, eq=False)
class Queue:
    """The pending tasks of one job that ask for the same."""

    job: Job
    group: Group
    chunks: deque[Chunk] = field(default_factory=deque)
    again: deque[Task] = field(default_factory=deque)
    #: Like `again`, for those that had better not go where they were.
    careful: deque[Task] = field(default_factory=deque)
    #: Those that may have cost their node: one of them to a node at a time.
    suspects: deque[Task] = field(default_factory=deque)
    #: Pending tasks in these four.
    pending: int = 0


@dataclass(slots=True, eq=False)
class Group:
    """Tasks that ask for the same, of any job: whether they fit anywhere is asked once for all of them."""

    key: GroupKey
    #: Order of creation.
    number: int
    request: Request
    #: Those with pending tasks, in the order in which they came to have some.
    queues: OrderedDict[JobId, Queue] = field(default_factory=OrderedDict)
    #: Pending tasks in these.
    pending: int = 0
    #: Queues that are of this group, whether they have pending tasks or not.
    users: int = 0
    #: It was looked at and can run somewhere, as far as is known.
    schedulable: bool = False
    #: The node that is kept for one of its tasks.
    reserved: Node | None = None


@dataclass(frozen=True, slots=True)
class GroupKey:
    priority: int
    owner: str
    workload: WorkloadKey
    request: Request
    idempotent: bool
    #: See `Job.depth`.
    depth: int = 0


@dataclass(slots=True, eq=False)
class Feed:
    """What one client has been sent of one job's terminal records, by cursor."""

    acked: int
    sent: int
    #: `(cursor after it, bytes)` of each message not acknowledged.
    flights: deque[tuple[int, int]] = field(default_factory=deque)
    flight_bytes: int = 0
    #: The client has reconnected and has not said yet from where it wants to go on.
    paused: bool = False


@dataclass(frozen=True, slots=True)
class Spent:
    """What is kept of a failed task, so that it can be run again when somebody asks for that."""

    item: TaskItem
    function: BlobId | None
    python: str
    #: Its last attempt, and how many it had: later ones are told from these.
    attempt: AttemptId = NO_ATTEMPT
    ordinal: int = 0


@dataclass(slots=True, eq=False)
class Job:
    spec: JobSpec
    client: Incarnation
    owner: str
    opened_s: float
    share: Share
    owner_share: Share
    #: Kept terminal records.
    ends: Ends
    queue: Queue = field(init=False)
    #: Queues of its tasks that were given more memory than it asks for, by the bytes.
    grown: dict[int, Queue] = field(default_factory=dict)
    priority: int = 0
    #: Its queues take no part.
    paused: bool = False
    count: int = 0
    closed: bool = False
    #: Cancelled as a whole: tasks that still come are cancelled too.
    cancelled: bool = False
    outcomes: bytearray = field(default_factory=bytearray)
    ended: int = 0
    ended_by: dict[Outcome, int] = field(default_factory=dict)
    #: In the order of their indices; `dead` of them are used up.
    chunks: list[Chunk] = field(default_factory=list)
    dead: int = 0
    #: Tasks in chunks.
    pending: int = 0
    #: All other tasks that have not ended.
    tasks: dict[int, Task] = field(default_factory=dict)
    #: Below this the client has acknowledged (a detached job's records stay all the same).
    acked: int = 0
    #: Failed tasks, as far as there was room (`State.spent_bytes`); and how many that had ended were begun anew.
    spent: dict[int, Spent] = field(default_factory=dict)
    resets: int = 0
    feeds: dict[Incarnation, Feed] = field(default_factory=dict)
    #: Its client is gone for good: forgotten at this time, if all has ended.
    forget_s: float | None = None
    #: How many tasks stand above it: submitted by a task whose own job has one less.
    depth: int = 0

    @property
    def id(self) -> JobId:
        return self.spec.job

    @property
    def group(self) -> Group:
        return self.queue.group

    @property
    def queues(self) -> list[Queue]:
        return [self.queue, *self.grown.values()]

    @property
    def base(self) -> int:
        """The cursor of the first terminal record that is kept."""
        return self.ends.first

    @property
    def cursor(self) -> int:
        """The number of the next terminal record."""
        return self.ends.first + len(self.ends)


@dataclass(slots=True, eq=False)
class Node:
    """An agent, by its node's name. Invariant: `session` is not 0 exactly while READY or DRAINING."""

    name: NodeName
    incarnation: Incarnation
    state: AgentState
    #: None after a restart until it is back.
    facts: NodeFacts | None = None
    session: int = 0
    synced: bool = False
    draining: bool = False
    #: Lost at this time unless it is heard of.
    lease_s: float = 0.0
    #: Its connection closed: attempts that may run twice are given up at this time.
    grace_s: float | None = None
    heard_s: float = 0.0
    #: Own name and labels.
    labels: frozenset[str] = frozenset()
    cores: int = 0
    memory_bytes: int = 0
    gpus: int = 0
    resources: dict[str, int] = field(default_factory=dict)
    free_cores: int = 0
    free_memory_bytes: int = 0
    free_gpus: int = 0
    free_resources: dict[str, int] = field(default_factory=dict)
    attempts: dict[AttemptId, Task] = field(default_factory=dict)
    #: Of the certificate with which its agent connected last; "" after a restart until it is back.
    serial: str = ""
    #: Attempts beyond the free slots, in the order in which the agent will start them.
    ahead: dict[AttemptId, float] = field(default_factory=dict)
    #: How long they will keep all of the node's cores busy.
    ahead_s: float = 0.0
    #: Listed by nobody at the last sync: settled when the rest of the inventory has come.
    doubtful: dict[AttemptId, Task] = field(default_factory=dict)
    told_workloads: set[WorkloadKey] = field(default_factory=set)
    told_jobs: dict[JobId, set[BlobId]] = field(default_factory=dict)
    report: NodeReport | None = None
    reports: dict[WorkloadKey, WorkloadReport] = field(default_factory=dict)
    warm: set[WorkloadKey] = field(default_factory=set)
    #: The group of which a task waits for this node to have room: others may only use what it will not need.
    reserved: Group | None = None
    reserved_s: float = 0.0
    #: Workloads of the attempts that failed to start here, in a row.
    start_failures: list[WorkloadKey] = field(default_factory=list)
    #: What its agent says is wrong with it: drained until that is mended.
    fault: str = ""
    #: It is ours until then only; and it is drained because that is soon.
    ends_s: float = math.inf
    is_ending: bool = False
    #: The task in quarantine that was sent here last (core/quarantine.py says whether it still is).
    suspect: Task | None = None


@dataclass(slots=True, eq=False)
class Client:
    """A client's process. `session` 0: not connected; `gone_s`: when its jobs are given up."""

    incarnation: Incarnation
    owner: str
    session: int = 0
    gone_s: float | None = None
    #: Its own, and all of whose events it is told.
    jobs: dict[JobId, None] = field(default_factory=dict)
    watched: dict[JobId, None] = field(default_factory=dict)
    noticed: bool = False
    #: It is the running task's own: the attempt with which it ends. And how deep its jobs are.
    attempt: AttemptId | None = None
    depth: int = 0
    #: How long its jobs go on when it has vanished; None: as configured.
    grace_s: float | None = None


@dataclass(slots=True, eq=False)
class KeptFunction:
    function: Function
    #: Unended tasks and chunks that use it.
    uses: int = 0


@dataclass(slots=True, eq=False)
class KeptWorkload:
    spec: WorkloadSpec
    jobs: int = 0
    #: Ends of its forked attempts so far; what of them speaks against forking it; the verdict (core/blame.py).
    forked: int = 0
    evidence: list[Evidence] = field(default_factory=list)
    demoted: str = ""


@dataclass(frozen=True, slots=True)
class Evidence:
    """A crash that only the fork explains: `at` is the workload's count of forked ends."""

    at: int
    weight: int
    cause: Cause


@dataclass(slots=True)
class Periods:
    """Seconds; limits.py says what each is. A value of the program's configuration."""

    lease_s: float = limits.LEASE_S
    reconnect_grace_s: float = limits.RECONNECT_GRACE_S
    restart_grace_s: float = limits.RESTART_GRACE_S
    disconnect_grace_s: float = limits.DISCONNECT_GRACE_S


@dataclass(slots=True)
class Policy:
    """How the cores are divided. A value of the program's configuration."""

    #: Parts of the cores, by owner; 1 for who is not named.
    weights: dict[str, float] = field(default_factory=dict)
    #: Of the memory of what each had.
    half_life_s: float = limits.SHARE_HALF_LIFE_S


@dataclass(slots=True, eq=False)
class State:
    cluster: ClusterId
    epoch: int
    periods: Periods
    policy: Policy = field(default_factory=Policy)
    room: Room = field(default_factory=Room)
    #: Of the latest step; 0 while the journal is replayed.
    now_s: float = 0.0
    next_attempt: int = 1
    #: Counts tickets of `delayed` and groups.
    next_number: int = 1
    jobs: dict[JobId, Job] = field(default_factory=dict)
    clients: dict[Incarnation, Client] = field(default_factory=dict)
    nodes: dict[NodeName, Node] = field(default_factory=dict)
    groups: dict[GroupKey, Group] = field(default_factory=dict)
    workloads: dict[WorkloadKey, KeptWorkload] = field(default_factory=dict)
    functions: dict[BlobId, KeptFunction] = field(default_factory=dict)
    #: Functions that no task uses, oldest first.
    idle_functions: dict[BlobId, None] = field(default_factory=dict)
    #: Nodes that are to take nothing new, and why, where nobody asked for that.
    drained: dict[NodeName, str] = field(default_factory=dict)
    #: Certificates that are not let in, by their serial numbers.
    revoked: dict[str, Key] = field(default_factory=dict)
    dependants: dict[TaskKey, list[Task]] = field(default_factory=dict)
    #: Tasks' own clients by their attempts; and those whose attempt has ended, to be given up before the step ends.
    task_clients: dict[AttemptId, Incarnation] = field(default_factory=dict)
    orphans: list[Incarnation] = field(default_factory=list)
    #: A heap of `(due, ticket, task)`; an entry counts while the task has that ticket.
    delayed: list[tuple[float, int, Task]] = field(default_factory=list)
    #: Tasks of which something changed that needs a decision before the step ends.
    loose: list[Task] = field(default_factory=list)
    #: Groups with pending tasks by their number, and nodes with something free: what a decision looks at.
    busy: dict[int, Group] = field(default_factory=dict)
    open_nodes: dict[NodeName, Node] = field(default_factory=dict)
    #: Nodes that may have room for look-ahead.
    hungry_nodes: dict[NodeName, Node] = field(default_factory=dict)
    #: What each owner has and had of the cores.
    owners: dict[str, Share] = field(default_factory=dict)
    #: What was recorded of that last, and when.
    shares_kept: SharesKept | None = None
    shares_kept_s: float = 0.0
    #: Nodes that are kept for a group's task. No other is chosen before `reserve_s`: none could be.
    reservations: dict[NodeName, Node] = field(default_factory=dict)
    reserve_s: float = 0.0
    #: Mean time for which an attempt holds its slot, by workload and function.
    paces: dict[tuple[WorkloadKey, BlobId | None], float] = field(default_factory=dict)
    #: References to each blob from tasks, functions and kept results; `unused`: those that fell to none.
    blobs: dict[BlobId, int] = field(default_factory=dict)
    unused: list[BlobId] = field(default_factory=list)
    summaries: dict[JobId, JobInfo] = field(default_factory=dict)
    recent: Recent = field(default_factory=Recent)
    #: Of all jobs' `spent`.
    spent_bytes: int = 0
    #: Running tasks that hold what those need for which they wait (core/standstill.py); since when it is these; when it
    #: is looked for again.
    standstill: tuple[AttemptId, ...] = ()
    standstill_s: float = 0.0
    standstill_look_s: float = 0.0
    #: From a snapshot, until the replay is over.
    restored_values: dict[TaskKey, Payload] = field(default_factory=dict)
    #: We stood still for long: until then a closed connection does not mean that the agent is dead.
    excused_until_s: float = 0.0
    #: No request is judged impossible before this: agents may still be on their way.
    judge_s: float = 0.0
    #: A lower bound of the deadlines of agents and clients.
    alarm_s: float = math.inf
    #: The replay is over and nobody has looked yet for what a cut tail left undone.
    unswept: bool = False
    ended_total: int = 0

    def end_of(self, key: TaskKey) -> TaskEnd | None:
        """The terminal record of a task, as long as it is kept: unacknowledged, or remembered for a while."""
        job = self.jobs.get(key[0])
        return (job.ends.get(key[1]) if job is not None else None) or self.recent.get(key)


def new_state(
    cluster: ClusterId,
    epoch: int,
    periods: Periods | None = None,
    policy: Policy | None = None,
    room: Room | None = None,
) -> State:
    """An empty state. Then `replay_record` for each record of the journal, `finish_replay`, and `step` for ever."""
    return State(
        cluster=cluster,
        epoch=epoch,
        periods=periods or Periods(),
        policy=policy or Policy(),
        room=room or Room(),
    )


def task_state_counts(job: Job) -> dict[TaskState, int]:
    """How many tasks of `job` are in each state. Costs one look at each task that is more than an entry of a chunk."""
    counts = {TaskState.PENDING: job.pending, TaskState.ENDED: job.ended}
    for task in job.tasks.values():
        counts[task.state] = counts.get(task.state, 0) + 1
    return {state: count for state, count in counts.items() if count}


def check_invariants(state: State) -> None:
    """Assert what must always hold. Costs a look at everything: for tests and the simulator."""
    for job in state.jobs.values():
        _check_job(state, job)
    for node in state.nodes.values():
        _check_node(node)
        assert not node.session or node.serial not in state.revoked, "a revoked agent is connected"
    for group in state.groups.values():
        _check_group(state, group)
    _check_shares(state)
    queued_bytes = sum(chunk.size_bytes for job in state.jobs.values() for chunk in job.chunks if chunk.left)
    assert state.room.queued_bytes == queued_bytes
    assert not state.loose, "a task was left without its decision"
    assert not state.orphans, "a client of a task that has ended was left without its decision"
    for attempt, incarnation in state.task_clients.items():
        assert state.clients[incarnation].attempt == attempt
    running = {attempt for node in state.nodes.values() for attempt in node.attempts}
    for client in state.clients.values():
        assert client.attempt is None or not client.session or client.attempt in running, "a client outlives its task"
    for name, node in state.reservations.items():
        assert state.nodes[name] is node
        assert node.reserved is not None
        assert node.reserved.reserved is node
    for key, tasks in state.dependants.items():
        job_of = state.jobs.get(key[0])
        assert job_of is not None
        assert not job_of.outcomes[key[1]], f"{key} has ended, and {len(tasks)} tasks still wait for it"
        assert all(task.state is TaskState.WAITING for task in tasks)
    assert all(count > 0 for count in state.blobs.values())
    for function_id, kept in state.functions.items():
        assert (function_id in state.idle_functions) == (kept.uses == 0)


def _check_job(state: State, job: Job) -> None:
    assert len(job.outcomes) == job.count
    assert job.ended == job.count - job.outcomes.count(0) == sum(job.ended_by.values())
    assert job.pending == sum(chunk.left for chunk in job.chunks)
    assert job.pending + len(job.tasks) + job.ended == job.count, f"a task of {job.id} is nowhere, or twice"
    assert job.cursor == job.ended + job.resets, "each ended task has one terminal record, and one each time before"
    assert all(job.outcomes[index] for index in job.spent)
    assert job.dead == sum(1 for chunk in job.chunks if not chunk.left)
    for chunk in job.chunks:
        assert chunk.left == sum(chunk.pending)
        assert chunk.ticket is not None or [item is not None for item in chunk.tasks] == list(map(bool, chunk.pending))
        for index in chunk.indices():
            assert not job.outcomes[index]
            assert index not in job.tasks
    for index, task in job.tasks.items():
        assert task.index == index
        assert not job.outcomes[index]
        _check_task(state, task)


def _check_task(state: State, task: Task) -> None:
    assigned = task.state in {TaskState.ASSIGNED, TaskState.RUNNING}
    assert assigned == (task.node is not None)
    if task.node is not None:
        assert task.node.attempts.get(task.attempt) is task
    places = assigned + (task.queued is not None) + (task.delay != 0) + (task.state is TaskState.WAITING)
    assert places == 1, f"{task.job.id}.{task.index} is in {places} places"
    if task.state is TaskState.WAITING:
        assert task.waiting > 0
        waits = sum(tasks.count(task) for tasks in state.dependants.values())
        assert waits == task.waiting


def _check_node(node: Node) -> None:
    assert (node.session != 0) == (node.state in {AgentState.READY, AgentState.DRAINING})
    held = [task for attempt, task in node.attempts.items() if attempt not in node.ahead]
    assert all(attempt in node.attempts for attempt in node.ahead)
    if node.facts is None:
        return
    requests = [task.request for task in held]
    busy = sum(task.request.cores for task in held if not task.lent)
    assert node.free_cores == node.cores - busy >= 0
    assert not any(node.attempts[attempt].lent for attempt in node.ahead)
    assert node.free_memory_bytes == node.memory_bytes - sum(request.memory_bytes for request in requests) >= 0
    assert node.free_gpus == node.gpus - sum(request.gpus for request in requests) >= 0
    for name, total in node.resources.items():
        used = sum(dict(request.resources).get(name, 0) for request in requests)
        assert node.free_resources[name] == total - used >= 0
    for attempt, task in node.attempts.items():
        assert task.attempt == attempt
        assert task.node is node
        assert task.job.tasks.get(task.index) is task
    assert abs(node.ahead_s - sum(node.ahead.values())) < 1e-6


def _check_group(state: State, group: Group) -> None:
    queues = [queue for job in state.jobs.values() for queue in job.queues if queue.group is group]
    for queue in queues:
        chunks = sum(chunk.left for chunk in queue.chunks)
        lanes = (queue.again, queue.careful, queue.suspects)
        again = {id(task) for lane in lanes for task in lane if task.queued is lane}
        assert queue.pending == chunks + len(again)
        assert (group.queues.get(queue.job.id) is queue) == (queue.pending > 0 and not queue.job.paused)
    assert group.pending == sum(queue.pending for queue in group.queues.values())
    assert (group.number in state.busy) == (group.pending > 0)
    assert group.users == len(queues) > 0
    assert group.reserved is None or group.reserved.reserved is group


def _check_shares(state: State) -> None:
    held: dict[int, int] = {}
    ahead: dict[int, int] = {}
    for node in state.nodes.values():
        for attempt, task in node.attempts.items():
            for share in (task.job.share, task.job.owner_share):
                if attempt in node.ahead:
                    cores = round(node.ahead[attempt] * node.cores / limits.LOOK_AHEAD_S)
                    ahead[id(share)] = ahead.get(id(share), 0) + cores
                elif node.facts is not None and not task.lent:
                    held[id(share)] = held.get(id(share), 0) + task.request.cores
    known: list[Share] = [*state.owners.values(), *(job.share for job in state.jobs.values())]
    for share in known:
        assert (share.held, share.ahead) == (held.get(id(share), 0), ahead.get(id(share), 0))
    for job in state.jobs.values():
        assert job.owner_share is state.owners[job.owner]

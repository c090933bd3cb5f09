"""All that an agent knows of its attempts, children, templates and workloads.

Where an attempt is says which collection holds it: `QUEUED` in `queue`; `FETCHING` only in `attempts`; `WAITING` in its
workload's `undecided` or its pool's `waiting`; `SENT`, `RUNNING` and `ANSWERED` in its child; `LEAVING` in `leaving` or
`stuck`. From `FETCHING` on it holds a slot. An attempt that has ended is in `ends` until the coordinator has it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from herder_agent.core.account import Account
from herder_agent.core.demand import Demand
from herder_agent.core.events import Answer, Exit, TemplateSeen
from herder_agent.core.slots import Place, Request, Slot, Slots
from herder_shared.ids import AttemptId, BlobId, JobId, NodeName, WorkloadKey
from herder_shared.limits import STDERR_TAIL_BYTES
from herder_shared.states import Cause, CoreState, Outcome
from herder_shared.wire.messages import (
    AttemptEnd,
    AttemptStart,
    AuditStep,
    JobBrief,
    Logs,
    Payload,
    TaskOptions,
    WorkloadSpec,
)

#: Of the last task in the mean of how long they take.
_PACE_WEIGHT = 0.1
#: More than any sane task has, and few enough that a node bears it on every core.
PIDS = 4096


class Phase(StrEnum):
    """Where an attempt is."""

    #: Ordered; no slot yet.
    QUEUED = "queued"
    #: Has its slot; its blobs are not all here.
    FETCHING = "fetching"
    #: Has its slot; waits for a child (template building, fork, interpreter start).
    WAITING = "waiting"
    #: A child has it and has not started its code.
    SENT = "sent"
    RUNNING = "running"
    #: The child has answered and has not exited.
    ANSWERED = "answered"
    #: The child has exited; what it left behind may live still.
    LEAVING = "leaving"


#: The state of an attempt's cores in each phase.
CORE_STATE: dict[Phase, CoreState | None] = {
    Phase.QUEUED: None,
    Phase.FETCHING: CoreState.TRANSFER,
    Phase.WAITING: CoreState.START,
    Phase.SENT: CoreState.START,
    Phase.RUNNING: CoreState.TASK,
    Phase.ANSWERED: CoreState.SYSTEM,
    Phase.LEAVING: CoreState.SYSTEM,
}


@dataclass(slots=True, eq=False)
class Attempt:
    """One attempt, from its order to its end. Invariant: `slot` is set exactly from FETCHING on."""

    start: AttemptStart
    workload: Workload
    options: TaskOptions
    job_name: str
    request: Request
    phase: Phase = Phase.QUEUED
    #: What it needs and did not come with its order; and whether all of it is here.
    blobs: tuple[BlobId, ...] = ()
    fetched: bool = True
    slot: Slot | None = None
    child: int = 0
    slot_s: float = 0.0
    #: Core-seconds before its cores were last given back to it, and when that was; 0: they were never lent.
    charged_core_s: float = 0.0
    held_s: float = 0.0
    sent_s: float = 0.0
    started_s: float = 0.0
    answer: Answer | None = None
    exit: Exit | None = None
    #: A command's.
    result: Payload | None = None
    logs: Logs | None = None
    #: Why we are ending it, if we are.
    ending: Outcome | None = None
    #: It was found unable to go on, and is being killed: "deadlock", proved, or "stall", before its code began.
    hung: str = ""
    #: Not wanted any more: its end is not reported.
    dropped: bool = False
    #: Its template died under it.
    template_lost: bool = False
    peak_bytes: int = 0
    #: "cgroup" where the kernel kept the peak.
    memory_source: str = ""
    #: Processes and threads at once, the most that was seen.
    peak_tasks: int = 0
    #: ... and what it was killed for having more of.
    tasks_max: int = 0
    #: How it was started: "fork", "fresh" or "command"; "" before.
    method: str = ""
    pid: int = 0
    exited_s: float = 0.0
    #: A command's: whether a status other than 0 is a failure.
    check: bool = True

    @property
    def id(self) -> AttemptId:
        return self.start.attempt

    @property
    def has_child(self) -> bool:
        """A child was given it: from then on it may run."""
        return self.phase not in {Phase.QUEUED, Phase.FETCHING, Phase.WAITING}

    @property
    def is_command(self) -> bool:
        return self.method == "command"

    @property
    def stderr_tail(self) -> str:
        """The last lines that it wrote to stderr."""
        if self.logs is None:
            return ""
        return self.logs.stderr[-STDERR_TAIL_BYTES:].decode("utf-8", "replace")


class ChildPhase(StrEnum):
    """Where a child is."""

    #: Asked for; not there yet.
    FORKING = "forking"
    #: A fresh interpreter that preloads.
    WARMING = "warming"
    IDLE = "idle"
    BUSY = "busy"
    #: Asked to end, or of no use: waits for its exit.
    STOPPING = "stopping"


@dataclass(slots=True, eq=False)
class Child:
    """One process for tasks. Invariant: `attempt` is set exactly while BUSY."""

    id: int
    pool: Pool
    template: int
    phase: ChildPhase = ChildPhase.FORKING
    pid: int = 0
    attempt: Attempt | None = None
    tasks_done: int = 0
    forked_s: float = 0.0


class TemplateState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Template:
    """One template process, or the spawner (`workload` None)."""

    id: int
    workload: Workload | None
    started_s: float
    state: TemplateState = TemplateState.STARTING
    pid: int = 0
    start_s: float = 0.0
    rss_bytes: int = 0
    children: int = 0
    #: As it was seen first, after its seal; and as seen last: memory shared (files, memfds), and its own.
    sealed: TemplateSeen | None = None
    shared_bytes: int = 0
    private_bytes: int = 0
    #: Children of it that hung.
    hung: int = 0
    #: The template whose fork it is; 0: it was exec'd.
    parent: int = 0


@dataclass(slots=True, eq=False)
class Pool:
    """The children of one workload made by one start method, and the attempts that wait for one."""

    workload: Workload
    #: "fork", "fresh" or "command".
    method: str
    waiting: dict[AttemptId, Attempt] = field(default_factory=dict)
    #: In the order in which they became idle.
    idle: list[Child] = field(default_factory=list)
    #: FORKING and WARMING ones.
    coming: int = 0
    busy: int = 0
    #: Failures in a row to get a child that works.
    failures: int = 0
    #: No child is asked for before this time.
    retry_s: float = 0.0
    started: int = 0
    #: Seconds from slot to start, the last ones.
    starts_s: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    demand: Demand = field(default_factory=Demand)
    #: How long tasks take of late, on the wall; None before the first has ended.
    pace_s: float | None = None
    #: Children that came since too few attempts waited to speak of want.
    in_want: int = 0

    def note_wall(self, wall_s: float) -> None:
        """A task has taken this long."""
        self.pace_s = wall_s if self.pace_s is None else self.pace_s + _PACE_WEIGHT * (wall_s - self.pace_s)

    @property
    def tasks_max(self) -> int:
        """Tasks per child; 0 is without limit. A child that must run setup itself is used again, unless the user has
        said how often."""
        workload = self.workload
        asked = workload.spec.max_tasks_per_child
        runs_setup = workload.value == "none" if self.method == "fresh" else workload.setup_mode == "per child"
        return 0 if asked == 1 and runs_setup and not workload.spec.max_tasks_given else asked

    @property
    def reuses(self) -> bool:
        """Whether a child runs more than one task."""
        return self.tasks_max != 1


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a workload does not start here; its attempts end so until `until_s`."""

    cause: Cause
    message: str
    traceback: str
    until_s: float


@dataclass(slots=True, eq=False)
class Workload:
    """A workload on this node."""

    spec: WorkloadSpec
    #: "fork", "fresh", "command"; "" while the audit has not said.
    method: str = ""
    reason: str = ""
    fork_point: str = ""
    fork_cost_s: float | None = None
    python: str = ""
    immortal_objects: int = 0
    immortal_off: str = ""
    #: What its template has to say to the user.
    notes: tuple[str, ...] = ()
    steps: list[AuditStep] = field(default_factory=list)
    template: Template | None = None
    #: Forks of `template`, which fork children beside it; none without it.
    replicas: list[Template] = field(default_factory=list)
    #: One failed: `template` is not asked for more.
    has_no_replicas: bool = False
    #: Its last branch of another workload's template ended before it was ready: its next one is exec'd.
    has_no_parent: bool = False
    tries: int = 0
    refusal: Refusal | None = None
    error: str = ""
    pools: dict[str, Pool] = field(default_factory=dict)
    #: A look at whether its children and template are still used is on the list of deadlines.
    watched: bool = False
    #: Attempts that have a slot while `method` is not known.
    undecided: dict[AttemptId, Attempt] = field(default_factory=dict)
    #: Attempts in the agent's queue.
    queued: int = 0
    used_s: float = 0.0
    #: How forked children get setup's value; seconds that setup takes.
    setup_mode: str = ""
    setup_s: float | None = None
    #: Fresh interpreters can map setup's value: "mapped", "none", or "" while that is not known; and why not.
    value: str = ""
    not_published: str = ""
    #: The template that runs setup only to publish its value.
    publisher: Template | None = None
    #: Tasks whose child had run setup before, for another task.
    reused: int = 0
    #: Why it is not forked any more; "" otherwise.
    demoted: str = ""
    #: When its template was replaced; what is to be said of that; and of the node, by the state's own list.
    replaced_s: list[float] = field(default_factory=list)
    own_notes: list[str] = field(default_factory=list)
    node_notes: list[str] = field(default_factory=list)

    @property
    def templates(self) -> tuple[Template, ...]:
        """Those that fork its children."""
        return () if self.template is None else (self.template, *self.replicas)

    @property
    def has_setup(self) -> bool:
        return self.spec.setup is not None or self.spec.setup_import is not None

    def pool(self, method: str) -> Pool:
        pool = self.pools.get(method)
        if pool is None:
            pool = self.pools[method] = Pool(self, method)
        return pool


class Deadline(NamedTuple):
    """Something to look at when its time comes; what it is about may have gone by then.

    Ordered by time, then `n`, which is never used again. A tuple, as thousands of them are compared a second.
    """

    at_s: float
    n: int
    kind: str
    key: AttemptId | WorkloadKey | int
    method: str = ""


@dataclass(slots=True, eq=False)
class State:
    node: NodeName
    #: CPU numbers by core index; empty: nothing is pinned.
    cpus: tuple[int, ...]
    slots: Slots
    account: Account
    session: int = 0
    connected: bool = False
    #: Until then the coordinator has certainly not given up what we have: later, what may run once is not begun.
    lease_until_s: float = 0.0
    jobs: dict[JobId, JobBrief] = field(default_factory=dict)
    blob_functions: set[BlobId] = field(default_factory=set)
    workloads: dict[WorkloadKey, Workload] = field(default_factory=dict)
    attempts: dict[AttemptId, Attempt] = field(default_factory=dict)
    queue: dict[AttemptId, Attempt] = field(default_factory=dict)
    leaving: dict[AttemptId, Attempt] = field(default_factory=dict)
    #: Reported; they keep their slots, as processes of theirs cannot be killed.
    stuck: dict[AttemptId, Attempt] = field(default_factory=dict)
    #: Attempts whose children were sent SIGKILL and have not died of it. They were reported, and hold their slots.
    unkillable: dict[AttemptId, Attempt] = field(default_factory=dict)
    #: Attempts whose cores are lent while they wait for tasks of their own: what they asked for. And those of them that
    #: want their cores back, in their order, each with the number of its wait.
    lent: dict[AttemptId, Request] = field(default_factory=dict)
    returning: dict[AttemptId, int] = field(default_factory=dict)
    ends: dict[AttemptId, AttemptEnd] = field(default_factory=dict)
    #: Ends whose result the coordinator does not have yet.
    uploading: dict[BlobId, list[AttemptId]] = field(default_factory=dict)
    templates: dict[int, Template] = field(default_factory=dict)
    #: Templates that fork no more and wait for their last children to end.
    retiring: dict[int, Template] = field(default_factory=dict)
    #: What users of every workload that forks here should know.
    notes: list[str] = field(default_factory=list)
    spawner: Template | None = None
    spawner_failures: int = 0
    spawner_retry_s: float = 0.0
    #: Pools to look at before the step ends.
    touched: list[Pool] = field(default_factory=list)
    children: dict[int, Child] = field(default_factory=dict)
    deadlines: list[Deadline] = field(default_factory=list)
    last_template: int = 0
    last_child: int = 0
    last_deadline: int = 0
    #: Processes and threads of an attempt whose workload does not say how many.
    pids: int = PIDS

    @property
    def running_count(self) -> int:
        """Attempts that hold a slot."""
        return len(self.attempts) - len(self.queue)


def new_state(
    node: NodeName,
    cores: int,
    memory_bytes: int,
    now_s: float,
    *,
    cpus: tuple[int, ...] = (),
    gpus: int = 0,
    resources: dict[str, float] | None = None,
    pids: int = PIDS,
    places: tuple[Place, ...] = (),
) -> State:
    """An agent that has done nothing yet. `cpus` lists the CPU of each core index (empty: no pinning), `places` where
    these are (empty: all alike)."""
    slots = Slots.of(cores, memory_bytes, gpus, resources, places)
    return State(node, cpus, slots, Account(cores, now_s), pids=pids)


def check_invariants(state: State) -> None:
    """Assert what must always hold; for tests.

    Raises:
        AssertionError: it does not.
    """
    held = sum(a.request.cores for a in state.attempts.values() if a.slot is not None)
    assert abs(held - state.slots.used) < 1e-6, (held, state.slots.used)
    assert abs(sum(state.account.held.values()) - held) < 1e-6, state.account.held
    assert state.returning.keys() <= state.lent.keys() <= state.attempts.keys()
    assert state.unkillable.keys() <= state.attempts.keys()
    for attempt in state.attempts.values():
        assert attempt.id not in state.lent or attempt.request.cores == 0.0
        assert (attempt.slot is None) == (attempt.phase is Phase.QUEUED), attempt.phase
        assert (attempt.id in state.queue) == (attempt.phase is Phase.QUEUED)
        assert (attempt.id in state.leaving or attempt.id in state.stuck) == (attempt.phase is Phase.LEAVING)
        waits = attempt.id in attempt.workload.undecided or any(
            attempt.id in pool.waiting for pool in attempt.workload.pools.values()
        )
        assert waits == (attempt.phase is Phase.WAITING), attempt.phase
    for child in state.children.values():
        assert (child.attempt is not None) == (child.phase is ChildPhase.BUSY), child
        assert (child in child.pool.idle) == (child.phase is ChildPhase.IDLE), child
    for workload in state.workloads.values():
        assert workload.template is not None or not workload.replicas
        assert workload.queued == sum(1 for a in state.queue.values() if a.workload is workload)
        for pool in workload.pools.values():
            mine = [c for c in state.children.values() if c.pool is pool]
            coming = sum(1 for c in mine if c.phase in {ChildPhase.FORKING, ChildPhase.WARMING})
            assert coming == pool.coming, (coming, pool.coming)
            assert sum(1 for c in mine if c.phase is ChildPhase.BUSY) == pool.busy

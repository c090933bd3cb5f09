"""Every message, by direction. Imperative = an order; past tense = a report.

Rules: frozen, tagged structs; fields are only ever added, at the end and with a default; messages and their hot parts
are arrays on the wire. Anything that was pickled is `bytes` here and is never unpickled by coordinator or agent. Times
are seconds measured on the machine that reports them (durations; never a clock reading), sizes bytes.

**The way of a submission.** `OpenJob` (once), `PutBlob` for what is larger than `INLINE_BYTES_MAX`, then `SubmitTasks`
with dense indices: `first` is the index of the first task in the message. The coordinator answers `SubmitOk(job, upto)`
when tasks below `upto` are durable; a `SubmitTasks` below that is a repetition and is only acknowledged again. So a
client that reconnects sends again what was not acknowledged, in order, and everything exists once.

**The way of an event.** Every terminal record of a job has a dense number, its *cursor*, in the order in which the
records became durable. `TasksEnded(job, cursor, ends)` starts at `cursor`; the client acknowledges with
`AckEvents(job, cursor=<next expected>)` and after reconnecting sends `Attach(job, cursor)`: each record is seen once.

**The way of an attempt.** `StartAttempts` carries with it whatever the agent's session has not been told before
(workloads, jobs, functions). The agent answers with `AttemptsStarted` and `AttemptsEnded`; it keeps each end until
`AckAttempts`, and lists running attempts and unacknowledged ends in `Sync` after each (re)connection.

**The way of a task's own client.** A running task may be a client too (decision 22). It speaks through its agent:
`TaskClientOpened`, then each of its messages in a `TaskClientSaid`, each answer in a `TellTaskClient`; for whom it may
act follows from the attempt.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from herder_shared.ids import AttemptId, BlobId, ClusterId, Incarnation, JobId, NodeName, WorkloadKey
from herder_shared.states import AgentState, Cause, Outcome, TaskState

Role = Literal["client", "agent", "admin", "coordinator"]


class _Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    pass


class _Part(msgspec.Struct, frozen=True, omit_defaults=True):
    pass


class _HotPart(msgspec.Struct, frozen=True, array_like=True):
    pass


# --- parts -----------------------------------------------------------------------------------------------------------


class Payload(_HotPart, frozen=True):
    """Pickled bytes: here, or as a blob. Exactly one of `inline` and `blob` is meant (`blob` when it is not None)."""

    inline: bytes = b""
    blob: BlobId | None = None
    size_bytes: int = 0


class CommandSpec(_Part, frozen=True):
    """A command task. Travels msgpack-encoded as the task's arguments; data only, decoded by the agent.

    `argv` as a list is exec'd; `shell` goes to `/bin/sh -c`. Exactly one of them is set.
    """

    argv: tuple[str, ...] = ()
    shell: str | None = None
    stdin: bytes = b""
    stdin_path: str | None = None
    check: bool = True
    cwd: str | None = None
    env: dict[str, str] = {}


class WorkloadSpec(_Part, frozen=True):
    """How tasks start. `key` is the hash of all other fields but `name` (see `herder.workload`)."""

    key: WorkloadKey
    name: str = "auto"
    kind: Literal["python", "command"] = "python"
    start: Literal["auto", "fork", "fresh"] = "auto"
    #: Module names, imported in order before the fork point.
    preload: tuple[str, ...] = ()
    #: Pickled callable without arguments, or `None`; `setup_name` is for messages. A "pkg.mod:fn" string is sent as
    #: `setup_import` and imported in the template.
    setup: bytes | None = None
    setup_import: str | None = None
    setup_name: str = ""
    setup_timeout_s: float = 600.0
    #: Interpreter; None = the agent's own.
    python: str | None = None
    prologue: str | None = None
    env: dict[str, str] = {}
    working_dir: str | None = None
    #: Folders to put before `sys.path` where they exist: the script's, the client's cwd.
    paths: tuple[str, ...] = ()
    #: 0 = without limit.
    max_tasks_per_child: int = 1
    #: Children kept ready ahead of demand; None = as many as the node has slots for.
    warm: int | None = None
    blas_threads: int | Literal["cores"] = "cores"
    #: Limit of the template itself.
    memory_bytes: int | None = None
    immortal: bool = True
    #: Names of threads that the user declares harmless to a fork.
    allow_threads: tuple[str, ...] = ()
    #: The user named `max_tasks_per_child`: children are not reused without being asked for.
    max_tasks_given: bool = False
    #: Processes and threads of one attempt; None = the node's own limit.
    pids: int | None = None
    #: Set by the coordinator, and no part of the key: why `auto` forks no more, as forked children died of it.
    demoted: str = ""


class TaskOptions(_Part, frozen=True):
    """What a job's tasks ask for and how their ends are treated (API.md, options)."""

    cores: float = 1.0
    memory_bytes: int = 0
    gpus: int = 0
    resources: dict[str, float] = {}
    nodes: tuple[str, ...] = ()
    priority: int = 0
    timeout_s: float | None = None
    retries: int = 0
    #: Pickled tuple of exception types; judged in the child. Empty = any exception.
    retry_on: bytes = b""
    backoff_s: float = 0.0
    max_crashes: int = 3
    idempotent: bool = True
    cancel_running: bool = True
    seed: int | None = None
    stdout: Literal["capture", "stream", "discard"] = "capture"
    #: After an attempt that ran out of memory: the next one gets so many times as much, at most this (0: no more).
    memory_max_bytes: int = 0
    memory_growth: float = 2.0
    #: Over nodes evenly, or one node after the other.
    placement: Literal["spread", "pack"] = "spread"


class JobSpec(_Part, frozen=True):
    """Everything of a job that its tasks share."""

    job: JobId
    name: str
    workload: WorkloadSpec
    options: TaskOptions = TaskOptions()
    owner: str = ""
    tags: tuple[str, ...] = ()
    detached: bool = False
    #: Dense one-by-one submissions append to one open job; an array job is closed when its last task is sent.
    kind: Literal["submit", "array"] = "submit"


class TaskItem(_HotPart, frozen=True):
    """One task of a submission: its pickled `(args, kwargs)` or encoded `CommandSpec`, and the tasks it waits for."""

    args: Payload
    deps: tuple[tuple[JobId, int], ...] = ()


class Function(_HotPart, frozen=True):
    """A pickled callable, by the hash of its bytes. `content` is empty where it is larger than `INLINE_BYTES_MAX`: then
    it is a blob of the same id."""

    id: BlobId
    content: bytes = b""


class Usage(_HotPart, frozen=True):
    """What an attempt used. Durations on the agent's clock; `queued_s` is added by the coordinator."""

    node: NodeName = NodeName("")
    attempt: int = 0
    start_method: str = ""
    queued_s: float = 0.0
    #: From the slot's allocation to the start of the user's code.
    start_s: float = 0.0
    #: The user's code.
    wall_s: float = 0.0
    cpu_user_s: float = 0.0
    cpu_system_s: float = 0.0
    peak_memory_bytes: int = 0
    memory_source: str = ""
    minor_faults: int = 0
    major_faults: int = 0
    #: Slots held × time, from allocation to the report of the end.
    core_s: float = 0.0
    pid: int = 0
    #: From and to storage, by its processes, where the kernel tells.
    read_bytes: int = 0
    write_bytes: int = 0


class Failure(_Part, frozen=True):
    """Why an attempt did not succeed."""

    cause: Cause
    #: For the user; complete by itself.
    message: str = ""
    #: The exception's qualified type name, its remote traceback as text, and its pickle (None: could not be pickled).
    type_name: str = ""
    traceback: str = ""
    pickled: bytes | None = None
    signal: int | None = None
    exit_status: int | None = None
    stderr_tail: str = ""
    #: The exception is one that `retry_on` names (true when there is no filter).
    retryable: bool = True
    limit_bytes: int | None = None
    #: DEPENDENCY_FAILED: the root, as a task id, and its own failure.
    root: str = ""
    root_failure: Failure | None = None


class Logs(_HotPart, frozen=True):
    """Captured output: at most head + tail of each stream (limits.py); `truncated` when something was left out."""

    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False


class AttemptEnd(_HotPart, frozen=True):
    """How an attempt ended, as its agent saw it."""

    attempt: AttemptId
    job: JobId
    index: int
    outcome: Outcome
    #: Pickled value; for a command the encoded `CommandResult`. None unless succeeded (a failed command has one too).
    result: Payload | None = None
    failure: Failure | None = None
    usage: Usage = Usage()
    logs: Logs | None = None


class CommandResult(_Part, frozen=True):
    """The result of a command task, msgpack-encoded."""

    returncode: int
    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False


class PastAttempt(_HotPart, frozen=True):
    """What is remembered of an attempt after which its task was tried again."""

    #: From 1; what users see.
    attempt: int
    node: NodeName
    outcome: Outcome
    cause: Cause | None = None
    #: For the user; cut.
    message: str = ""
    start_method: str = ""
    queued_s: float = 0.0
    start_s: float = 0.0
    wall_s: float = 0.0
    peak_memory_bytes: int = 0
    #: What it was given; 0 = no limit.
    memory_bytes: int = 0


class TaskEnd(_HotPart, frozen=True):
    """A task's terminal record, as the journal keeps it and the client gets it."""

    index: int
    outcome: Outcome
    result: Payload | None = None
    failure: Failure | None = None
    usage: Usage = Usage()
    logs: Logs | None = None
    #: The attempts before its last.
    past: tuple[PastAttempt, ...] = ()


class JobBrief(_Part, frozen=True):
    """What an agent must know of a job to run its tasks."""

    job: JobId
    name: str
    workload: WorkloadKey
    options: TaskOptions
    owner: str = ""


class AttemptStart(_HotPart, frozen=True):
    """The order to run one attempt."""

    attempt: AttemptId
    job: JobId
    index: int
    #: From 1; what users see.
    ordinal: int
    function: BlobId | None
    args: Payload
    #: Results of the tasks it depends on: `(job, index, value)`.
    deps: tuple[tuple[JobId, int, Payload], ...] = ()
    #: "" = the workload's own; "fresh" = the free rerun in a fresh interpreter.
    start: str = ""
    #: "3.11/3.1": interpreter and cloudpickle of the client when something was pickled by value, else "".
    python: str = ""
    #: What it holds instead of what its job asks for, when earlier attempts ran out of that; 0 = as the job says.
    memory_bytes: int = 0


class RunningAttempt(_HotPart, frozen=True):
    """An attempt which an agent still has, in `Sync`."""

    attempt: AttemptId
    job: JobId
    index: int
    started: bool
    #: It has given its cores up while it waits for tasks of its own.
    lent: bool = False


class NodeFacts(_Part, frozen=True):
    """What an agent found on its machine. `cores` are the slots it offers (they may exceed the machine's)."""

    node: NodeName
    cores: int
    memory_bytes: int
    labels: tuple[str, ...] = ()
    gpus: int = 0
    resources: dict[str, float] = {}
    #: Affinity: the operating system's CPU numbers.
    cpus: tuple[int, ...] = ()
    host: str = ""
    pid: int = 0
    python: str = ""
    kernel: str = ""
    state_dir: str = ""
    #: Address of the agent's own metrics listener, or "".
    metrics_listen: str = ""
    #: By what it holds attempts to their limits, and why, in words.
    limits: str = ""
    #: The machine is only ours for so long from now on (a batch allocation); None = nobody said so.
    ends_in_s: float | None = None


class TemplateInfo(_Part, frozen=True):
    """One template on one node."""

    state: Literal["starting", "ready", "failed", "stopped"]
    pid: int = 0
    start_s: float = 0.0
    rss_bytes: int = 0
    children: int = 0
    #: Of its memory: in memfds that forks and fresh interpreters share; and its own, which a fork must copy.
    shared_bytes: int = 0
    private_bytes: int = 0
    #: The other templates of this workload on this node are its forks, or it is one of them.
    replica: bool = False


class AuditStep(_Part, frozen=True):
    """One step of a template's start, and what the audit found after it."""

    step: str
    seconds: float = 0.0
    rss_bytes: int = 0
    threads: int = 1
    #: "safe" | "unsafe"
    verdict: str = "safe"
    #: One line a finding: what was seen, why it matters, the cure.
    findings: tuple[AuditFinding, ...] = ()
    #: Cures which the template applied by itself.
    applied: tuple[str, ...] = ()


class AuditFinding(_Part, frozen=True):
    rule: str
    seen: str
    reason: str = ""
    cure: str = ""
    #: "unsafe" | "allowed" | "note"
    verdict: str = "unsafe"


class WorkloadReport(_Part, frozen=True):
    """How a workload fares on one node; sent when it changes."""

    key: WorkloadKey
    name: str
    #: What `auto` chose: "fork" | "fresh" | "" while not known.
    start_method: str = ""
    reason: str = ""
    #: The step after which children are forked, e.g. "setup", "import sklearn", "start".
    fork_point: str = ""
    steps: tuple[AuditStep, ...] = ()
    templates: tuple[TemplateInfo, ...] = ()
    #: Medians as seen so far on this node.
    fork_start_s: float | None = None
    fresh_start_s: float | None = None
    error: str = ""
    python: str = ""
    #: How tasks get setup's value: "forked" with their template, "mapped" from memfds that a publisher filled, or
    #: "per child", by running setup in each; "" without setup.
    setup_mode: str = ""
    setup_s: float | None = None
    #: Why a workload that forked before is now given fresh interpreters; "" otherwise.
    demoted: str = ""
    #: What the user may want to know or do: costs, cures, what Herder decided for him. One line each.
    notes: tuple[str, ...] = ()
    #: Objects of setup's value that were made immortal; why none were ("" where they were, or nothing was to be done).
    immortal_objects: int = 0
    immortal_off: str = ""
    #: One bare fork from the sealed template, as it measured it itself.
    fork_cost_s: float | None = None


class NodeReport(_Part, frozen=True):
    """An agent's own account, sent with each heartbeat. All counters since its start."""

    core_seconds: dict[str, float] = {}
    running: int = 0
    queued: int = 0
    slots_used: float = 0.0
    cpu_busy_ratio: float = 0.0
    memory_used_bytes: int = 0
    #: What is wrong with the node, in words: nothing more is to be started there until it is mended. "" = nothing.
    fault: str = ""


class Key(_Part, frozen=True):
    """A certificate, by what anybody may know of it. `serial` in hex, as in `Peer`: within a cluster it names one
    certificate; role and name are for people, and may be unknown."""

    serial: str
    role: str = ""
    name: str = ""


class KeyInfo(_Part, frozen=True):
    """A certificate that the coordinator knows of: it was revoked, or somebody is connected with it."""

    key: Key
    revoked: bool = False
    connections: int = 0


# --- both directions -------------------------------------------------------------------------------------------------


class Hello(_Message, frozen=True):
    """First message of a connection, from whoever dialled. The role is the certificate's, not said here."""

    protocol: int
    cluster: ClusterId
    incarnation: Incarnation
    version: str = ""
    #: The highest epoch this peer has seen: a coordinator of a lower one is a zombie and must be left.
    epoch_seen: int = 0
    node: NodeFacts | None = None
    owner: str = ""
    #: Client: "3.11/3.1".
    python: str = ""
    #: Client: how long its jobs go on when it has vanished; None: as the coordinator is configured.
    disconnect_grace_s: float | None = None


class Welcome(_Message, frozen=True):
    """The answer: this coordinator's life, and the session, which counts within it."""

    cluster: ClusterId
    epoch: int
    session: int
    version: str = ""
    heartbeat_s: float = 2.0
    lease_s: float = 30.0
    #: To an agent: which blobs and jobs it need not be told again is not kept over sessions; it may drop all briefs.
    draining: bool = False


class Refused(_Message, frozen=True):
    """The answer to a hello, or to anything else that is not allowed; the connection ends. `error` names the class."""

    error: str
    message: str


class Heartbeat(_Message, frozen=True):
    """From the dialler. `report` from agents only."""

    n: int
    report: NodeReport | None = None


class HeartbeatAck(_Message, frozen=True):
    n: int
    #: To agents: tasks wait somewhere that this node could run if it had room (accounting of idle cores).
    work_waiting: bool = False


class PutBlob(_Message, frozen=True):
    """A chunk of a blob. Chunks of one blob come in order on one connection; repeated from 0 after a reconnection."""

    id: BlobId
    offset: int
    total: int
    data: bytes


class BlobStored(_Message, frozen=True):
    """The receiver has all bytes up to `upto` (a multiple of chunks); at `total` the blob is durable."""

    id: BlobId
    upto: int


class WantBlob(_Message, frozen=True):
    """Please send this blob with `PutBlob` from `offset` on."""

    id: BlobId
    offset: int = 0


class NoBlob(_Message, frozen=True):
    """This blob is not here."""

    id: BlobId


# --- client to coordinator -------------------------------------------------------------------------------------------


class OpenJob(_Message, frozen=True):
    spec: JobSpec


class SubmitTasks(_Message, frozen=True):
    job: JobId
    first: int
    function: Function | None
    tasks: tuple[TaskItem, ...]
    #: See `AttemptStart.python`.
    python: str = ""


class CloseJob(_Message, frozen=True):
    """No more tasks come. `count` is how many there are."""

    job: JobId
    count: int


class CancelTasks(_Message, frozen=True):
    """Cancel these tasks (None: the whole job). `running=False` leaves alone what has started."""

    job: JobId
    indices: tuple[int, ...] | None = None
    running: bool = True


class Attach(_Message, frozen=True):
    """Tell me this job's events from `cursor` on."""

    job: JobId
    cursor: int = 0


class AckEvents(_Message, frozen=True):
    """`cursor` is the next event that the client expects."""

    job: JobId
    cursor: int


class Query(_Message, frozen=True):
    """Read something. `what`: nodes | jobs | job | workloads | status | tasks | logs | explain."""

    id: int
    what: Literal["nodes", "jobs", "job", "workloads", "status", "tasks", "explain", "logs"]
    job: JobId | None = None
    index: int | None = None


class RetryFailed(_Message, frozen=True):
    """Run the job's failed tasks again, with new accounts. Answered with how many they are."""

    id: int
    job: JobId


class ChangeJob(_Message, frozen=True):
    """Pause a job, or resume it; give it another priority. None: as it is."""

    id: int
    job: JobId
    paused: bool | None = None
    priority: int | None = None


class DrainNode(_Message, frozen=True):
    """Admin: empty a node (`on`), or use it again."""

    id: int
    node: NodeName
    on: bool = True


class ListKeys(_Message, frozen=True):
    """Admin: which certificates were revoked, and who is connected with which."""

    id: int


class RevokeKeys(_Message, frozen=True):
    """Admin: who shows one of these certificates is not let in any more, and is turned out now."""

    id: int
    keys: tuple[Key, ...]


class ShutDown(_Message, frozen=True):
    """Admin: end the agents, then the coordinator, after answering. Running tasks are killed."""

    id: int


class Goodbye(_Message, frozen=True):
    """The client is done: cancel its jobs that are not detached and have not ended, without the grace."""

    reason: str = ""


# --- coordinator to client -------------------------------------------------------------------------------------------


class SubmitOk(_Message, frozen=True):
    """Tasks below `upto` of this job are durable. `upto` 0 answers `OpenJob`."""

    job: JobId
    upto: int


class SubmitRefused(_Message, frozen=True):
    """Tasks from `first` on were not accepted. `error` names the class; `again` says whether trying again may help."""

    job: JobId
    first: int
    error: str
    message: str
    again: bool = False


class TasksStarted(_Message, frozen=True):
    """These tasks' children started their code: `(index, node)`."""

    job: JobId
    tasks: tuple[tuple[int, NodeName], ...]


class TasksEnded(_Message, frozen=True):
    job: JobId
    cursor: int
    ends: tuple[TaskEnd, ...]


class TasksReset(_Message, frozen=True):
    """These tasks had ended and will end once more: they are run again, as somebody asked for. A terminal record that
    comes for a task which has one replaces it, whether this was heard or not."""

    job: JobId
    indices: tuple[int, ...]


class CancelOk(_Message, frozen=True):
    """The cancellation is durable; `running` as there: a harder one of the same tasks has an answer of its own."""

    job: JobId
    indices: tuple[int, ...] | None = None
    running: bool = True


class Notice(_Message, frozen=True):
    """For the user's log: no agents, a start method that costs more than the tasks, and the like."""

    level: Literal["info", "warning"]
    text: str


class NodeInfo(_Part, frozen=True):
    facts: NodeFacts
    state: AgentState
    running: int = 0
    assigned_cores: float = 0.0
    report: NodeReport | None = None
    #: Seconds since the coordinator last heard of it.
    silent_s: float = 0.0
    #: The job of which a task waits for this node to have room: others get only what it will not need.
    kept_for: str = ""
    ends_in_s: float | None = None
    #: Why it takes nothing new, where nobody asked for that.
    why: str = ""
    #: The task on it that may have cost its last node, and has to prove itself.
    suspect: str = ""


class JobInfo(_Part, frozen=True):
    job: JobId
    name: str
    owner: str
    workload: str
    state: Literal["open", "running", "done", "failed", "cancelled"]
    counts: dict[TaskState, int] = {}
    outcomes: dict[Outcome, int] = {}
    tasks: int = 0
    closed: bool = False
    detached: bool = False
    kind: str = "submit"
    age_s: float = 0.0
    #: "python" or "command": in what form the results are.
    workload_kind: str = "python"
    priority: int = 0
    #: Nothing of it is started; what runs goes on.
    paused: bool = False


class TaskInfo(_Part, frozen=True):
    index: int
    state: TaskState
    outcome: Outcome | None = None
    node: NodeName | None = None
    attempts: int = 0


class NodeVerdict(_Part, frozen=True):
    """What one node has to say to a task."""

    node: NodeName
    fits: bool
    text: str


class Explanation(_Part, frozen=True):
    """Why a task waits, runs where it runs, or ended as it did. Lists are cut to what a person reads."""

    job: JobId
    index: int
    state: TaskState
    #: For programs. While it waits: dependencies | paused | back_off | no_agents | no_room | kept | turn; then:
    #: look_ahead | starting | running | waiting_inside; at last: succeeded | failed | ...
    kind: str
    #: For people: one sentence, and more of them.
    summary: str
    details: tuple[str, ...] = ()
    outcome: Outcome | None = None
    cause: Cause | None = None
    node: NodeName | None = None
    #: Tasks that it waits for.
    waits_for: tuple[str, ...] = ()
    nodes: tuple[NodeVerdict, ...] = ()
    #: Tasks of its job that come before it.
    before: int = 0
    back_off_s: float | None = None
    priority: int = 0
    #: Cores that its owner uses, now and lately, for his weight, and those of the owner who is next.
    owner_use: float = 0.0
    least_use: float = 0.0
    #: Those that are over, as far as they are remembered.
    attempts: tuple[PastAttempt, ...] = ()
    failure: Failure | None = None
    #: The newest attempt, and how long ago it was placed on `node`.
    attempt: int = 0
    since_s: float = 0.0


class WorkloadInfo(_Part, frozen=True):
    """A workload over all nodes."""

    key: WorkloadKey
    name: str
    start: str
    reports: dict[NodeName, WorkloadReport] = {}
    #: Why it is given fresh interpreters on all nodes, although `auto` chose to fork it; "" otherwise.
    demoted: str = ""


class OwnerInfo(_Part, frozen=True):
    """One owner's part of the cores: held now, lately on average; and how much of them is due to him among those who
    have work, by the weights (0 to 1)."""

    owner: str
    cores: float = 0.0
    mean_cores: float = 0.0
    weight: float = 1.0
    share: float = 0.0


class StatusInfo(_Part, frozen=True):
    cluster: ClusterId
    epoch: int
    version: str
    tasks: dict[TaskState, int] = {}
    agents: dict[AgentState, int] = {}
    jobs: int = 0
    clients: int = 0
    http: str = ""
    #: Those who use most for their weight first.
    owners: tuple[OwnerInfo, ...] = ()
    paused_jobs: int = 0
    #: Nodes that are kept for a task which would wait for ever.
    kept_nodes: int = 0
    #: Tasks that may have cost their node.
    suspects: int = 0


class Answer(_Message, frozen=True):
    """The answer to a question or a verb that has an `id`. One of the fields is set, or `error` and `message`."""

    id: int
    nodes: tuple[NodeInfo, ...] | None = None
    jobs: tuple[JobInfo, ...] | None = None
    workloads: tuple[WorkloadInfo, ...] | None = None
    tasks: tuple[TaskInfo, ...] | None = None
    status: StatusInfo | None = None
    logs: Logs | None = None
    error: str = ""
    message: str = ""
    #: Of `RetryFailed`.
    count: int | None = None
    explanation: Explanation | None = None
    #: Of `ListKeys` and `RevokeKeys`.
    keys: tuple[KeyInfo, ...] | None = None


# --- coordinator to agent --------------------------------------------------------------------------------------------


class TellTaskClient(_Message, frozen=True):
    """To the client inside the task that runs as this attempt: the body of one frame, a `CoordinatorToClient`."""

    attempt: AttemptId
    body: bytes


class DropTaskClient(_Message, frozen=True):
    """There is no such client, or it broke the rules: tell it why, and end it."""

    attempt: AttemptId
    error: str
    message: str


class StartAttempts(_Message, frozen=True):
    """Obeyed only in the session it names."""

    session: int
    attempts: tuple[AttemptStart, ...]
    workloads: tuple[WorkloadSpec, ...] = ()
    jobs: tuple[JobBrief, ...] = ()
    functions: tuple[Function, ...] = ()


class CancelAttempts(_Message, frozen=True):
    """SIGTERM to all processes of each, SIGKILL after `grace_s`. Each still ends with an `AttemptEnd`."""

    attempts: tuple[AttemptId, ...]
    grace_s: float = 2.0
    #: Only those that no child has been given yet; the others run on.
    waiting_only: bool = False


class AckAttempts(_Message, frozen=True):
    """These ends are durable, or superseded: forget them (and stop them, if they still run)."""

    attempts: tuple[AttemptId, ...]


class ForgetJobs(_Message, frozen=True):
    """These jobs have ended: drop their briefs and functions."""

    jobs: tuple[JobId, ...]


class SyncOk(_Message, frozen=True):
    """The answer to `Sync`: these running attempts are not wanted any more (superseded, cancelled, unknown job)."""

    session: int
    drop: tuple[AttemptId, ...] = ()


class PullMetrics(_Message, frozen=True):
    """Send the Prometheus exposition."""

    id: int
    openmetrics: bool = False


class Drain(_Message, frozen=True):
    on: bool = True


class Stop(_Message, frozen=True):
    """End: kill what runs, leave nothing behind. Not a loss: the coordinator asked for it."""

    reason: str = ""


# --- agent to coordinator --------------------------------------------------------------------------------------------


class Sync(_Message, frozen=True):
    """Everything this agent has, after each (re)connection, before anything else."""

    running: tuple[RunningAttempt, ...] = ()
    ended: tuple[AttemptEnd, ...] = ()
    #: More ended ones follow in `AttemptsEnded` when they do not fit into one frame.
    more: bool = False


class AttemptsStarted(_Message, frozen=True):
    attempts: tuple[AttemptId, ...]


class AttemptsEnded(_Message, frozen=True):
    ends: tuple[AttemptEnd, ...]


class SlotsChanged(_Message, frozen=True):
    """Attempts that have given their cores up while they wait for tasks of their own, and attempts that want them
    back: these go on before anything that is queued at the agent."""

    lent: tuple[AttemptId, ...] = ()
    reclaimed: tuple[AttemptId, ...] = ()


class TaskClientOpened(_Message, frozen=True):
    """The task that runs as this attempt has made itself a client. Said again after each (re)connection."""

    attempt: AttemptId
    incarnation: Incarnation
    protocol: int
    version: str = ""
    python: str = ""


class TaskClientSaid(_Message, frozen=True):
    """From that client: the body of one frame, a `ClientToCoordinator` without the verbs of admins."""

    attempt: AttemptId
    body: bytes


class TaskClientClosed(_Message, frozen=True):
    """That client is gone for good."""

    attempt: AttemptId


class WorkloadsReported(_Message, frozen=True):
    reports: tuple[WorkloadReport, ...]


class Metrics(_Message, frozen=True):
    id: int
    text: bytes
    content_type: str


ClientToCoordinator = (
    OpenJob
    | SubmitTasks
    | CloseJob
    | CancelTasks
    | Attach
    | AckEvents
    | Query
    | RetryFailed
    | ChangeJob
    | DrainNode
    | ListKeys
    | RevokeKeys
    | ShutDown
    | Goodbye
    | PutBlob
    | BlobStored
    | WantBlob
)
CoordinatorToClient = (
    SubmitOk
    | SubmitRefused
    | TasksStarted
    | TasksEnded
    | TasksReset
    | CancelOk
    | Notice
    | Answer
    | PutBlob
    | BlobStored
    | WantBlob
    | NoBlob
)
CoordinatorToAgent = (
    StartAttempts
    | CancelAttempts
    | AckAttempts
    | ForgetJobs
    | SyncOk
    | PullMetrics
    | Drain
    | Stop
    | TellTaskClient
    | DropTaskClient
    | PutBlob
    | BlobStored
    | WantBlob
    | NoBlob
)
AgentToCoordinator = (
    Sync
    | AttemptsStarted
    | AttemptsEnded
    | SlotsChanged
    | TaskClientOpened
    | TaskClientSaid
    | TaskClientClosed
    | WorkloadsReported
    | Metrics
    | PutBlob
    | BlobStored
    | WantBlob
    | NoBlob
)
SessionMessage = Hello | Welcome | Refused | Heartbeat | HeartbeatAck
Message = SessionMessage | ClientToCoordinator | CoordinatorToClient | CoordinatorToAgent | AgentToCoordinator

"""What can happen to an agent. Past tense; the shell makes them, `step` takes them.

Templates and children are known by numbers which the core gives out and which are never used again, so that what
arrives late from one that is gone is recognised and dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from herder_shared.ids import AttemptId, BlobId, JobId
from herder_shared.states import Cause
from herder_shared.wire.messages import AttemptStart, AuditStep, Failure, JobBrief, Logs, Payload, WorkloadSpec


class Answer(msgspec.Struct, frozen=True):
    """What a child said of its task, with its own account (differences over the task; seconds and bytes)."""

    result: Payload | None = None
    failure: Failure | None = None
    wall_s: float = 0.0
    user_s: float = 0.0
    system_s: float = 0.0
    minor_faults: int = 0
    major_faults: int = 0
    peak_bytes: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    #: Where `peak_bytes` is from: "cgroup", or "" where it was sampled.
    memory_source: str = ""
    #: The kernel killed a process of the attempt's because of the attempt's own memory limit.
    limit_hit: bool = False


class Exit(msgspec.Struct, frozen=True):
    """How a child's process ended: raw wait status, and `wait4`'s usage of it and of what it reaped."""

    status: int
    user_s: float = 0.0
    system_s: float = 0.0
    minor_faults: int = 0
    major_faults: int = 0
    #: The kernel's out-of-memory killer was seen to act while it ran, anywhere on the machine.
    oom_seen: bool = False
    peak_bytes: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    #: As in `Answer`.
    memory_source: str = ""
    limit_hit: bool = False
    #: ... and little memory is left there.
    memory_is_low: bool = False


@dataclass(frozen=True, slots=True)
class Connected:
    """Hello and welcome are through."""

    session: int


@dataclass(frozen=True, slots=True)
class Disconnected:
    session: int


@dataclass(frozen=True, slots=True)
class AttemptsOrdered:
    session: int
    attempts: tuple[AttemptStart, ...]
    workloads: tuple[WorkloadSpec, ...] = ()
    jobs: tuple[JobBrief, ...] = ()
    #: Functions whose bytes are a blob of the same id.
    blob_functions: tuple[BlobId, ...] = ()


@dataclass(frozen=True, slots=True)
class CancelOrdered:
    attempts: tuple[AttemptId, ...]
    grace_s: float
    #: Only those that no child has been given.
    waiting_only: bool = False


@dataclass(frozen=True, slots=True)
class AttemptsAcked:
    """Their ends are durable or superseded; those that still run are not wanted."""

    attempts: tuple[AttemptId, ...]


@dataclass(frozen=True, slots=True)
class JobsForgotten:
    jobs: tuple[JobId, ...]


@dataclass(frozen=True, slots=True)
class StopOrdered:
    """The agent is told to end, by whoever started it, its node or the coordinator: all that runs is about to die."""

    reason: str


@dataclass(frozen=True, slots=True)
class LeftoversStuck:
    """What the ended children left behind cannot be killed."""


@dataclass(frozen=True, slots=True)
class StuckGone:
    """What could not be killed is gone after all."""


@dataclass(frozen=True, slots=True)
class LeaseRenewed:
    """The coordinator has answered what was sent a lease before `until_s`: so long it certainly trusts this agent."""

    until_s: float


@dataclass(frozen=True, slots=True)
class WorkWaitingHeard:
    waiting: bool


@dataclass(frozen=True, slots=True)
class BlobsArrived:
    """All blobs that this attempt needs are here and kept until it ends."""

    attempt: AttemptId


@dataclass(frozen=True, slots=True)
class BlobsLost:
    attempt: AttemptId
    message: str


@dataclass(frozen=True, slots=True)
class BlobUploaded:
    """The coordinator has this result."""

    blob: BlobId


@dataclass(frozen=True, slots=True)
class TemplateStepped:
    template: int
    step: AuditStep


@dataclass(frozen=True, slots=True)
class TemplateReady:
    template: int
    #: "fork", or "fresh": the audit or the canary said no.
    start: str
    fork_point: str
    reason: str
    python: str
    pid: int
    start_s: float
    rss_bytes: int
    #: How forked children get setup's value ("forked", "mapped", "per child", "" without setup or not known), and what
    #: running setup took.
    setup_mode: str = ""
    setup_s: float | None = None
    #: It handed over setup's value; or why it could not.
    has_value: bool = False
    not_published: str = ""
    shared_bytes: int = 0
    private_bytes: int = 0
    #: One bare fork from the sealed template, as it measured it itself.
    fork_cost_s: float | None = None
    immortal_objects: int = 0
    immortal_off: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TemplateFailed:
    template: int
    cause: Cause
    message: str
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class TemplateNotBranched:
    """The template that was to fork it could not, or is gone: it was never there."""

    template: int
    message: str = ""


@dataclass(frozen=True, slots=True)
class TemplateExited:
    """It is gone, asked for or not; its children are, or will be killed by the kernel."""

    template: int
    message: str = ""


@dataclass(frozen=True, slots=True)
class TemplateSeen:
    """What a look at a template saw: memory of files, memfds and shared; its own; and threads."""

    template: int
    threads: int
    shared_bytes: int
    private_bytes: int


@dataclass(frozen=True, slots=True)
class OracleDenied:
    """The kernel does not tell here in which system call a thread is."""

    reason: str


@dataclass(frozen=True, slots=True)
class ChildHung:
    """Its process cannot go on (`how` "deadlock": proved), or has done nothing for too long ("stall")."""

    child: int
    how: str


@dataclass(frozen=True, slots=True)
class ChildForked:
    child: int
    pid: int


@dataclass(frozen=True, slots=True)
class ChildForkFailed:
    """`result` of a command whose program could not be executed: that is the command's own end, as a shell's 127 is."""

    child: int
    message: str
    result: Payload | None = None
    #: The program could not be executed: trying again here is of no use.
    is_exec: bool = False


@dataclass(frozen=True, slots=True)
class ChildIdle:
    """A fresh interpreter is warm."""

    child: int
    python: str = ""
    #: Its own memory.
    anon_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ChildSetupFailed:
    """A fresh interpreter's preload or setup failed."""

    child: int
    cause: Cause
    message: str
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class ChildStarted:
    child: int


@dataclass(frozen=True, slots=True)
class ChildAnswered:
    """`logs` is what a child that goes on printed since its last answer; one that exits gives it with its exit."""

    child: int
    answer: Answer
    logs: Logs | None = None
    #: It takes no further task: its task left what it cannot put back.
    ends: bool = False


class ChildDone(msgspec.Struct, frozen=True):
    """A child that was forked with its task is over, and nothing that it left behind is there: its answer, if it gave
    one, and its exit."""

    child: int
    pid: int
    answer: Answer | None
    exit: Exit
    logs: Logs | None = None


@dataclass(frozen=True, slots=True)
class ChildExited:
    """Reaped, and its process group killed before. `result` and `check` are a command's: its encoded
    `CommandResult`, and whether a status other than 0 is a failure."""

    child: int
    exit: Exit
    logs: Logs | None = None
    result: Payload | None = None
    check: bool = True


@dataclass(frozen=True, slots=True)
class LeftoversGone:
    """No process is left of the children whose exits were told before."""


@dataclass(frozen=True, slots=True)
class MemorySeen:
    """Σ RssAnon of a child and its descendants now, less what it had before its task; and how many processes and
    threads they are, where it is not the kernel that limits them."""

    child: int
    anon_bytes: int
    tasks: int = 0


@dataclass(frozen=True, slots=True)
class WaitBegan:
    """The task of this attempt waits for tasks of its own."""

    attempt: AttemptId


@dataclass(frozen=True, slots=True)
class WaitEnded:
    """It wants its cores back; `n` is its own number of the wait."""

    attempt: AttemptId
    n: int


@dataclass(frozen=True, slots=True)
class Ticked:
    """A deadline of `next_deadline_s` has come."""


Event = (
    Connected
    | Disconnected
    | AttemptsOrdered
    | CancelOrdered
    | AttemptsAcked
    | JobsForgotten
    | StopOrdered
    | LeftoversStuck
    | StuckGone
    | LeaseRenewed
    | WorkWaitingHeard
    | BlobsArrived
    | BlobsLost
    | BlobUploaded
    | TemplateStepped
    | TemplateReady
    | TemplateFailed
    | TemplateNotBranched
    | TemplateExited
    | TemplateSeen
    | OracleDenied
    | ChildHung
    | ChildForked
    | ChildForkFailed
    | ChildIdle
    | ChildSetupFailed
    | ChildStarted
    | ChildAnswered
    | ChildExited
    | ChildDone
    | LeftoversGone
    | MemorySeen
    | WaitBegan
    | WaitEnded
    | Ticked
)

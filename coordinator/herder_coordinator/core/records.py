"""What the journal keeps: everything durable that ever happened, as small facts which rebuild the state when replayed.

Rules: frozen, tagged structs, arrays on disk; fields are only ever added, at the end and with a default. A record is
applied by the very functions by which `step` changes the state (`core/apply.py`): a replay cannot come out different.
Nothing absolute in time is kept: leases, graces and back-offs start anew when the coordinator does.

A snapshot is a list of the same records, with a few more kinds (`…Restored`) for what history alone explains.
"""

from __future__ import annotations

import msgspec

from herder_shared.ids import AttemptId, BlobId, ClusterId, Incarnation, JobId, NodeName, WorkloadKey
from herder_shared.states import Cause
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


class _Record(msgspec.Struct, frozen=True, tag=True, array_like=True):
    pass


class _Part(msgspec.Struct, frozen=True, array_like=True):
    pass


class EpochStarted(_Record, frozen=True):
    """A life of the coordinator began. First record of every snapshot."""

    cluster: ClusterId
    epoch: int


class JobOpened(_Record, frozen=True):
    client: Incarnation
    owner: str
    spec: JobSpec
    #: Its client is a running task's own: the attempt, and how many tasks stand above the job.
    attempt: AttemptId | None = None
    depth: int = 0
    #: How long the client's jobs go on when it has vanished; None: as configured.
    grace_s: float | None = None


class FunctionKept(_Record, frozen=True):
    """A function's bytes, once; later records name it by its id until it is dropped."""

    function: Function


class FunctionsDropped(_Record, frozen=True):
    functions: tuple[BlobId, ...]


class TasksSubmitted(_Record, frozen=True):
    job: JobId
    first: int
    function: BlobId | None
    tasks: tuple[TaskItem, ...]
    python: str = ""


class JobClosed(_Record, frozen=True):
    job: JobId


class TasksReset(_Record, frozen=True):
    """These failed tasks begin anew, with new accounts."""

    job: JobId
    indices: tuple[int, ...]


class JobChanged(_Record, frozen=True):
    """Paused or not, and its priority, from now on."""

    job: JobId
    paused: bool
    priority: int


class CancelRequested(_Record, frozen=True):
    job: JobId
    indices: tuple[int, ...] | None
    running: bool


class Assignment(_Part, frozen=True):
    job: JobId
    index: int
    attempt: AttemptId
    ordinal: int
    #: In a fresh interpreter, whatever the workload says: the free rerun.
    fresh: bool = False


class AttemptsAssigned(_Record, frozen=True):
    node: NodeName
    incarnation: Incarnation
    attempts: tuple[Assignment, ...]


class Retry(_Part, frozen=True):
    """A task's account after an attempt which was not its last."""

    job: JobId
    index: int
    #: Its newest attempt so far, and how many there were.
    attempt: AttemptId
    ordinal: int
    #: Ends of its own, counted against `retries`; losses, counted against `max_crashes`.
    failures: int
    crashes: int
    #: Nodes on which it killed its process: three of them and it is poison.
    killed_on: tuple[NodeName, ...] = ()
    #: Nodes to avoid: the last attempt failed to start there, or was lost.
    avoid: tuple[NodeName, ...] = ()
    #: The next attempt is the free rerun; it was granted already.
    fresh: bool = False
    reran: bool = False
    backoff_s: float = 0.0
    #: The cause of the end for which the free rerun is granted, until the rerun has told whether the fork was to blame.
    suspect: Cause | None = None
    #: It may have cost its node (core/quarantine.py): how long its next attempt has to run before it is trusted again.
    quarantine_s: float = 0.0
    #: What its attempts are given instead of what the job asks for, as they ran out of that; 0 = as the job says.
    memory_bytes: int = 0
    #: The attempt that has just ended; in a snapshot, all that are remembered.
    past: tuple[PastAttempt, ...] = ()


class TasksRetried(_Record, frozen=True):
    tasks: tuple[Retry, ...]


class TasksEnded(_Record, frozen=True):
    """Terminal records. The first has number `cursor` among its job's, the others follow."""

    job: JobId
    cursor: int
    ends: tuple[TaskEnd, ...]


class EventsAcked(_Record, frozen=True):
    """The job's client has all terminal records below `cursor`."""

    job: JobId
    cursor: int


class JobForgotten(_Record, frozen=True):
    job: JobId


class DrainSet(_Record, frozen=True):
    node: NodeName
    on: bool
    #: Why, where nobody asked for it.
    reason: str = ""


class KeysRevoked(_Record, frozen=True):
    """Who shows one of these certificates is not let in."""

    keys: tuple[Key, ...]


class SharesKept(_Record, frozen=True):
    """The cores that each owner and job held lately, on average (core/shares.py), in ten-thousandths of a core. Who is
    not named held none."""

    owners: tuple[tuple[str, int], ...]
    jobs: tuple[tuple[JobId, int], ...]


class WorkloadDemoted(_Record, frozen=True):
    """Forked children died where fresh ones lived: the workload is not forked any more."""

    workload: WorkloadKey
    reason: str
    #: In a snapshot: no job that is known has it.
    spec: WorkloadSpec | None = None


class JobRestored(_Record, frozen=True):
    """A job as of the snapshot, before its tasks."""

    client: Incarnation
    owner: str
    spec: JobSpec
    #: The number of the first terminal record that is still kept.
    cursor: int
    closed: bool = False
    cancelled: bool = False
    age_s: float = 0.0
    attempt: AttemptId | None = None
    depth: int = 0
    resets: int = 0
    grace_s: float | None = None


class TasksRestored(_Record, frozen=True):
    """Tasks of one chunk as of the snapshot: `outcomes` has a byte for each (0: not ended), `tasks` None where ended;
    no `tasks` at all means that all have."""

    job: JobId
    first: int
    function: BlobId | None
    tasks: tuple[TaskItem | None, ...]
    python: str
    outcomes: bytes


class EndsRestored(_Record, frozen=True):
    """Terminal records which the client has not acknowledged, or which a detached job keeps."""

    job: JobId
    ends: tuple[TaskEnd, ...]


class EndsRemembered(_Record, frozen=True):
    """Acknowledged terminal records that a late dependant may still ask for. Only where the journal goes on behind the
    snapshot: a new life forgets them."""

    job: JobId
    ends: tuple[TaskEnd, ...]


class SpentTask(_Part, frozen=True):
    index: int
    item: TaskItem
    function: BlobId | None
    python: str
    attempt: AttemptId
    ordinal: int


class SpentKept(_Record, frozen=True):
    """Failed tasks which can be run again, if somebody asks for that."""

    job: JobId
    tasks: tuple[SpentTask, ...]


class DependencyKept(_Record, frozen=True):
    """The value of an ended task which an unended one waits with; the ended one's own record may be gone."""

    job: JobId
    index: int
    value: Payload


class CancelKept(_Record, frozen=True):
    """These unended tasks are being cancelled."""

    job: JobId
    indices: tuple[int, ...]
    running: bool


class JobSummarized(_Record, frozen=True):
    """A forgotten job, for lists."""

    info: JobInfo


Record = (
    EpochStarted
    | JobOpened
    | FunctionKept
    | FunctionsDropped
    | TasksSubmitted
    | JobClosed
    | TasksReset
    | JobChanged
    | CancelRequested
    | AttemptsAssigned
    | TasksRetried
    | TasksEnded
    | EventsAcked
    | JobForgotten
    | DrainSet
    | KeysRevoked
    | SharesKept
    | WorkloadDemoted
    | JobRestored
    | TasksRestored
    | EndsRestored
    | EndsRemembered
    | SpentKept
    | DependencyKept
    | CancelKept
    | JobSummarized
)

#: What stands before the tasks' own history in a snapshot: until all of these are read, values may be missing.
RESTORED = (
    EpochStarted,
    FunctionKept,
    JobRestored,
    TasksRestored,
    EndsRestored,
    EndsRemembered,
    SpentKept,
    DependencyKept,
    JobSummarized,
)

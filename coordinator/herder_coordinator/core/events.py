"""What can happen to the coordinator. Past tense; one dataclass each; the shell makes them, `step` takes them.

A client is known by the incarnation in its hello, an agent by its node's name; `session` tells a connection from an
earlier one of the same peer, so that what arrives late from an old connection can be told and dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

from herder_shared.ids import AttemptId, Incarnation, JobId, NodeName
from herder_shared.wire.messages import (
    AttemptEnd,
    Function,
    JobSpec,
    Key,
    NodeFacts,
    NodeReport,
    RunningAttempt,
    TaskItem,
    WorkloadReport,
)


@dataclass(frozen=True, slots=True)
class ClientConnected:
    """`attempt`: the client is a task's own, by the word of the agent on `node`; its owner is the task's."""

    client: Incarnation
    session: int
    owner: str
    node: NodeName | None = None
    attempt: AttemptId | None = None
    #: How long its jobs go on when it has vanished; None: as configured.
    grace_s: float | None = None


@dataclass(frozen=True, slots=True)
class ClientDisconnected:
    """The connection is gone. Its jobs that are not detached end after `DISCONNECT_GRACE_S` unless it is back."""

    client: Incarnation
    session: int


@dataclass(frozen=True, slots=True)
class ClientLeft:
    """The client said goodbye: its jobs that are not detached and have not ended are cancelled now."""

    client: Incarnation


@dataclass(frozen=True, slots=True)
class JobOpened:
    client: Incarnation
    spec: JobSpec


@dataclass(frozen=True, slots=True)
class TasksSubmitted:
    """The shell has checked that blobs which the tasks name are durable here."""

    client: Incarnation
    job: JobId
    first: int
    function: Function | None
    tasks: tuple[TaskItem, ...]
    python: str


@dataclass(frozen=True, slots=True)
class JobClosed:
    client: Incarnation
    job: JobId
    count: int


@dataclass(frozen=True, slots=True)
class JobChangeRequested:
    """`number` is that of the question, which is answered; None: as it is. An admin may change others' jobs."""

    client: Incarnation
    number: int
    job: JobId
    paused: bool | None
    priority: int | None
    is_admin: bool = False


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """An admin may cancel others' tasks."""

    client: Incarnation
    job: JobId
    indices: tuple[int, ...] | None
    running: bool
    is_admin: bool = False


@dataclass(frozen=True, slots=True)
class RetryRequested:
    """`number` is the question's."""

    client: Incarnation
    number: int
    job: JobId


@dataclass(frozen=True, slots=True)
class Attached:
    client: Incarnation
    job: JobId
    cursor: int


@dataclass(frozen=True, slots=True)
class EventsAcked:
    client: Incarnation
    job: JobId
    cursor: int


@dataclass(frozen=True, slots=True)
class AgentConnected:
    """Hello and welcome are through; nothing is sent to it before `AgentSynced`."""

    facts: NodeFacts
    incarnation: Incarnation
    session: int
    #: Its certificate's.
    serial: str = ""


@dataclass(frozen=True, slots=True)
class AgentSynced:
    node: NodeName
    session: int
    running: tuple[RunningAttempt, ...]
    ended: tuple[AttemptEnd, ...]
    #: More ended attempts follow as `AttemptsEnded`: nothing may be concluded from what is not listed among `ended`
    #: until the next heartbeat of the session.
    more: bool = False


@dataclass(frozen=True, slots=True)
class AgentDisconnected:
    node: NodeName
    session: int


@dataclass(frozen=True, slots=True)
class AgentHeard:
    """A heartbeat."""

    node: NodeName
    session: int
    report: NodeReport | None = None


@dataclass(frozen=True, slots=True)
class AttemptsStarted:
    node: NodeName
    session: int
    attempts: tuple[AttemptId, ...]


@dataclass(frozen=True, slots=True)
class SlotsChanged:
    """Attempts have given their cores up while they wait for tasks of their own, or want them back."""

    node: NodeName
    session: int
    lent: tuple[AttemptId, ...]
    reclaimed: tuple[AttemptId, ...]


@dataclass(frozen=True, slots=True)
class AttemptsEnded:
    """The shell has checked that result blobs which the ends name are durable here."""

    node: NodeName
    session: int
    ends: tuple[AttemptEnd, ...]


@dataclass(frozen=True, slots=True)
class WorkloadsReported:
    node: NodeName
    session: int
    reports: tuple[WorkloadReport, ...]


@dataclass(frozen=True, slots=True)
class DrainRequested:
    node: NodeName
    on: bool


@dataclass(frozen=True, slots=True)
class KeysRevokeRequested:
    """An admin's order. `number` is the question's; `own` the serial number of the certificate that asks."""

    client: Incarnation
    number: int
    keys: tuple[Key, ...]
    own: str


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed. At least every half second, and at `next_deadline_s(state)`."""


Event = (
    ClientConnected
    | ClientDisconnected
    | ClientLeft
    | JobOpened
    | TasksSubmitted
    | JobClosed
    | JobChangeRequested
    | CancelRequested
    | RetryRequested
    | Attached
    | EventsAcked
    | AgentConnected
    | AgentSynced
    | AgentDisconnected
    | AgentHeard
    | AttemptsStarted
    | SlotsChanged
    | AttemptsEnded
    | WorkloadsReported
    | DrainRequested
    | KeysRevokeRequested
    | Ticked
)

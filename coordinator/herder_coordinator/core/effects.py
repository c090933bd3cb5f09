"""What the shell must do. Imperative; each says after what: `"now"`, or `"durable"` = when every `Persist` that was
returned before it (in this step or an earlier one) is on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from herder_coordinator.core.records import Record
from herder_shared.ids import BlobId, Incarnation, JobId, NodeName
from herder_shared.wire.messages import CoordinatorToAgent, CoordinatorToClient, Refused

After = Literal["now", "durable"]


@dataclass(frozen=True, slots=True)
class Persist:
    """Append to the journal, in the order of the effects."""

    record: Record


@dataclass(frozen=True, slots=True)
class SendToClient:
    """Dropped silently when the client is not connected: it will attach again and ask."""

    client: Incarnation
    message: CoordinatorToClient | Refused
    after: After = "durable"


@dataclass(frozen=True, slots=True)
class SendToAgent:
    """Dropped silently when that session is over: the next `Sync` settles it."""

    node: NodeName
    session: int
    message: CoordinatorToAgent
    after: After = "now"


@dataclass(frozen=True, slots=True)
class DropAgent:
    """Close this session: a newer one of the same node replaced it, or it broke the protocol."""

    node: NodeName
    session: int
    reason: str


@dataclass(frozen=True, slots=True)
class TurnOut:
    """Close every connection with one of these certificates, whoever it is, and say why."""

    serials: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DropBlobs:
    """No task needs these blobs any more. When it is carried out, a blob is dropped only if `views.is_blob_needed` is
    still false and no later `DropBlobs` of it waits: a task may have come meanwhile with the same bytes, and ended."""

    blobs: tuple[BlobId, ...]
    after: After = "durable"


@dataclass(frozen=True, slots=True)
class Observe:
    """Something worth counting: the shell adds it to the metrics and the log; it decides nothing by it.

    One effect stands for all that a step saw of one `kind` with the same labels: counts in `value`, single observations
    for a histogram (seconds) in `values`. Kinds:

    task_ended       workload, outcome           count
    task_retried     cause                       count
    attempt_lost     reason                      count
    fork_unsafe      reason (a cause)            count
    workload_demoted workload, reason (a cause)  count
    queue_wait                                   `values`: pending to dispatch
    task_start       start_method                `values`: slot to the start of the user's code
    task_duration    workload                    `values`: the user's code
    task_cpu         workload, mode user|system  CPU seconds in `value`
    allocated        workload                    core-seconds held in `value`
    foreign_attempt  node                        count: it reported what cannot be its own
    node_up | node_lost | node_disconnected | node_drained   node, (reason)
    stalled                                      seconds by which deadlines were moved in `value`
    """

    kind: str
    labels: tuple[tuple[str, str], ...] = ()
    value: float = 1.0
    job: JobId | None = None
    values: tuple[float, ...] = ()


Effect = Persist | SendToClient | SendToAgent | DropAgent | TurnOut | DropBlobs | Observe

"""What the agent's shell must do. Imperative; in order; none of them waits."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from herder_shared.ids import AttemptId, BlobId, WorkloadKey
from herder_shared.wire.messages import (
    AttemptEnd,
    AttemptStart,
    RunningAttempt,
    TaskOptions,
    WorkloadReport,
    WorkloadSpec,
)


@dataclass(frozen=True, slots=True)
class StartTemplate:
    """Exec a template for `workload`; None: the node's spawner."""

    template: int
    workload: WorkloadSpec | None
    #: Only to run setup and hand over its value.
    publish: bool = False


@dataclass(frozen=True, slots=True)
class BranchTemplate:
    """Have the template `parent` fork itself: a template for `workload`, its own or one that begins alike."""

    template: int
    parent: int
    workload: WorkloadSpec


@dataclass(frozen=True, slots=True)
class StopTemplate:
    template: int


@dataclass(frozen=True, slots=True)
class DropValue:
    """Close the memory file of this workload's setup: nobody will be given it any more."""

    workload: WorkloadKey


@dataclass(frozen=True, slots=True)
class LookAtTemplate:
    """See how much memory and how many threads it has: `TemplateSeen`."""

    template: int


@dataclass(frozen=True, slots=True)
class ForkChildren:
    template: int
    children: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SpawnFresh:
    """Have the spawner exec a fresh interpreter for `workload`, to be warmed."""

    template: int
    child: int
    workload: WorkloadSpec


class Grant(msgspec.Struct, frozen=True):
    """What an attempt may use: the operating system's CPU numbers (empty: not pinned), threads of each numerical
    library, GPU indices; processes and threads, where the workload says how many."""

    cpus: tuple[int, ...]
    threads: int
    gpus: tuple[int, ...]
    pids: int = 0


@dataclass(frozen=True, slots=True)
class SpawnCommand:
    template: int
    child: int
    attempt: AttemptStart
    workload: WorkloadSpec
    options: TaskOptions
    grant: Grant


class SendTask(msgspec.Struct, frozen=True):
    child: int
    attempt: AttemptStart
    job_name: str
    options: TaskOptions
    grant: Grant
    #: The child may run further tasks.
    reuses: bool = False
    #: It need not say that it has started: it has run tasks before, and has all that this one needs.
    is_quiet: bool = False
    #: So many wait that this one's answer need not be heard before its process is gone.
    in_crowd: bool = False


class RunTask(msgspec.Struct, frozen=True):
    """Have the template fork a child with this task at hand: `ChildDone`, or `ChildForked` if it takes longer."""

    template: int
    child: int
    attempt: AttemptStart
    job_name: str
    options: TaskOptions
    grant: Grant


@dataclass(frozen=True, slots=True)
class StopChild:
    """Ask an idle child to end."""

    child: int


@dataclass(frozen=True, slots=True)
class SignalChild:
    """To its process group and all its descendants."""

    child: int
    signal: int


@dataclass(frozen=True, slots=True)
class DropChild:
    """Its template is gone: close what belongs to it; the sweep kills it if it still lives."""

    child: int


@dataclass(frozen=True, slots=True)
class SweepLeftovers:
    """Kill what ended children left behind; `LeftoversGone` when nothing is left."""


@dataclass(frozen=True, slots=True)
class FetchBlobs:
    attempt: AttemptId
    blobs: tuple[BlobId, ...]


@dataclass(frozen=True, slots=True)
class ReleaseBlobs:
    """The attempt needs its blobs no more."""

    attempt: AttemptId


@dataclass(frozen=True, slots=True)
class UploadBlob:
    blob: BlobId


@dataclass(frozen=True, slots=True)
class SendSync:
    running: tuple[RunningAttempt, ...]
    ended: tuple[AttemptEnd, ...]


class ReportStarted(msgspec.Struct, frozen=True):
    attempt: AttemptId


@dataclass(frozen=True, slots=True)
class ReportSlot:
    """It has given its cores up, or wants them back."""

    attempt: AttemptId
    lent: bool


@dataclass(frozen=True, slots=True)
class ResumeTask:
    """Its cores are its own again: tell the task, which may go on, on these CPUs (empty: any)."""

    attempt: AttemptId
    n: int
    cpus: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RefuseClient:
    """The task's own client ends, for this reason."""

    attempt: AttemptId
    message: str


class ReportEnd(msgspec.Struct, frozen=True):
    end: AttemptEnd


@dataclass(frozen=True, slots=True)
class ReportWorkload:
    report: WorkloadReport


class Observe(msgspec.Struct, frozen=True):
    """Count something, or log `text`; the shell decides nothing by it. `kind`: task_start | fork_unsafe |
    template_failed | crash | hung | oracle_off | template_replaced | demoted."""

    kind: str
    label: str = ""
    value: float = 1.0
    text: str = ""


Effect = (
    StartTemplate
    | BranchTemplate
    | StopTemplate
    | DropValue
    | LookAtTemplate
    | ForkChildren
    | SpawnFresh
    | SpawnCommand
    | SendTask
    | RunTask
    | StopChild
    | SignalChild
    | DropChild
    | SweepLeftovers
    | FetchBlobs
    | ReleaseBlobs
    | UploadBlob
    | SendSync
    | ReportStarted
    | ReportSlot
    | ResumeTask
    | RefuseClient
    | ReportEnd
    | ReportWorkload
    | Observe
)

"""How a task ended, as the user meets it: its value, the exception that says why there is none, its usage and its logs.

Everything here runs in the thread that asks for the result: unpickling runs code that the task chose.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from herder.completed import Completed
from herder_shared.errors import (
    CommandFailed,
    DataLost,
    DependencyFailed,
    ForkUnsafe,
    HerderError,
    NodeLost,
    NotSerializable,
    PayloadTooLarge,
    RemoteError,
    SetupFailed,
    TaskCrashed,
    TaskOutOfMemory,
    TaskPoisoned,
    TaskTimeout,
    Unschedulable,
    VersionMismatch,
)
from herder_shared.ids import JobId, task_id
from herder_shared.states import Cause, Outcome
from herder_shared.wire.messages import CommandResult, Failure, Logs, TaskEnd, Usage

Kind = Literal["python", "command"]

_COMMAND_RESULT = msgspec.msgpack.Decoder(CommandResult)


@dataclass(frozen=True, slots=True)
class TaskUsage:
    """What a task's last attempt used. Times in seconds, memory in bytes."""

    node: str
    #: Its ordinal, from 1.
    attempt: int
    start_method: str
    queued_s: float
    #: From the slot's allocation to the start of the user's code.
    start_s: float
    wall_s: float
    cpu_user_s: float
    cpu_system_s: float
    peak_memory_bytes: int
    #: "cgroup" or "sampled".
    memory_source: str
    minor_faults: int
    major_faults: int
    #: Cores held × time, from allocation to release.
    core_s: float
    #: Of the process that ran it, on its node.
    pid: int
    #: From and to storage, by its processes, where the kernel tells.
    read_bytes: int = 0
    write_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TaskLogs:
    """What a task wrote: of each stream the first and the last 32 KiB; `truncated` when more was written."""

    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False


class RemoteTraceback(Exception):
    """The traceback of a task's exception as text: the `__cause__` of the exception which `result()` raises."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text.rstrip()}\n"""'


def usage_of(usage: Usage) -> TaskUsage:
    """The public form of what travels."""
    return TaskUsage(
        node=usage.node,
        attempt=usage.attempt,
        start_method=usage.start_method,
        queued_s=usage.queued_s,
        start_s=usage.start_s,
        wall_s=usage.wall_s,
        cpu_user_s=usage.cpu_user_s,
        cpu_system_s=usage.cpu_system_s,
        peak_memory_bytes=usage.peak_memory_bytes,
        memory_source=usage.memory_source,
        minor_faults=usage.minor_faults,
        major_faults=usage.major_faults,
        core_s=usage.core_s,
        pid=usage.pid,
        read_bytes=usage.read_bytes,
        write_bytes=usage.write_bytes,
    )


def logs_of(logs: Logs) -> TaskLogs:
    """The public form of what travels."""
    return TaskLogs(logs.stdout, logs.stderr, logs.truncated)


def is_cancelled(end: TaskEnd) -> bool:
    """The task, or one that it depends on, was cancelled."""
    if end.outcome is Outcome.CANCELLED:
        return True
    failure = end.failure
    while failure is not None and failure.cause is Cause.DEPENDENCY_FAILED:
        failure = failure.root_failure
    return failure is not None and failure.cause is Cause.CANCELLED


def outcome_of(end: TaskEnd, job: JobId, kind: Kind) -> tuple[Any, BaseException | None]:
    """The value of a task that succeeded, or the exception that tells why it did not: `(value, None)` or `(None,
    error)`."""
    if end.outcome is not Outcome.SUCCEEDED:
        return None, _error_of(end, job)
    content = end.result.inline if end.result is not None else b""
    if kind == "command":
        return _completed(content, end.usage), None
    try:
        return pickle.loads(content), None
    except Exception as error:  # noqa: BLE001 - unpickling runs the value's own code, which may raise anything
        where = _where(end, job)
        text = (
            f"the result of task {where} cannot be unpickled here: {type(error).__name__}: {error}. The task itself "
            "succeeded; import what its result is made of on this side, or return plain values"
        )
        remote = RemoteError(text, type_name=_qualified(type(error)), **_place(end, job))
        remote.__cause__ = error
        return None, remote


def dependency_error(error: BaseException, task: str) -> DependencyFailed:
    """What a task ends with when `error` is how `task`, which it depends on, ended."""
    root = error.task_id if isinstance(error, DependencyFailed) and error.task_id else task
    cause = error.__cause__ if isinstance(error, DependencyFailed) and error.__cause__ is not None else error
    failed = DependencyFailed(f"task {root}, which this one depends on, did not succeed: {cause}", task_id=root)
    failed.__cause__ = cause
    return failed


def _completed(content: bytes, usage: Usage) -> Completed:
    result = _COMMAND_RESULT.decode(content)
    return Completed(result.returncode, result.stdout, result.stderr, result.truncated, usage_of(usage))


def _error_of(end: TaskEnd, job: JobId) -> BaseException:
    failure = end.failure
    if failure is None:
        return NodeLost(f"task {_where(end, job)} ended as {end.outcome} and nobody said why", **_place(end, job))
    if failure.cause is Cause.COMMAND_EXIT:
        completed = _completed(end.result.inline, end.usage) if end.result is not None and end.result.inline else None
        return CommandFailed(_message(failure, end, job), completed=completed, **_place(end, job))
    return _rebuild(failure, end, job)


#: What a node lacks is told as what it is, so that `except ImportError` sees it.
_IMPORT_ERRORS: dict[str, type[ImportError]] = {
    "ImportError": ImportError,
    "ModuleNotFoundError": ModuleNotFoundError,
}
_CLASSES: dict[Cause, type[HerderError]] = {
    Cause.EXIT: TaskCrashed,
    Cause.SIGNAL: TaskCrashed,
    Cause.DEADLOCK: TaskCrashed,
    Cause.OUT_OF_MEMORY: TaskOutOfMemory,
    Cause.TIMEOUT: TaskTimeout,
    Cause.NODE_LOST: NodeLost,
    Cause.TEMPLATE_LOST: NodeLost,
    Cause.START_FAILED: NodeLost,
    Cause.SETUP_FAILED: SetupFailed,
    Cause.FORK_UNSAFE: ForkUnsafe,
    Cause.VERSION_MISMATCH: VersionMismatch,
    Cause.NOT_SERIALIZABLE: NotSerializable,
    Cause.DATA_LOST: DataLost,
    Cause.POISONED: TaskPoisoned,
    Cause.UNSCHEDULABLE: Unschedulable,
    Cause.PAYLOAD_TOO_LARGE: PayloadTooLarge,
}


def _rebuild(failure: Failure, end: TaskEnd, job: JobId) -> BaseException:
    if failure.cause is Cause.DEPENDENCY_FAILED:
        return _dependency_failed(failure, end, job)
    if failure.cause in {Cause.EXCEPTION, Cause.CANNOT_UNPICKLE, Cause.COMMAND_EXIT}:
        return _own_exception(failure, end, job)
    cls = _CLASSES.get(failure.cause, RemoteError)
    error = cls(_message(failure, end, job), **_place(end, job))
    if isinstance(error, TaskCrashed):
        error.signal, error.exit_status, error.stderr_tail = failure.signal, failure.exit_status, failure.stderr_tail
    if isinstance(error, TaskOutOfMemory):
        error.peak_memory_bytes, error.limit_bytes = end.usage.peak_memory_bytes or None, failure.limit_bytes
    if failure.pickled is not None or failure.traceback:
        error.__cause__ = _unpickled(failure.pickled) or RemoteTraceback(failure.traceback)
    return error


def _own_exception(failure: Failure, end: TaskEnd, job: JobId) -> BaseException:
    cause = RemoteTraceback(failure.traceback) if failure.traceback else None
    own = _unpickled(failure.pickled)
    if own is not None:
        own.__cause__ = cause
        return own
    if failure.type_name in _IMPORT_ERRORS:
        missing = _IMPORT_ERRORS[failure.type_name](_message(failure, end, job))
        missing.__cause__ = cause
        return missing
    remote = RemoteError(
        f"task {_where(end, job)} raised {failure.type_name or 'an exception'}, which cannot be rebuilt here: "
        f"{failure.message}\n{failure.traceback}".rstrip(),
        type_name=failure.type_name,
        remote_traceback=failure.traceback,
        **_place(end, job),
    )
    remote.__cause__ = cause
    return remote


def _dependency_failed(failure: Failure, end: TaskEnd, job: JobId) -> DependencyFailed:
    root = failure.root or task_id(job, end.index)
    message = failure.message or f"task {root}, which task {task_id(job, end.index)} depends on, did not succeed"
    error = DependencyFailed(message, task_id=root)
    if failure.root_failure is not None:
        root_job, _, root_index = root.rpartition(".")
        root_end = TaskEnd(int(root_index) if root_index.isdecimal() else 0, Outcome.FAILED)
        error.__cause__ = _rebuild(failure.root_failure, root_end, JobId(root_job))
    return error


def _unpickled(pickled: bytes | None) -> BaseException | None:
    if pickled is None:
        return None
    try:
        error = pickle.loads(pickled)
    except Exception:  # noqa: BLE001 - unpickling runs the exception's own code; the caller shows its text instead
        return None
    return error if isinstance(error, BaseException) else None


def _message(failure: Failure, end: TaskEnd, job: JobId) -> str:
    message = failure.message or f"{failure.type_name or failure.cause}"
    if task_id(job, end.index) not in message:
        message = f"{message} (task {_where(end, job)})"
    tail = failure.stderr_tail.strip()
    if tail and tail not in message:
        message = f"{message}\nLast lines of its stderr:\n{tail}"
    return message


def _where(end: TaskEnd, job: JobId) -> str:
    usage = end.usage
    place = f", attempt {usage.attempt} on node {usage.node}" if usage.node else ""
    return f"{task_id(job, end.index)}{place}"


def _place(end: TaskEnd, job: JobId) -> dict[str, Any]:
    usage = end.usage
    return {"task_id": task_id(job, end.index), "node": usage.node or None, "attempt": usage.attempt or None}


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix("builtins.")

"""Fewer, larger messages: what one turn of the loop sends to one peer, joined where two neighbours say the same kind
of thing.

Pure. Only neighbours are joined, so that order is kept; a joined message stays below the batch limits, far from a
frame's."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from herder_shared.limits import BATCH_BYTES_MAX, BATCH_TASKS_MAX
from herder_shared.wire.messages import (
    AckAttempts,
    AttemptStart,
    CancelAttempts,
    ForgetJobs,
    Logs,
    Message,
    Payload,
    StartAttempts,
    SubmitOk,
    TaskEnd,
    TasksEnded,
    TasksStarted,
)

#: What a task's record takes on the wire beside its payloads, about.
_TASK_BYTES = 150


def coalesce(messages: Sequence[Message]) -> list[Message]:
    """The same messages, in order, with neighbours of one kind joined where that fits."""
    if len(messages) < 2:
        return list(messages)
    joined: list[Message] = []
    run: list[Message] = []
    run_bytes = run_tasks = 0
    for message in messages:
        size_bytes, tasks = _weigh(message)
        fits = run_bytes + size_bytes <= BATCH_BYTES_MAX and run_tasks + tasks <= BATCH_TASKS_MAX
        if run and fits and _follows(run[-1], message):
            run.append(message)
            run_bytes += size_bytes
            run_tasks += tasks
        else:
            _close_run(run, joined)
            run, run_bytes, run_tasks = [message], size_bytes, tasks
    _close_run(run, joined)
    return joined


def halve(message: Message) -> tuple[Message, Message] | None:
    """Two messages that say the same as one which is too large for a frame. None: it cannot be cut."""
    match message:
        case StartAttempts() if len(message.attempts) > 1:
            middle = len(message.attempts) // 2
            first = msgspec.structs.replace(message, attempts=message.attempts[:middle])
            return first, StartAttempts(message.session, message.attempts[middle:])
        case TasksEnded() if len(message.ends) > 1:
            middle = len(message.ends) // 2
            first_ends = msgspec.structs.replace(message, ends=message.ends[:middle])
            return first_ends, TasksEnded(message.job, message.cursor + middle, message.ends[middle:])
        case _:
            return None


def _close_run(run: list[Message], joined: list[Message]) -> None:
    if len(run) == 1:
        joined.append(run[0])
    elif run:
        joined.append(_join(run))


def _follows(last: Message, message: Message) -> bool:
    """Whether `message` may be joined to what ends with `last`."""
    match last, message:
        case (TasksEnded(), TasksEnded()):
            return last.job == message.job and last.cursor + len(last.ends) == message.cursor
        case (SubmitOk(), SubmitOk()):
            return last.job == message.job
        case (TasksStarted(), TasksStarted()):
            return last.job == message.job
        case (StartAttempts(), StartAttempts()):
            return last.session == message.session
        case (CancelAttempts(), CancelAttempts()):
            return last.grace_s == message.grace_s and last.waiting_only == message.waiting_only
        case (AckAttempts(), AckAttempts()) | (ForgetJobs(), ForgetJobs()):
            return True
        case _:
            return False


def _join(run: Sequence[Message]) -> Message:
    first = run[0]
    match first:
        case TasksEnded():
            return TasksEnded(
                first.job, first.cursor, tuple(e for m in run if isinstance(m, TasksEnded) for e in m.ends)
            )
        case SubmitOk():
            return SubmitOk(first.job, max(m.upto for m in run if isinstance(m, SubmitOk)))
        case TasksStarted():
            return TasksStarted(first.job, tuple(t for m in run if isinstance(m, TasksStarted) for t in m.tasks))
        case StartAttempts():
            starts = [m for m in run if isinstance(m, StartAttempts)]
            return StartAttempts(
                session=first.session,
                attempts=tuple(a for m in starts for a in m.attempts),
                workloads=tuple(w for m in starts for w in m.workloads),
                jobs=tuple(j for m in starts for j in m.jobs),
                functions=tuple(f for m in starts for f in m.functions),
            )
        case CancelAttempts():
            attempts = tuple(a for m in run if isinstance(m, CancelAttempts) for a in m.attempts)
            return CancelAttempts(attempts, first.grace_s, first.waiting_only)
        case AckAttempts():
            return AckAttempts(tuple(a for m in run if isinstance(m, AckAttempts) for a in m.attempts))
        case ForgetJobs():
            return ForgetJobs(tuple(j for m in run if isinstance(m, ForgetJobs) for j in m.jobs))
        case _:
            raise AssertionError(f"no rule joins {type(first).__name__}")


def _weigh(message: Message) -> tuple[int, int]:
    """About how many bytes a message takes, and how many tasks it speaks of."""
    match message:
        case TasksEnded():
            return sum(_end_bytes(end) for end in message.ends), len(message.ends)
        case StartAttempts():
            bytes_ = sum(_start_bytes(start) for start in message.attempts)
            bytes_ += sum(len(function.content) for function in message.functions)
            bytes_ += sum(len(workload.setup or b"") + 500 for workload in message.workloads)
            return bytes_, len(message.attempts)
        case TasksStarted():
            return len(message.tasks) * 40, len(message.tasks)
        case AckAttempts() | CancelAttempts():
            return len(message.attempts) * 12, len(message.attempts)
        case _:
            return _TASK_BYTES, 1


def _end_bytes(end: TaskEnd) -> int:
    failure = end.failure
    size_bytes = _TASK_BYTES + _payload_bytes(end.result) + _logs_bytes(end.logs)
    while failure is not None:
        size_bytes += len(failure.message) + len(failure.traceback) + len(failure.pickled or b"")
        failure = failure.root_failure
    return size_bytes


def _start_bytes(start: AttemptStart) -> int:
    return _TASK_BYTES + _payload_bytes(start.args) + sum(_payload_bytes(value) + 40 for _, _, value in start.deps)


def _payload_bytes(payload: Payload | None) -> int:
    return 0 if payload is None else len(payload.inline)


def _logs_bytes(logs: Logs | None) -> int:
    return 0 if logs is None else len(logs.stdout) + len(logs.stderr)

"""What becomes of an attempt: its slot, its phases, its end."""

from __future__ import annotations

import signal
from heapq import heappush

import msgspec

from herder_agent.core.effects import Effect, FetchBlobs, ReleaseBlobs, ReportEnd, SignalChild, UploadBlob
from herder_agent.core.events import Answer, Exit
from herder_agent.core.slots import Request
from herder_agent.core.state import CORE_STATE, Attempt, Deadline, Phase, State, Workload
from herder_shared.ids import AttemptId, BlobId, WorkloadKey
from herder_shared.limits import KILL_GRACE_S
from herder_shared.states import Cause, Outcome
from herder_shared.wire.messages import AttemptEnd, AttemptStart, Failure, JobBrief, Logs, Payload, Usage

#: Who has less is not what the kernel kills for want of memory, unless there is hardly any left on the node.
VICTIM_BYTES_MIN = 16 << 20
#: An attempt whose child has answered and does not exit is killed after this: flushing and joining threads take less.
EXIT_GRACE_S = 10.0
#: How long a child may take to die of SIGKILL: giving back much memory takes a while.
DEATH_LIMIT_S = 10.0


def add_deadline(state: State, at_s: float, kind: str, key: AttemptId | WorkloadKey | int, method: str = "") -> None:
    """Look again at `at_s`. There is no way to take a deadline back: what it finds gone it leaves alone."""
    state.last_deadline += 1
    heappush(state.deadlines, Deadline(at_s, state.last_deadline, kind, key, method))


def move(state: State, attempt: Attempt, phase: Phase) -> None:
    """Put `attempt` into `phase` and its cores into that phase's account."""
    source, target = CORE_STATE[attempt.phase], CORE_STATE[phase]
    if source is not target:
        state.account.move(attempt.request.cores, source, target)
    attempt.phase = phase


def accept(  # noqa: PLR0917 - the core's functions all take state, subject, time, effects
    state: State, start: AttemptStart, job: JobBrief, workload: Workload, now_s: float, effects: list[Effect]
) -> None:
    """Queue an attempt; have its blobs fetched meanwhile."""
    options = job.options
    if start.memory_bytes:
        options = msgspec.structs.replace(options, memory_bytes=start.memory_bytes)
    request = Request(options.cores, options.memory_bytes, options.gpus, tuple(options.resources.items()))
    attempt = Attempt(start, workload, options, job.name, request)
    state.attempts[attempt.id] = attempt
    if not state.slots.could_ever(request):
        message = f"node {state.node} has not the {options.cores:g} cores, memory or resources that the task asks for"
        end(state, attempt, Outcome.LOST, Failure(Cause.START_FAILED, message), now_s, effects)
        return
    blobs = _blobs_of(state, start)
    if blobs:
        attempt.blobs = blobs
        attempt.fetched = False
        effects.append(FetchBlobs(attempt.id, blobs))
    state.queue[attempt.id] = attempt
    workload.queued += 1


def _blobs_of(state: State, start: AttemptStart) -> tuple[BlobId, ...]:
    blobs = [start.args.blob] if start.args.blob is not None else []
    if start.function is not None and start.function in state.blob_functions:
        blobs.append(start.function)
    blobs.extend(payload.blob for _, _, payload in start.deps if payload.blob is not None)
    return tuple(blobs)


def stop(  # noqa: PLR0917
    state: State, attempt: Attempt, why: Outcome, grace_s: float, now_s: float, effects: list[Effect]
) -> None:
    """End an attempt before its time. One without a child ends at once; a child gets SIGTERM, then SIGKILL."""
    if not attempt.has_child:
        failure = Failure(Cause.CANCELLED, "cancelled before it started")
        end(state, attempt, why, failure, now_s, effects)
        return
    if attempt.phase in {Phase.SENT, Phase.RUNNING} and attempt.ending is None:
        attempt.ending = why
        effects.append(SignalChild(attempt.child, signal.SIGTERM if grace_s > 0 else signal.SIGKILL))
    if attempt.phase is not Phase.LEAVING:
        add_deadline(state, now_s + grace_s, "kill", attempt.id)


def kill(state: State, attempt: Attempt, now_s: float, effects: list[Effect]) -> None:
    """SIGKILL to all of it; and a look later at whether it died."""
    effects.append(SignalChild(attempt.child, signal.SIGKILL))
    add_deadline(state, now_s + DEATH_LIMIT_S, "death", attempt.id)


def drop(state: State, attempt: Attempt, now_s: float, effects: list[Effect]) -> None:
    """Stop an attempt whose end nobody wants to hear of."""
    attempt.dropped = True
    stop(state, attempt, Outcome.CANCELLED, KILL_GRACE_S, now_s, effects)


def end(  # noqa: PLR0917
    state: State, attempt: Attempt, outcome: Outcome, failure: Failure | None, now_s: float, effects: list[Effect]
) -> None:
    """Free what the attempt holds and report its end, unless that was reported when its child answered."""
    _leave_collections(state, attempt)
    usage = _usage(state, attempt, now_s)
    if attempt.slot is not None:
        state.account.move(attempt.request.cores, CORE_STATE[attempt.phase], None)
        state.slots.give_back(attempt.slot)
        attempt.slot = None
    if state.lent:
        state.lent.pop(attempt.id, None)
        state.returning.pop(attempt.id, None)
    del state.attempts[attempt.id]
    state.unkillable.pop(attempt.id, None)
    if attempt.blobs:
        effects.append(ReleaseBlobs(attempt.id))
    if not attempt.dropped:
        _report_end(state, attempt, outcome, failure, usage, effects)


def report_answer(state: State, attempt: Attempt, now_s: float, effects: list[Effect]) -> None:
    """Report the end of an attempt before it frees its slot: its child has answered and still has to exit (the way down
    of a process is not on the way of its result). The slot stays taken until the last of its processes is gone."""
    outcome, failure = conclude(attempt)
    _report_end(state, attempt, outcome, failure, _usage(state, attempt, now_s), effects)
    attempt.dropped = True


def give_back(state: State, attempt: Attempt, reason: str, now_s: float, effects: list[Effect]) -> None:
    """Report that the attempt ends with its agent: it is nobody's fault, and there is nothing to be waited for."""
    if attempt.dropped:
        return
    failure = Failure(Cause.NODE_LOST, f"the agent on {state.node} was told to end: {reason}")
    _report_end(state, attempt, Outcome.LOST, failure, _usage(state, attempt, now_s), effects)
    attempt.dropped = True


def keep_stuck(state: State, attempt: Attempt, now_s: float, effects: list[Effect]) -> None:
    """Report the end of an attempt whose processes cannot be killed. Its slot stays taken: they still use it."""
    del state.leaving[attempt.id]
    state.stuck[attempt.id] = attempt
    if not attempt.dropped:
        report_answer(state, attempt, now_s, effects)


def keep_unkillable(state: State, attempt: Attempt, now_s: float, effects: list[Effect]) -> None:
    """The same, where it is the child itself that does not die."""
    if attempt.id in state.unkillable:
        return
    state.unkillable[attempt.id] = attempt
    if not attempt.dropped:
        report_answer(state, attempt, now_s, effects)


def _report_end(  # noqa: PLR0917
    state: State, attempt: Attempt, outcome: Outcome, failure: Failure | None, usage: Usage, effects: list[Effect]
) -> None:
    report = _report(attempt, outcome, failure, usage)
    state.ends[attempt.id] = report
    blob = report.result.blob if report.result is not None else None
    if blob is None:
        effects.append(ReportEnd(report))
    elif blob in state.uploading:
        state.uploading[blob].append(attempt.id)
    else:
        state.uploading[blob] = [attempt.id]
        effects.append(UploadBlob(blob))


def _leave_collections(state: State, attempt: Attempt) -> None:
    match attempt.phase:
        case Phase.QUEUED:
            if state.queue.pop(attempt.id, None) is not None:
                attempt.workload.queued -= 1
        case Phase.WAITING:
            attempt.workload.undecided.pop(attempt.id, None)
            for pool in attempt.workload.pools.values():
                pool.waiting.pop(attempt.id, None)
        case Phase.LEAVING:
            state.leaving.pop(attempt.id, None)
            state.stuck.pop(attempt.id, None)
        case _:
            pass


def _report(attempt: Attempt, outcome: Outcome, failure: Failure | None, usage: Usage) -> AttemptEnd:
    result: Payload | None = attempt.result
    if attempt.answer is not None and outcome is Outcome.SUCCEEDED:
        result = attempt.answer.result
    if outcome not in {Outcome.SUCCEEDED, Outcome.FAILED}:
        result = None
    logs: Logs | None = attempt.logs
    start = attempt.start
    return AttemptEnd(start.attempt, start.job, start.index, outcome, result, failure, usage, logs)


def _usage(state: State, attempt: Attempt, now_s: float) -> Usage:
    """What it used. Who answered has measured itself, until the answer, with the processes that it reaped; else it is
    `wait4` that knows (a command, a crash)."""
    answer, exit_ = attempt.answer, attempt.exit
    method = attempt.method
    wall_s = answer.wall_s if answer is not None else 0.0
    if answer is None and attempt.started_s:
        wall_s = (attempt.exited_s or now_s) - attempt.started_s
    account = answer or exit_
    return Usage(
        node=state.node,
        attempt=attempt.start.ordinal,
        start_method=method,
        start_s=max(0.0, attempt.started_s - attempt.slot_s) if attempt.started_s else 0.0,
        wall_s=wall_s,
        cpu_user_s=account.user_s if account else 0.0,
        cpu_system_s=account.system_s if account else 0.0,
        peak_memory_bytes=attempt.peak_bytes,
        memory_source=attempt.memory_source or ("sampled" if attempt.sent_s else ""),
        minor_faults=account.minor_faults if account else 0,
        major_faults=account.major_faults if account else 0,
        core_s=_core_s(attempt, now_s) if attempt.slot is not None else 0.0,
        pid=attempt.pid,
        read_bytes=account.read_bytes if account else 0,
        write_bytes=account.write_bytes if account else 0,
    )


def _core_s(attempt: Attempt, now_s: float) -> float:
    """Cores held × time, without the time for which they were lent."""
    held_s = max(0.0, now_s - (attempt.held_s or attempt.slot_s))
    return attempt.charged_core_s + attempt.request.cores * held_s


def note_memory(attempt: Attempt, account: Answer | Exit) -> None:
    """Take over what is known of its memory."""
    attempt.peak_bytes = max(attempt.peak_bytes, account.peak_bytes)
    attempt.memory_source = account.memory_source or attempt.memory_source


def pids_limit(state: State, attempt: Attempt) -> int:
    """Processes and threads that it may have at once."""
    return attempt.workload.spec.pids or state.pids


def conclude(attempt: Attempt) -> tuple[Outcome, Failure | None]:
    """How an attempt ended that had a child: what we did to it comes first, then what it said, then how it died."""
    if attempt.ending is not None:
        return attempt.ending, _ended_by_us(attempt)
    if attempt.hung and attempt.answer is None and not attempt.template_lost:
        return Outcome.CRASHED, _hung(attempt)
    if attempt.answer is not None:
        failure = attempt.answer.failure
        if failure is not None and attempt.answer.limit_hit:
            return Outcome.OUT_OF_MEMORY, _over_limit(attempt)
        return (Outcome.FAILED, failure) if failure is not None else (Outcome.SUCCEEDED, None)
    if attempt.template_lost or attempt.exit is None:
        message = f"the template of workload {attempt.workload.spec.name!r} died, and its children with it"
        return Outcome.LOST, Failure(Cause.TEMPLATE_LOST, message)
    if attempt.exit.limit_hit and attempt.exit.status != 0:
        return Outcome.OUT_OF_MEMORY, _over_limit(attempt)
    return _by_exit(attempt, attempt.exit)


def _ended_by_us(attempt: Attempt) -> Failure:
    match attempt.ending:
        case Outcome.TIMED_OUT:
            message = f"ran longer than its timeout of {attempt.options.timeout_s:g} s"
            return Failure(Cause.TIMEOUT, message, stderr_tail=attempt.stderr_tail)
        case Outcome.OUT_OF_MEMORY:
            return _over_limit(attempt)
        case Outcome.CRASHED:
            had, limit = attempt.peak_tasks, attempt.tasks_max
            message = f"killed: it had {had} processes and threads at once, its limit (pids) is {limit}"
            return Failure(Cause.SIGNAL, message, signal=signal.SIGKILL, stderr_tail=attempt.stderr_tail)
        case _:
            return Failure(Cause.CANCELLED, "cancelled while it ran")


def _over_limit(attempt: Attempt) -> Failure:
    limit = attempt.options.memory_bytes
    message = f"used {attempt.peak_bytes} bytes of memory, its limit is {limit}"
    return Failure(Cause.OUT_OF_MEMORY, message, limit_bytes=limit, stderr_tail=attempt.stderr_tail)


def _hung(attempt: Attempt) -> Failure:
    is_forked = attempt.method == "fork"
    if attempt.hung == "deadlock":
        message = f"deadlocked{' after fork' * is_forked}: every thread waits for a lock that no thread holds"
    else:
        message = "hung before its code began, without using any CPU time"
    cure = "; use start='fresh'" if is_forked else ""
    return Failure(Cause.DEADLOCK, message + cure, signal=signal.SIGKILL, stderr_tail=attempt.stderr_tail)


def _by_exit(attempt: Attempt, exit_: Exit) -> tuple[Outcome, Failure | None]:
    status = exit_.status
    number = status & 0x7F
    code = status >> 8 & 0xFF
    if attempt.is_command and (not attempt.check or (number == 0 and code == 0)):
        return Outcome.SUCCEEDED, None
    tail = attempt.stderr_tail
    # The kernel may have killed others for the limits of their own groups: of such a kill this one was no victim.
    if number == signal.SIGKILL and exit_.oom_seen and (exit_.memory_is_low or attempt.peak_bytes >= VICTIM_BYTES_MIN):
        limit = attempt.options.memory_bytes or None
        message = (
            f"killed by the kernel: the node has no memory left (at least {attempt.peak_bytes} bytes were its own)"
        )
        failure = Failure(Cause.OUT_OF_MEMORY, message, signal=number, stderr_tail=tail, limit_bytes=limit)
        return Outcome.OUT_OF_MEMORY, failure
    if number:
        message = f"its process was killed by {_signal_name(number)}"
        return Outcome.CRASHED, Failure(Cause.SIGNAL, message, signal=number, stderr_tail=tail)
    if attempt.is_command:
        message = f"the command ended with exit status {code}"
        return Outcome.FAILED, Failure(Cause.COMMAND_EXIT, message, exit_status=code, stderr_tail=tail)
    message = f"its process ended with exit status {code} without an answer"
    return Outcome.CRASHED, Failure(Cause.EXIT, message, exit_status=code, stderr_tail=tail)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

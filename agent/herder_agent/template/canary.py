"""A forked child that must run a small task and end: the proof of what the audit can only guess. The task makes the
loaded libraries use their thread pools (`exercises`).

The deadlock oracle. A child whose *every* thread sits in a private futex wait without time-out can never wake: whoever
shares the futex is one of these threads. Only a signal handler could still do it, so no signal may be caught but SIGINT
and glibc's own. Measured: 9 of 9 hangs seen in 0.1 to 0.25 s; none of 10 adversarial waits mistaken for one.
"""

from __future__ import annotations

import _socket
import os
import pickle
import select
import time

from . import audit, child, exercises, system, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT_S = 10.0
POLL_S = 0.02
#: Polls in a row that must agree.
POLLS = 5
#: Bare forks that are timed, and how long that may take where each is slow.
FORKS_TIMED = 7
FORKS_TIMED_S = 0.25
_FUTEX = {"x86_64": 202, "aarch64": 98}.get(os.uname().machine, -1)
_NO_ANSWER = "ended without an answer"
_FUTEX_PRIVATE = 128
_FUTEX_WAITS = (0, 9)
#: SIGINT and the two that glibc keeps for itself, plus 34 which it may; as bits of SigCgt.
_SIGNALS_ALLOWED = (1 << 1) | (1 << 31) | (1 << 32) | (1 << 33)


def trial(plan: child.Plan) -> str:
    """Fork a child, give it a task. Returns "" when it ran it and ended, else what it did instead."""
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        child.run_forked(plan, parent, (theirs, null, null))
    theirs.close()
    os.close(null)
    channel = wire.Channel(ours)
    try:
        return _watch(pid, channel, plan)
    finally:
        channel.close()


def fork_cost_s() -> float:
    """What one bare fork costs here: the median time of fork, the child's `_exit` and its being reaped."""
    times: list[float] = []
    while len(times) < FORKS_TIMED and sum(times) < FORKS_TIMED_S:
        began = time.perf_counter()
        audit.probe_fork()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def _watch(pid: int, channel: wire.Channel, plan: child.Plan) -> str:
    complaint = _converse(pid, channel, plan)
    statuses: list[int] = []

    def has_ended() -> bool:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            statuses.append(status)
        else:
            time.sleep(POLL_S / 4)
        return bool(found)

    if complaint == _NO_ANSWER or not complaint:
        complaint = _wait(pid, has_ended, "did not end") or complaint
    if not statuses:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        return complaint
    code = os.waitstatus_to_exitcode(statuses[0])
    return f"died of signal {-code}" if code < 0 else f"ended with status {code}" if code else complaint


def _converse(pid: int, channel: wire.Channel, plan: child.Plan) -> str:
    """Give it the task and hear the answer."""
    parts = [["function", len(_FUNCTION)], ["args", len(_ARGUMENTS)]]
    head = {"t": "task", "function": "canary", "parts": parts, "threads": exercises.THREADS}
    poll = select.poll()
    poll.register(channel.socket.fileno(), select.POLLIN)
    try:
        channel.send(head, _FUNCTION + _ARGUMENTS)
        while True:
            complaint = _wait(pid, lambda: channel.has_frame() or bool(poll.poll(POLL_S * 1000)), "did not answer")
            if complaint:
                return complaint
            frame = channel.receive()
            if frame is None:
                return _NO_ANSWER
            if frame[0].get("t") == "error":
                return f"failed: {frame[0].get('message')}"
            if frame[0].get("t") == "result":
                break
        if plan.tasks_max != 1:
            channel.send({"t": "stop"})
    except OSError:
        return _NO_ANSWER
    return ""


def _wait(pid: int, is_done: Callable[[], bool], otherwise: str) -> str:
    """Until `is_done`, the limit, or the proof that it never will be."""
    deadline = time.monotonic() + LIMIT_S
    asleep = 0
    while not is_done():
        asleep = asleep + 1 if is_deadlocked(pid) else 0
        if asleep >= POLLS:
            return "is deadlocked: all its threads wait for locks that nobody is left to release"
        if time.monotonic() > deadline:
            return f"{otherwise} within {LIMIT_S:.0f} s"
    return ""


def is_deadlocked(pid: int) -> bool:
    """Whether every thread of the process waits, at this moment, for what only another of them could give."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            caught = next(int(line.split()[1], 16) for line in file if line.startswith("SigCgt:"))
        if caught & ~_SIGNALS_ALLOWED:
            return False
        return all(_waits_for_ever(f"/proc/{pid}/task/{tid}/syscall") for tid in system.thread_ids(pid))
    except (OSError, StopIteration):
        return False


def _waits_for_ever(path: str) -> bool:
    with open(path, encoding="ascii") as file:
        fields = file.read().split()
    if len(fields) < 5 or fields[0] != str(_FUTEX):
        return False
    operation, timeout = int(fields[2], 16), int(fields[4], 16)
    return operation & 127 in _FUTEX_WAITS and bool(operation & _FUTEX_PRIVATE) and timeout == 0


_FUNCTION = pickle.dumps(exercises.run, 5)
_ARGUMENTS = pickle.dumps(((), {}), 5)

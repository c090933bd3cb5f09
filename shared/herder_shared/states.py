"""States of tasks, attempts, agents and jobs, and which follows which. One table a machine; a miss is a bug of ours."""

from __future__ import annotations

from enum import StrEnum


class Outcome(StrEnum):
    """How a task, or one attempt of it, ended. The same words in the API, on the command line and in metrics."""

    SUCCEEDED = "succeeded"
    #: The user's own exception, or a command's non-zero exit.
    FAILED = "failed"
    #: A signal, or an exit that was not asked for.
    CRASHED = "crashed"
    OUT_OF_MEMORY = "out_of_memory"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    #: No news and no hope of news: its node, agent or template is gone. Not the task's fault.
    LOST = "lost"


class Cause(StrEnum):
    """Why an attempt did not succeed, in more detail than its outcome. Decides retries, blame and what is raised."""

    EXCEPTION = "exception"
    COMMAND_EXIT = "command_exit"
    EXIT = "exit"
    SIGNAL = "signal"
    DEADLOCK = "deadlock"
    OUT_OF_MEMORY = "out_of_memory"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    #: Infrastructure: never blamed on the task, counted against `max_crashes`.
    NODE_LOST = "node_lost"
    TEMPLATE_LOST = "template_lost"
    START_FAILED = "start_failed"
    #: Final at once: another attempt would end the same way.
    SETUP_FAILED = "setup_failed"
    FORK_UNSAFE = "fork_unsafe"
    VERSION_MISMATCH = "version_mismatch"
    NOT_SERIALIZABLE = "not_serializable"
    CANNOT_UNPICKLE = "cannot_unpickle"
    DATA_LOST = "data_lost"
    DEPENDENCY_FAILED = "dependency_failed"
    POISONED = "poisoned"
    UNSCHEDULABLE = "unschedulable"
    PAYLOAD_TOO_LARGE = "payload_too_large"


#: Causes that lie with the node, agent or template.
INFRASTRUCTURE = frozenset({Cause.NODE_LOST, Cause.TEMPLATE_LOST, Cause.START_FAILED, Cause.DATA_LOST})


class TaskState(StrEnum):
    """Where a task is, as the coordinator sees it."""

    #: Some task that it depends on has not ended.
    WAITING = "waiting"
    #: In its group's queue, or in its back-off before a retry.
    PENDING = "pending"
    #: An attempt was made and sent to an agent, which has not said that it started.
    ASSIGNED = "assigned"
    #: The agent said that the child started.
    RUNNING = "running"
    #: A terminal record exists. Nothing follows.
    ENDED = "ended"


TASK_TRANSITIONS: dict[TaskState, frozenset[TaskState]] = {
    TaskState.WAITING: frozenset({TaskState.PENDING, TaskState.ENDED}),
    TaskState.PENDING: frozenset({TaskState.ASSIGNED, TaskState.ENDED}),
    TaskState.ASSIGNED: frozenset({TaskState.RUNNING, TaskState.PENDING, TaskState.ENDED}),
    TaskState.RUNNING: frozenset({TaskState.PENDING, TaskState.ENDED}),
    TaskState.ENDED: frozenset(),
}


class AgentState(StrEnum):
    """How far the coordinator trusts an agent."""

    #: Connected and in its lease: gets attempts.
    READY = "ready"
    #: Connected, finishes what runs, takes nothing new.
    DRAINING = "draining"
    #: The connection is gone, the lease is not over: its attempts are kept.
    DISCONNECTED = "disconnected"
    #: The lease is over: its attempts are lost.
    LOST = "lost"


AGENT_TRANSITIONS: dict[AgentState, frozenset[AgentState]] = {
    AgentState.READY: frozenset({AgentState.DRAINING, AgentState.DISCONNECTED, AgentState.LOST}),
    AgentState.DRAINING: frozenset({AgentState.READY, AgentState.DISCONNECTED, AgentState.LOST}),
    AgentState.DISCONNECTED: frozenset({AgentState.READY, AgentState.DRAINING, AgentState.LOST}),
    AgentState.LOST: frozenset({AgentState.READY, AgentState.DRAINING}),
}


class CoreState(StrEnum):
    """What one core of a node is doing. Every second of every core falls in exactly one."""

    TASK = "task"
    #: Held by an attempt whose child has not started its code yet (template building, forking, interpreter start).
    START = "start"
    #: Held by an attempt which waits for its arguments, or whose result is being moved.
    TRANSFER = "transfer"
    #: Free while the coordinator had work that waits.
    IDLE_WORK_WAITING = "idle_work_waiting"
    IDLE = "idle"
    #: Held by an attempt whose code has ended and whose last process has not.
    SYSTEM = "system"

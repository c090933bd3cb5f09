"""The error tree. All public errors derive from `HerderError`; the client re-exports them.

::

    HerderError
    ├── ConfigError                     a profile, file, key, option or environment is wrong: fix it
    ├── NotSerializable                 what you passed cannot be pickled; names the object and its path
    ├── PayloadTooLarge
    ├── VersionMismatch                 client and task interpreters differ and code was pickled by value
    ├── Unschedulable                   no known node could ever meet the request
    ├── Unreachable (ConnectionError)   away: the only family worth another try; the outcome is unknown
    ├── Unauthorized                    the certificate's role or cluster does not allow this
    ├── ProtocolMismatch                the peer speaks another version
    ├── JobNotFound
    ├── TaskError                       how a task ended
    │   ├── TaskCrashed                 signal or exit
    │   │   └── TaskPoisoned            it killed its process on several nodes
    │   ├── TaskTimeout (TimeoutError)
    │   ├── TaskOutOfMemory (MemoryError)
    │   ├── NodeLost                    lost with its node more often than max_crashes allows
    │   ├── CommandFailed               a command's exit was not 0
    │   ├── DependencyFailed            a task it depends on failed; __cause__ is that failure
    │   ├── DataLost
    │   ├── SetupFailed                 the workload's preload or setup raised
    │   ├── ForkUnsafe                  start="fork" and the audit says no
    │   └── RemoteError                 the task's exception could not be unpickled here: its text
    └── RemoteProtocolError             a peer broke the protocol: the connection is closed (internal)
"""

from __future__ import annotations

from typing import Any


class HerderError(Exception):
    """Base of all of Herder's errors.

    `task_id`, `node` and `attempt` (its ordinal, from 1) are set where they exist, else None. Keyword arguments become
    attributes, so that nobody has to parse the message.
    """

    task_id: str | None = None
    node: str | None = None
    attempt: int | None = None

    def __init__(self, message: str = "", **attributes: Any) -> None:
        super().__init__(message)
        for name, value in attributes.items():
            setattr(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(cls: type[HerderError], args: tuple[Any, ...], attributes: dict[str, Any]) -> HerderError:
    error = cls(*args)
    error.__dict__.update(attributes)
    return error


class ConfigError(HerderError):
    """A profile, configuration file, key, option or environment variable is wrong."""


class NotSerializable(HerderError, TypeError):
    """A function, argument or result cannot be pickled. `path` says where in it the object is."""

    path: str = ""


class PayloadTooLarge(HerderError):
    """An argument or result is above the limit."""


class VersionMismatch(HerderError):
    """Code was pickled by value and the task's interpreter or cloudpickle has another minor version."""


class Unschedulable(HerderError):
    """No known node could ever meet the request, which the message names."""


class Unreachable(HerderError, ConnectionError):
    """The coordinator cannot be reached. The outcome of what was asked is unknown; trying again may help."""


class Unauthorized(HerderError):
    """The certificate is of another cluster, expired, revoked, or of a role that may not do this."""


class ProtocolMismatch(HerderError):
    """The peer speaks another version of the protocol."""


class JobNotFound(HerderError):
    """No such job, or it has been forgotten."""


class RemoteProtocolError(HerderError):
    """The peer broke the protocol; the connection is closed."""


class TaskError(HerderError):
    """A task did not end well."""


class TaskCrashed(TaskError):
    """The task's process ended by a signal, or by an exit that was not asked for."""

    signal: int | None = None
    exit_status: int | None = None
    stderr_tail: str = ""


class TaskPoisoned(TaskCrashed):
    """The task killed its process on several nodes and is not tried again."""


class TaskTimeout(TaskError, TimeoutError):
    """The attempt ran longer than its `timeout`."""


class TaskOutOfMemory(TaskError, MemoryError):
    """The attempt used more memory than its limit, or the node had none left."""

    peak_memory_bytes: int | None = None
    limit_bytes: int | None = None


class NodeLost(TaskError):
    """The task's attempts were lost with their node, agent or template more often than `max_crashes` allows."""


class CommandFailed(TaskError):
    """A command's exit status was not 0. `completed` is its `herder.Completed`."""

    completed: Any = None


class DependencyFailed(TaskError):
    """A task that this one depends on did not succeed. `task_id` is the root of the failure."""


class DataLost(TaskError):
    """Bytes that the task needs, or its result, are gone."""


class SetupFailed(TaskError):
    """The workload's preload or `setup` raised, or took too long."""


class ForkUnsafe(TaskError):
    """`start="fork"` was asked for and the audit found what makes forking unsafe. The message names it and the cure."""


class RemoteError(TaskError):
    """A task's exception which could not be rebuilt here: its type's name, message and traceback as text."""

    type_name: str = ""
    remote_traceback: str = ""

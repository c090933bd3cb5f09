"""What a task sees of Herder: the module `_herder_task`, to which `herder.shared()`, `herder.task()` and
`herder.current_client()` lead.

Loaded under that name (and not as a sibling), because pickled arguments refer to `_herder_task.dependency`.
"""

from __future__ import annotations

import _thread
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class Task:
    """The running task, as it may know itself.

    `id` is "JOB.INDEX", `attempt` its ordinal from 1, `cpus` the CPUs that it is pinned to (empty: any), `gpus` the
    devices given to it.
    """

    __slots__ = ("_pid", "_scratch", "attempt", "cpus", "gpus", "id", "index", "job_id", "node")

    def __init__(self, head: dict[str, Any]) -> None:
        self.job_id: str = head.get("job", "")
        self.index: int = head.get("index", 0)
        self.id = f"{self.job_id}.{self.index}"
        self.attempt: int = head.get("ordinal", 1)
        self.node: str = head.get("node", "")
        self.cpus: tuple[int, ...] = tuple(head.get("cpus") or ())
        self.gpus: tuple[int, ...] = tuple(head.get("gpus") or ())
        self._scratch: str | None = head.get("scratch")
        #: The process that made the scratch folder; 0 while nobody has, -1 when it was there.
        self._pid = 0

    @property
    def scratch(self) -> str | None:
        """A private folder on the node, made when it is first asked for and removed after the attempt."""
        if self._scratch is not None and not self._pid:
            try:
                os.makedirs(self._scratch, 0o700)
            except FileExistsError:
                self._pid = -1  # whoever made it removes it: a process of this task, or the agent
            else:
                self._pid = os.getpid()
        return self._scratch

    def clean(self) -> None:
        """Remove the scratch folder, if this process made one. The agent does it for a process that cannot."""
        if self._scratch is not None and self._pid == os.getpid():
            import shutil

            shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def retries(self) -> int:
        """Attempts before this one."""
        return self.attempt - 1

    def __repr__(self) -> str:
        return f"<herder task {self.id}, attempt {self.attempt} on {self.node}>"


#: The running task; its head as text while nobody has asked for it.
_task: Task | memoryview | None = None
_value: Any = None
_dependencies: dict[tuple[str, int], Any] = {}
#: The process's task socket, over which a task may make itself a client; the client; held while either changes, as
#: nothing may be sent beside the task's answer.
_channel: Any = None
_client: Any = None
_gate = _thread.allocate_lock()


def task() -> Task:
    """The running task. Raises RuntimeError outside of one."""
    global _task
    if isinstance(_task, memoryview):
        import json

        _task = Task(json.loads(bytes(_task)))
    if _task is None:
        raise RuntimeError("herder.task() was called outside a task: only code that Herder runs as a task has one")
    return _task


def shared() -> Any:
    """The value of the workload's `setup`; None without `setup`. Raises RuntimeError outside a task."""
    if _task is None:
        raise RuntimeError(
            "herder.shared() was called outside a task: setup's value exists only where Herder runs the task "
            "(in setup itself, and in your own program, use the value directly)"
        )
    return _value


def dependency(job: str, index: int) -> Any:
    """The result of a task on which this one depends."""
    return _dependencies[job, index]


class Nested:
    """A call inside another one's arguments, not made yet."""

    __slots__ = ("arguments", "function")

    def __init__(self, function: Callable[..., Any], arguments: list[Any]) -> None:
        self.function = function
        self.arguments = arguments


def nested(function: Callable[..., Any], arguments: list[Any]) -> Nested:
    """As pickled arguments refer to it."""
    return Nested(function, arguments)


def compute(call: Nested) -> Any:
    """Make a call, and those in its arguments first."""
    arguments = [compute(each) if type(each) is Nested else each for each in call.arguments]
    return call.function(*arguments)


def listed(*items: Any) -> list[Any]:
    """A list that holds calls."""
    return list(items)


def is_in_task() -> bool:
    """Whether a task runs in this process."""
    return _task is not None


def reach_agent(channel: Any) -> None:
    """The agent is at the other end of this channel."""
    global _channel
    _channel = channel


def client(make: Callable[[int, Task], Any]) -> Any:
    """The task's own client, made by `make(descriptor, task)` of our end of a private socket, whose other end the agent
    gets. Raises RuntimeError outside a task."""
    global _client
    with _gate:
        if _task is None or _channel is None:
            raise RuntimeError(
                "herder.current_client() was called outside a task: in your own program make a herder.Client()"
            )
        if _client is None:
            from _socket import AF_UNIX, SOCK_STREAM, socketpair

            ours, theirs = socketpair(AF_UNIX, SOCK_STREAM)
            try:
                _channel.send({"t": "client"}, b"", [theirs.fileno()])
            finally:
                theirs.close()
            _client = make(ours.detach(), task())
        return _client


def no_client() -> Any:
    """Stands for `herder.current_client` where only this module stands for Herder."""
    import sys

    raise RuntimeError(
        f"herder.current_client() needs the package herder in the task's interpreter, and {sys.executable} has none: "
        "install it there (pip install herder), or name an interpreter that has it (Workload(python=...))"
    )


def enter(head: dict[str, Any], dependencies: dict[tuple[str, int], Any]) -> None:
    """The task of this head begins."""
    global _task, _dependencies
    _task = Task(head)
    _dependencies = dependencies


def leave(well: bool = False) -> None:
    """The task is over. What it submitted is waited for if it went `well`, else cancelled."""
    global _task, _dependencies, _client
    if _client is not None:
        _client.leave(well)
    with _gate:
        if isinstance(_task, Task):
            _task.clean()
        _task = _client = None
    _dependencies = {}


def withdraw() -> None:
    """The task that is known here is another process's."""
    global _task
    _task = None


def share(value: Any) -> None:
    """`setup` gave this value."""
    global _value
    _value = value


def value() -> Any:
    """What `setup` gave; for the process's own code, also outside a task."""
    return _value

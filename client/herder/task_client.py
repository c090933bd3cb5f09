"""The client inside a running task: `herder.current_client()` (decision 22).

    user's thread ── submit, wait ──▶ TaskConnection ── private socket ──▶ agent ── its own link ──▶ coordinator

Everything above the connection is any client's. There are no keys here: the agent vouches for the attempt, and the
coordinator lets it act for the task's owner. What is submitted starts as the task itself did: same workload, same
priority, same folders of the user's code.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec

from herder import __version__, workload
from herder.client import Client, View
from herder.connection import Connection, Endpoint
from herder.options import Options
from herder.payload import PYTHON_TAG
from herder.turnstile import Turnstile
from herder.workload import WireWorkload, Workload, workload_key
from herder_shared.errors import HerderError, Unauthorized, Unreachable
from herder_shared.ids import ClusterId, Incarnation
from herder_shared.limits import BACKOFF_S_MAX, PROTOCOL_VERSION
from herder_shared.wire.frame import FrameDecoder, decode_body, encode_frame
from herder_shared.wire.messages import Hello, Key, KeyInfo, Message, Refused, WorkloadSpec
from herder_shared.wire.relay import (
    RELAY_FRAME_BYTES_MAX,
    Closed,
    Heard,
    Opened,
    Relayed,
    Said,
    SlotBack,
    TaskHello,
    WaitBegan,
    WaitEnded,
    read_to_client,
    to_task,
)
from herder_shared.wire.session import Peer, error_of, is_worth_another_try
from herder_shared.wire.stream import Link

if TYPE_CHECKING:
    from herder.tracks import Track


class RunningTask(Protocol):
    """What is needed of `_herder_task.Task`."""

    id: str
    cpus: tuple[int, ...]


def make_client(fd: int, task: RunningTask) -> OwnClient:
    """Called by `_herder_task.client`: the descriptor is ours. Waits for the agent, and with it for the coordinator.

    Raises:
        HerderError: the coordinator will not have this task as a client.
    """
    return OwnClient(fd, task)


class OwnClient:
    """The one connection of a task, on which clients are made."""

    def __init__(self, fd: int, task: RunningTask) -> None:
        self._connection = TaskConnection(fd, task)
        self._connection.start(None)
        opened = self._connection.opening
        assert opened is not None
        workload.task_paths = opened.workload.paths
        self._base = Options(workload=InheritedWorkload(opened.workload), priority=opened.options.priority)

    def fresh(self) -> TaskClient:
        """A client of its own for who asks: whoever ends it ends nobody else's."""
        return TaskClient(self._connection, self._base)

    def leave(self, well: bool) -> None:
        """The task is over: wait for what it submitted, or cancel it."""
        try:
            if well and not self._connection.is_foreign:
                self._connection.wait_settled()
        finally:
            self._connection.end(None)
            workload.task_paths = None


class TaskClient(Client):
    """As `Client`. Ending it ends and waits for what was submitted through it; another one can be had."""

    def __init__(self, connection: TaskConnection, base: Options) -> None:
        View.__init__(self, connection, base, {}, None)

    def __repr__(self) -> str:
        return f"<herder.Client of {self._connection.endpoint.label}>"

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As of a view."""
        View.shutdown(self, wait, cancel_futures=cancel_futures)

    def abort(self) -> None:
        """End at once what was submitted through it, running tasks too."""
        self._stop(cancel_futures=False)
        View._interrupt(self)

    def _interrupt(self) -> None:
        View._interrupt(self)

    def drain(self, node: str, *, on: bool = True) -> None:
        """A task may not."""
        verb = "drain" if on else "use again"
        raise Unauthorized(f"a task may not {verb} node {node!r}: that is for an admin (`herder drain`)")

    def list_keys(self) -> tuple[KeyInfo, ...]:
        """A task may not."""
        raise Unauthorized("a task may not list keys: that is for an admin (`herder keys list`)")

    def revoke_keys(self, *keys: Key) -> tuple[KeyInfo, ...]:
        """A task may not."""
        raise Unauthorized(f"a task may not revoke {len(keys)} keys: that is for an admin (`herder keys revoke`)")


class InheritedWorkload(Workload):
    """The workload of the running task, as it came to the agent."""

    def __init__(self, spec: WorkloadSpec) -> None:
        super().__init__()
        # Frozen is what users see; this one is made once, here.
        object.__setattr__(self, "_spec", msgspec.structs.replace(spec, demoted=""))

    def for_wire(self, kind: Literal["python", "command"] = "python") -> WireWorkload:
        """As it came; for commands what of it concerns them."""
        spec: WorkloadSpec = vars(self)["_spec"]
        if kind == spec.kind:
            return WireWorkload(spec, spec.setup is not None)
        plain = WorkloadSpec(
            key=spec.key, name=spec.name, kind=kind, prologue=spec.prologue, env=spec.env, working_dir=spec.working_dir
        )
        return WireWorkload(msgspec.structs.replace(plain, key=workload_key(plain)))


class TaskConnection(Connection):
    """A connection over the task's private socket."""

    def __init__(self, fd: int, task: RunningTask) -> None:
        super().__init__(Endpoint((), Path(), ClusterId(""), f"task {task.id}"), None)
        self._task = task
        self._pipe = TaskPipe(fd, self._incarnation, self)
        self.turnstile = Turnstile(self._pipe.say_began, self._pipe.say_ended, self._moved)

    @property
    def opening(self) -> Opened | None:
        """What the agent said first."""
        return self._pipe.opening

    def wait_settled(self, tracks: Iterable[Track] | None = None, timeout_s: float | None = None) -> bool:
        """As of a `Connection`; the task's cores are given up meanwhile."""
        watched = None if tracks is None else list(tracks)
        if super().wait_settled(watched, 0.0):
            return True
        with self.patience() as patience:
            patience.begin()
            return super().wait_settled(watched, timeout_s)

    def slot_back(self, n: int, cpus: tuple[int, ...]) -> None:
        """The agent says that the task may go on."""
        assert self.turnstile is not None
        self.turnstile.slot_back(n, cpus)

    def _make_dialler(self) -> TaskPipe:
        return self._pipe

    def _prepare(self) -> None:
        """No certificates."""

    def _fail(self, error: HerderError | None) -> None:
        super()._fail(error)
        assert self.turnstile is not None
        self.turnstile.close()

    def _moved(self, cpus: tuple[int, ...]) -> None:
        """The cores that came back are others than were given up."""
        if cpus == self._task.cpus:
            return
        self._task.cpus = cpus
        for thread in os.listdir("/proc/self/task"):
            try:
                os.sched_setaffinity(int(thread), cpus)
            except ProcessLookupError:
                continue


class TaskPipe(asyncio.Protocol):
    """In place of a `Dialler`: the private socket, and the link that stands on it while the agent has one."""

    def __init__(self, fd: int, incarnation: Incarnation, owner: TaskConnection) -> None:
        self.opening: Opened | None = None
        self._fd = fd
        self._incarnation = incarnation
        self._owner = owner
        self._frames = FrameDecoder(RELAY_FRAME_BYTES_MAX)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._gone: asyncio.Future[None] | None = None
        self._end: Relayed | None = None
        self._link: Link | None = None
        self._error: HerderError | None = None
        self._again: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Until the socket is closed.

        Raises:
            HerderError: the coordinator, or the agent, has ended it.
        """
        self._loop = asyncio.get_running_loop()
        self._gone = self._loop.create_future()
        sock = socket.socket(fileno=self._fd)
        await self._loop.create_unix_connection(lambda: self, sock=sock)
        await self._gone
        if self._error is not None:
            raise self._error

    async def close(self) -> None:
        """Send what waits, then close."""
        if self._again is not None:
            self._again.cancel()
        if self._transport is not None:
            self._transport.close()
        if self._gone is not None:
            await asyncio.wait([self._gone])

    # Any thread.

    def say_began(self) -> None:
        """The task waits."""
        self._say_later(WaitBegan())

    def say_ended(self, n: int) -> None:
        """It wants to go on."""
        self._say_later(WaitEnded(n))

    def _say_later(self, message: msgspec.Struct) -> None:
        if self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(self._say, message)
        except RuntimeError:
            pass  # the loop has ended, and `Turnstile.close` was or will be called

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio."""
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        self._greet()

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio."""
        del error
        self._transport = None
        self._lose(None)
        assert self._gone is not None
        if not self._gone.done():
            self._gone.set_result(None)

    def eof_received(self) -> bool:
        """asyncio."""
        self._error = self._error or Unreachable("the node's agent has ended this task's client")
        return False

    def data_received(self, data: bytes) -> None:
        """asyncio."""
        heard: list[Message] = []
        try:
            for body in self._frames.feed(data):
                message = decode_body(to_task, body)
                if isinstance(message, Heard):
                    heard.append(read_to_client(message.body))
                    continue
                self._pass_on(heard)
                self._take(message)
            self._pass_on(heard)
        except HerderError as error:
            self._give_up(error)

    # Inside.

    def _take(self, message: Opened | SlotBack | Closed | Refused) -> None:
        match message:
            case Opened():
                self._open(message)
            case SlotBack():
                self._owner.slot_back(message.n, message.cpus)
            case Closed():
                self._lose(Unreachable("the node's agent has no connection with the coordinator"))
            case Refused():
                error = error_of(message)
                if is_worth_another_try(error):
                    self._lose(error)
                    assert self._loop is not None
                    self._again = self._loop.call_later(BACKOFF_S_MAX / 5, self._greet)
                else:
                    self._give_up(error)

    def _pass_on(self, heard: list[Message]) -> None:
        if heard and self._link is not None:
            self._owner.received(self._link, list(heard))
        heard.clear()

    def _greet(self) -> None:
        self._say(TaskHello(self._incarnation, PROTOCOL_VERSION, __version__, PYTHON_TAG))

    def _open(self, opening: Opened) -> None:
        self._lose(None)
        self.opening = self.opening or opening
        welcome = opening.welcome
        end = Relayed(
            carry=lambda body: self._say(Said(body)),
            flushed=lambda: None,
            over=lambda reason, _refused: self._give_up(HerderError(reason)),
            waiting_bytes=self._waiting_bytes,
        )
        hello = Hello(PROTOCOL_VERSION, welcome.cluster, self._incarnation, __version__)
        self._end = end
        self._link = end.link(Peer("coordinator", "coordinator", welcome.cluster, ""), hello, welcome)
        self._owner.opened(self._link)

    def _lose(self, error: HerderError | None) -> None:
        link, self._link = self._link, None
        if link is None:
            return
        assert self._end is not None
        self._end.lose()
        self._owner.closed(link, error)

    def _give_up(self, error: HerderError) -> None:
        self._error = error
        if self._transport is not None:
            self._transport.close()

    def _say(self, message: msgspec.Struct) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode_frame(message))

    def _waiting_bytes(self) -> int:
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

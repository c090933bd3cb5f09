"""Frames between the agent and its templates and children, the agent's end (template/PROTOCOL.md).

A `Channel` never blocks: what the socket does not take waits in a bounded buffer. Descriptors come with the first
byte of their frame; `recvmsg` may return them together with earlier bytes but never with later ones, so they are
queued and each frame takes as many as its head announces.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import msgspec

from herder_agent.launch.poller import Poller
from herder_shared.errors import RemoteProtocolError
from herder_shared.limits import MIB
from herder_shared.wire.messages import AuditFinding

_HEADER = struct.Struct(">IQ")
_HEAD_BYTES_MAX = 1 * MIB
#: A result up to 64 KiB, or a pickled exception: the template side sends no larger body.
_BODY_BYTES_MAX = 64 * MIB
#: What may wait for a template or child that does not read: above it, it is broken.
_UNSENT_BYTES_MAX = 256 * MIB
_READ_BYTES = 128 * 1024
_ANCILLARY_BYTES = socket.CMSG_SPACE(253 * 4)


class _Head(msgspec.Struct, frozen=True, tag_field="t"):
    pass


class Step(_Head, frozen=True, tag="step"):
    step: str
    seconds: float = 0.0
    rss: int = 0
    threads: int = 1
    verdict: str = "safe"
    findings: tuple[AuditFinding, ...] = ()
    applied: tuple[str, ...] = ()


class Ready(_Head, frozen=True, tag="ready"):
    start: str = "fork"
    fork_point: str = ""
    reason: str = ""
    python: str = ""
    pid: int = 0
    start_s: float = 0.0
    rss: int = 0
    fork_cost_s: float | None = None
    private: int = 0
    shared: int = 0
    setup_mode: str = ""
    setup_s: float | None = None
    not_published: str = ""
    #: Setup's value comes along, as the descriptor of its memory file.
    value: bool = False
    immortal_objects: int = 0
    immortal_off: str = ""
    notes: tuple[str, ...] = ()


class Failed(_Head, frozen=True, tag="failed"):
    cause: str = "start_failed"
    message: str = ""
    traceback: str = ""


class Forked(_Head, frozen=True, tag="forked"):
    child: int
    pid: int
    fds: int = 4


class Branched(_Head, frozen=True, tag="branched"):
    template: int
    pid: int


class BranchFailed(_Head, frozen=True, tag="branch_failed"):
    template: int
    message: str = ""


class ForkFailed(_Head, frozen=True, tag="fork_failed"):
    child: int
    message: str = ""
    #: The fork went well, and the program could not be executed.
    exec: bool = False


class Exited(_Head, frozen=True, tag="exited"):
    child: int
    pid: int
    status: int
    utime: float = 0.0
    stime: float = 0.0
    minflt: int = 0
    majflt: int = 0
    nvcsw: int = 0
    nivcsw: int = 0
    inblock: int = 0
    oublock: int = 0


class Stuck(_Head, frozen=True, tag="stuck"):
    pids: tuple[int, ...]


class Done(msgspec.Struct, frozen=True):
    """A child that nobody was told of is over: how much of the body is its answer, its stdout and its stderr."""

    child: int
    pid: int
    status: int
    utime: float
    stime: float
    minflt: int
    majflt: int
    inblock: int
    oublock: int
    answer: int
    out: int
    err: int
    fds: int


class Stats(_Head, frozen=True, tag="stats"):
    rss: int = 0
    anon: int = 0
    threads: int = 1
    children: int = 0


class Log(_Head, frozen=True, tag="log"):
    level: str = "info"
    text: str = ""


class Idle(_Head, frozen=True, tag="idle"):
    python: str = ""
    #: "ran" or "mapped"; "" without setup.
    setup_from: str = ""
    setup_s: float | None = None


class Started(_Head, frozen=True, tag="started"):
    pass


class Client(_Head, frozen=True, tag="client"):
    """The task makes itself a client: our end of its private socket comes along."""


class Result(_Head, frozen=True, tag="result"):
    len: int = 0
    wall: float = 0.0
    utime: float = 0.0
    stime: float = 0.0
    minflt: int = 0
    majflt: int = 0
    blob: bool = False
    peak: int = 0
    inblock: int = 0
    oublock: int = 0
    last: bool = False


class Error(_Head, frozen=True, tag="error"):
    cause: str = "exception"
    type: str = ""
    message: str = ""
    traceback: str = ""
    retryable: bool = True
    pickled: int = -1
    wall: float = 0.0
    utime: float = 0.0
    stime: float = 0.0
    minflt: int = 0
    majflt: int = 0
    peak: int = 0
    inblock: int = 0
    oublock: int = 0
    last: bool = False


FromTemplate = (
    Step | Ready | Failed | Forked | Branched | BranchFailed | ForkFailed | Exited | Stuck | Done | Stats | Log
)
FromChild = Idle | Failed | Started | Client | Result | Error

#: The two heads that are packed, as there are so many of them: their first byte, then their fields.
_RESULT = struct.Struct(">BdddQQQQQ")
_DONE = struct.Struct(">BQIIddQQQQIIIB")
_RESULT_KIND, _DONE_KIND = 1, 2
_TemplateText = Step | Ready | Failed | Forked | Branched | BranchFailed | ForkFailed | Exited | Stuck | Stats | Log
_template_text: msgspec.json.Decoder[_TemplateText] = msgspec.json.Decoder(_TemplateText)
_child_text: msgspec.json.Decoder[FromChild] = msgspec.json.Decoder(FromChild)


def from_template(head: memoryview) -> FromTemplate:
    """What a template says. Raises RemoteProtocolError, MsgspecError."""
    if head and head[0] == _DONE_KIND:
        return Done(*_unpack(_DONE, head)[1:])
    return _template_text.decode(head)


def from_child(head: memoryview) -> FromChild:
    """What a child says. Raises RemoteProtocolError, MsgspecError."""
    if head and head[0] == _RESULT_KIND:
        _, wall, user_s, system_s, minor, major, read, written, peak = _unpack(_RESULT, head)
        return Result(0, wall, user_s, system_s, minor, major, False, peak, read, written)
    return _child_text.decode(head)


def said_in(content: memoryview) -> Iterator[tuple[FromChild, bytes]]:
    """The frames in what a child has sent, which is over: heads with their bodies. An unfinished one is left out.

    Raises:
        RemoteProtocolError, MsgspecError: that is not what a child says.
    """
    at = 0
    while len(content) - at >= _HEADER.size:
        head_bytes, body_bytes = _HEADER.unpack_from(content, at)
        middle = at + _HEADER.size + head_bytes
        end = middle + body_bytes
        if end > len(content):
            return
        yield from_child(content[at + _HEADER.size : middle]), bytes(content[middle:end])
        at = end


def _unpack(layout: struct.Struct, head: memoryview) -> tuple[Any, ...]:
    if len(head) != layout.size:
        raise RemoteProtocolError(f"a head of {len(head)} bytes instead of {layout.size}")
    return layout.unpack(head)


encode = msgspec.json.Encoder().encode

_T = TypeVar("_T")


def descriptors_of(head: object) -> int:
    """How many descriptors come with this frame."""
    if isinstance(head, Forked):
        return head.fds
    if isinstance(head, Ready):
        return int(head.value)
    if isinstance(head, Done):
        return head.fds
    if isinstance(head, Branched):
        return 2
    return int(isinstance(head, Client) or (isinstance(head, Result) and head.blob))


class Channel(Generic[_T]):
    """The agent's end of one control or task socket. Owns the socket, and descriptors that nobody has taken yet.

    `received(head, body, descriptors)` and `closed(error)` are called in the loop; after `close` neither is.
    """

    def __init__(  # noqa: PLR0917
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        decode: Callable[[memoryview], _T],
        received: Callable[[_T, bytes, list[int]], None],
        closed: Callable[[RemoteProtocolError | None], None],
        poller: Poller,
        is_watched: bool = True,
    ) -> None:
        sock.setblocking(False)
        self._loop = loop
        self._socket = sock
        self._fd = sock.fileno()
        self._decode = decode
        self._received = received
        self._closed = closed
        self._bytes = bytearray()
        self._descriptors: list[int] = []
        self._unsent: deque[tuple[memoryview, list[int]]] = deque()
        self._unsent_bytes = 0
        self._is_open = True
        self._is_resting = False
        self._is_watched = False
        self._poller = poller
        if is_watched:
            self.watch()

    def send(self, head: dict[str, object], parts: Sequence[bytes] = (), descriptors: Sequence[int] = ()) -> None:
        """Send one frame soon. `descriptors` are duplicated where the frame must wait; they stay the caller's."""
        if not self._is_open:
            return
        text = encode(head)
        frame = b"".join((_HEADER.pack(len(text), sum(map(len, parts))), text, *parts))
        if self._unsent:
            self._keep(memoryview(frame), [os.dup(fd) for fd in descriptors])
            return
        try:
            sent = self._write(frame, descriptors)
        except OSError as error:
            self._broken(error)
            return
        if sent < len(frame):
            rest = memoryview(frame)[sent:]
            self._keep(rest, [] if sent else [os.dup(fd) for fd in descriptors])
            self._loop.add_writer(self._fd, self._writable)

    def watch(self) -> None:
        """Read whenever there is something. Without it, only `drain` reads. Idempotent."""
        if self._is_open and not self._is_resting and not self._is_watched:
            self._is_watched = True
            self._poller.add(self._fd, self._readable)

    @property
    def is_resting(self) -> bool:
        """Whether `rest` was called."""
        return self._is_resting

    def rest(self) -> None:
        """Read no more, but in `drain`: the other end has said its last word, or will be heard of otherwise."""
        self._is_resting = True
        self._ignore()

    def drain(self) -> None:
        """Take all that has come, to the last word; to be called when the other end is known to be dead."""
        while self._is_open and not self._is_resting and self._readable():
            pass

    def close(self) -> None:
        """Close the socket. Idempotent."""
        if not self._is_open:
            return
        self._is_open = False
        self._ignore()
        if self._unsent:
            self._loop.remove_writer(self._fd)
        for _, fds in self._unsent:
            _close_all(fds)
        self._unsent.clear()
        _close_all(self._descriptors)
        self._descriptors = []
        self._socket.close()

    def _ignore(self) -> None:
        if self._is_watched:
            self._is_watched = False
            self._poller.remove(self._fd)

    def _write(self, data: bytes | memoryview, descriptors: Sequence[int]) -> int:
        try:
            if descriptors:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
                return self._socket.sendmsg([data], rights)
            return self._socket.send(data)
        except BlockingIOError:
            return 0

    def _keep(self, data: memoryview, descriptors: list[int]) -> None:
        self._unsent.append((data, descriptors))
        self._unsent_bytes += len(data)
        if self._unsent_bytes > _UNSENT_BYTES_MAX:
            self._end(RemoteProtocolError("it does not read what it is sent"))

    def _writable(self) -> None:
        while self._unsent:
            data, descriptors = self._unsent[0]
            try:
                sent = self._write(data, descriptors)
            except OSError as error:
                self._broken(error)
                return
            if not sent:
                return
            self._unsent_bytes -= sent
            _close_all(descriptors)
            if sent < len(data):
                self._unsent[0] = (data[sent:], [])
                return
            self._unsent.popleft()
        self._loop.remove_writer(self._fd)

    def _readable(self) -> bool:
        """Take what is there. False when there is nothing more."""
        try:
            data, ancillary, _, _ = self._socket.recvmsg(_READ_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data, ancillary = b"", []
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(content[: len(content) - len(content) % 4])
                self._descriptors.extend(fds)
        if not data:
            self._end(None)
            return False
        try:
            self._take(data)
        except (RemoteProtocolError, msgspec.MsgspecError) as error:
            self._end(RemoteProtocolError(f"it broke the protocol: {error}"))
        return self._is_open

    def _take(self, data: bytes) -> None:
        buffer: bytes | bytearray = data
        if self._bytes:
            self._bytes += data
            buffer = self._bytes
        at = 0
        size = len(buffer)
        while self._is_open and size - at >= _HEADER.size:
            head_bytes, body_bytes = _HEADER.unpack_from(buffer, at)
            if head_bytes > _HEAD_BYTES_MAX or body_bytes > _BODY_BYTES_MAX:
                raise RemoteProtocolError(f"a frame of {head_bytes} + {body_bytes} bytes")
            middle = at + _HEADER.size + head_bytes
            end = middle + body_bytes
            if end > size:
                break
            head = self._decode(memoryview(buffer)[at + _HEADER.size : middle])
            body = bytes(memoryview(buffer)[middle:end]) if body_bytes else b""
            at = end
            count = descriptors_of(head)
            if count > len(self._descriptors):
                raise RemoteProtocolError(f"{count} descriptors announced, {len(self._descriptors)} came")
            taken, self._descriptors = self._descriptors[:count], self._descriptors[count:]
            self._received(head, body, taken)
        self._bytes = bytearray(memoryview(buffer)[at:])

    def _broken(self, error: OSError) -> None:
        # What it has said before it ended still counts: the reader finds the end of the stream.
        if not isinstance(error, (BrokenPipeError, ConnectionResetError)):
            self._end(RemoteProtocolError(f"it cannot be written to: {error}"))

    def _end(self, error: RemoteProtocolError | None) -> None:
        if self._is_open:
            self.close()
            self._closed(error)


def _close_all(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        os.close(fd)

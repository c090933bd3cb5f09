"""Frames between agent, template and child (PROTOCOL.md, "Framing"): blocking, one thread, standard library only.

    u32 length of head · u64 length of body · head (JSON object) · body

Descriptors come with the first byte of their frame. A `recvmsg` may return them together with the bytes of frames that
stood before it, but never with bytes of a later one; so they are queued, and each frame takes its own from the queue.
"""

from __future__ import annotations

import _socket
import array
import json
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    import resource
    from collections.abc import Callable, Sequence
    from typing import Any

HEADER = struct.Struct(">IQ")
#: The head of a small result is packed, not JSON: kind (1); then `ACCOUNT` (seconds, counts,
#: bytes). Making it costs a child a fraction of the page faults of a JSON text.
RESULT = struct.Struct(">IQBdddQQQQQ")
ACCOUNT = ("wall", "utime", "stime", "minflt", "majflt", "inblock", "oublock", "peak")
RESULT_HEAD_BYTES = RESULT.size - HEADER.size
#: The head of `done`: kind (2); child, pid, status; user and system seconds, minor and major faults, blocks read and
#: written; bytes of answer, stdout and stderr in the body; descriptors that come along.
_DONE = struct.Struct(">IQBQIIddQQQQIIIB")
#: A head is a few hundred bytes; the longest carry paths and environments.
HEAD_BYTES_MAX = 1 << 20
#: Parts above 64 KiB travel as descriptors; only a pickled `setup` may be larger in a body.
BODY_BYTES_MAX = 1 << 30
#: First size of the receive buffer: one `recv` takes a small task whole.
BUFFER_BYTES = 64 * 1024
#: Descriptors that one frame may carry; the kernel's own bound is 253.
DESCRIPTORS_MAX = 250
ANCILLARY_BYTES = _socket.CMSG_SPACE(4 * 253)

_dumps = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
#: The C scanner itself: what `json.loads` puts around it, two regular expressions, costs a forked child 20 page faults.
_scan: Callable[[str, int], tuple[Any, int]] = vars(json.JSONDecoder())["scan_once"]


class BrokenFrame(Exception):
    """The peer sent what is no frame, or one beyond the bounds. The connection is of no use any more."""


class Channel:
    """One end of a control or task socket, which it owns."""

    def __init__(self, end: _socket.socket) -> None:
        self.socket = end
        self._buffer = bytearray(BUFFER_BYTES)
        self._start = 0
        self._end = 0
        self._descriptors: list[int] = []

    def receive(self) -> tuple[dict[str, Any], memoryview] | None:
        """The next frame, or None at the end of the connection. The body is valid until the next call."""
        while True:
            have = self._end - self._start
            needed = HEADER.size
            if have >= needed:
                head_bytes, body_bytes = HEADER.unpack_from(self._buffer, self._start)
                if head_bytes > HEAD_BYTES_MAX or body_bytes > BODY_BYTES_MAX:
                    raise BrokenFrame(f"a frame of {head_bytes} + {body_bytes} bytes")
                needed += head_bytes + body_bytes
                if have >= needed:
                    return self._take(head_bytes, body_bytes)
            if not self._fill(needed):
                return None

    def has_frame(self) -> bool:
        """Whether `receive` would return without reading."""
        have = self._end - self._start
        if have < HEADER.size:
            return False
        head_bytes, body_bytes = HEADER.unpack_from(self._buffer, self._start)
        return bool(have >= HEADER.size + head_bytes + body_bytes)

    def next_is(self, begins: bytes) -> bool:
        """Whether a whole frame waits whose head begins so."""
        if self._start == self._end or not self.has_frame():
            return False
        start = self._start + HEADER.size
        return self._buffer[start : start + len(begins)] == begins

    def take_descriptors(self, count: int) -> list[int]:
        """The descriptors of the frame just received, which now belong to the caller."""
        if count > len(self._descriptors):
            raise BrokenFrame(f"{count} descriptors announced, {len(self._descriptors)} came")
        taken, self._descriptors = self._descriptors[:count], self._descriptors[count:]
        return taken

    def send(self, head: dict[str, Any], body: bytes = b"", descriptors: Sequence[int] = ()) -> None:
        """Send one frame. The descriptors stay the caller's. Raises OSError when the peer is gone."""
        self.send_packed(pack(head, body), descriptors)

    def send_packed(self, frame: bytes, descriptors: Sequence[int] = ()) -> None:
        if not descriptors:
            self.socket.sendall(frame)
            return
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", descriptors))]
        sent = self.socket.sendmsg([frame], rights)
        if sent < len(frame):
            self.socket.sendall(memoryview(frame)[sent:])

    def close(self) -> None:
        self.socket.close()

    def _take(self, head_bytes: int, body_bytes: int) -> tuple[dict[str, Any], memoryview]:
        start = self._start + HEADER.size
        middle = start + head_bytes
        end = middle + body_bytes
        head = decode_head(self._buffer[start:middle])
        if end == self._end:
            self._start = self._end = 0
        else:
            self._start = end
        return head, memoryview(self._buffer)[middle:end]

    def _fill(self, needed: int) -> bool:
        """Read once, having made room for a frame of `needed` bytes. False at the end of the connection."""
        if self._start + needed > len(self._buffer):
            # A new buffer, never a resize: the body last returned may still be exported.
            room = bytearray(max(needed, BUFFER_BYTES))
            room[: self._end - self._start] = self._buffer[self._start : self._end]
            self._buffer, self._end, self._start = room, self._end - self._start, 0
        view = memoryview(self._buffer)[self._end :]
        try:
            count, ancillary, _, _ = self.socket.recvmsg_into([view], ANCILLARY_BYTES, _socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            return False
        for level, kind, content in ancillary:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                self._descriptors.extend(descriptors_in(content))
        self._end += count
        return count > 0


def descriptors_in(rights: bytes) -> array.array[int]:
    """The descriptors of an SCM_RIGHTS message."""
    fds = array.array("i")
    fds.frombytes(rights[: len(rights) - len(rights) % 4])
    return fds


def adopt(fd: int) -> Channel:
    """A channel over this descriptor of a connected stream socket."""
    return Channel(_socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fd))


def decode_head(content: bytes | bytearray) -> dict[str, Any]:
    """The JSON object of these bytes, or a packed result as one. Raises BrokenFrame."""
    if content[:1] == b"\1" and len(content) == RESULT_HEAD_BYTES:
        return {
            "t": "result",
            "blob": False,
            **dict(zip(ACCOUNT, RESULT.unpack(bytes(HEADER.size) + content)[3:], strict=True)),
        }
    try:
        head, end = _scan(content.decode(), 0)
    except (ValueError, StopIteration, RecursionError) as error:
        raise BrokenFrame("a head that is no JSON") from error
    if not isinstance(head, dict) or end == 0:
        raise BrokenFrame("a head that is no object")
    return head


def pack_done(  # noqa: PLR0917
    child: int, pid: int, status: int, usage: resource.struct_rusage, answer: bytes, out: bytes, err: bytes, fds: int
) -> bytes:
    """The frame that tells all of a child which is over."""
    body = answer + out + err if out or err else answer
    return (
        _DONE.pack(
            _DONE.size - HEADER.size,
            len(body),
            2,
            child,
            pid,
            status,
            usage[0],
            usage[1],
            usage[6],
            usage[7],
            usage[9],
            usage[10],
            len(answer),
            len(out),
            len(err),
            fds,
        )
        + body
    )


def pack_result(content: bytes, *account: float) -> bytes:
    """The frame of a result up to 64 KiB; `account` as in `RESULT`."""
    return RESULT.pack(RESULT_HEAD_BYTES, len(content), 1, *account) + content


def pack(head: dict[str, Any], body: bytes = b"") -> bytes:
    """One frame as bytes."""
    text = _dumps(head).encode()
    return HEADER.pack(len(text), len(body)) + text + body

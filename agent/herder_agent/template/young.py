"""Children that were forked with their task, while they are young.

A task of a few milliseconds is over before it is worth an introduction. So the agent is not told of such a child: it
gets its answer, its output and its exit in one frame when all is over (`done`). One that lives longer than `YOUNG_S`
is introduced like any other (`forked`), with its descriptors, and belongs to the agent from then on.

Theory of operation. After a fork every page that this process writes to must be copied or made its own again, at 1 to
4 µs a page, so what is done here per child is kept flat and short. The pipes of stdout and stderr stay with this
process and serve the next child: when a child and all that it left are gone (`serve` sees to it), nobody else holds
their ends, and what is in them is its output. They are given away with a child that grows old.
"""

from __future__ import annotations

import _socket
import fcntl
import gc
import os
import select
import termios
import time

from . import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    import resource
    from typing import Any

    from . import birth

    #: The head and the body of a `run`.
    Order = tuple[dict[str, Any], memoryview]
    #: Read end and write end of stdout's pipe, then of stderr's.
    Pipes = tuple[int, int, int, int]

#: Most tasks that are started this way are over by then.
YOUNG_S = 0.02
#: More than an answer of the largest inline result takes, and than a pipe holds.
_READ_BYTES = 1 << 17
#: Of a pipe that a task has made larger so much is read at most.
_OUTPUT_BYTES_MAX = 1 << 20
_FLAGS = _socket.MSG_DONTWAIT | _socket.MSG_CMSG_CLOEXEC
_NOTHING = bytes(4)


class Child:
    """A child that has not been reaped. `failure` is the pipe that tells why an exec failed, -1 when that is
    settled. `fds` are the agent's ends, as long as they are here. A young one has `near`, our end of its task socket,
    `pipes`, and the time until which it is young."""

    __slots__ = ("failure", "fds", "id", "message", "near", "pid", "pidfd", "pipes", "young_s")

    def __init__(self, id: int, pid: int, pidfd: int, fds: list[int], failure: int) -> None:  # noqa: A002
        self.id = id
        self.pid = pid
        self.pidfd = pidfd
        self.fds = fds
        self.failure = failure
        self.message = ""
        self.near: _socket.socket | None = None
        self.pipes: Pipes = (-1, -1, -1, -1)
        self.young_s = 0.0


class Nursery:
    """Forks the young, and lets go of them."""

    def __init__(
        self, births: birth.Births, poll: select.epoll, children: dict[int, Child], by_fd: dict[int, Child]
    ) -> None:
        self._births = births
        self._poll = poll
        self._children = children
        self._by_fd = by_fd
        self._pid = os.getpid()
        #: The oldest first.
        self.young: dict[int, Child] = {}
        self._free: list[Pipes] = []
        self._buffer = memoryview(bytearray(_READ_BYTES))

    def fork(self, orders: list[Order]) -> list[tuple[int, str]]:
        """Fork a child for each. Returns those that cannot be, and why."""
        way_of, fork, parent = self._births.way_of, os.fork, self._pid
        prepared: list[tuple[Order, _socket.socket, _socket.socket, Pipes]] = []
        refused: list[tuple[int, str]] = []
        for order in orders:
            try:
                pipes = self._free.pop() if self._free else _make_pipes()
                near, far = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
            except OSError as error:
                refused.append((order[0]["child"], error.strerror or "no descriptors"))
                continue
            prepared.append((order, near, far, pipes))
        forked: list[tuple[int, int, _socket.socket, Pipes]] = []
        # What this process has allocated since then would make a child's first allocation a collection.
        gc.freeze()
        for order, near, far, pipes in prepared:
            head = order[0]
            live = way_of(order)
            try:
                pid = fork()
            except OSError as error:
                near.close()
                far.close()
                self._free.append(pipes)
                refused.append((head["child"], error.strerror or "no processes"))
                continue
            if pid == 0:
                live(parent, (far, pipes[1], pipes[3]), order)
            # The last one who holds it closes it: left to itself it would do so with a warning, 20 pages dear.
            far.close()
            forked.append((head["child"], pid, near, pipes))
        young_s = time.monotonic() + YOUNG_S
        for id, pid, near, pipes in forked:  # noqa: A001
            pidfd = os.pidfd_open(pid)
            child = Child(id, pid, pidfd, [], -1)
            child.near, child.pipes, child.young_s = near, pipes, young_s
            self.young[id] = self._children[id] = self._by_fd[pidfd] = child
            self._poll.register(pidfd, select.EPOLLIN)
        return refused

    def wait_s(self) -> float:
        """Until the oldest is young no more; -1: there is none."""
        for child in self.young.values():
            return max(0.0, child.young_s - time.monotonic())
        return -1

    def release(self) -> list[Child]:
        """Those that are young no more: `fds` has the agent's ends."""
        now_s = time.monotonic()
        old: list[Child] = []
        for child in self.young.values():
            if child.young_s > now_s:
                break
            old.append(child)
        for child in old:
            del self.young[child.id]
            assert child.near is not None
            out, out_end, err, err_end = child.pipes
            child.fds = [child.near.detach(), out, err]
            child.near = None
            os.close(out_end)
            os.close(err_end)
        return old

    def has_ended(self, child: Child) -> None:
        """A young child has been reaped: it grows no older, however long its orphans take to die."""
        del self.young[child.id]

    def sum_up(
        self, child: Child, status: int, usage: resource.struct_rusage, has_left_orphans: bool
    ) -> tuple[bytes, list[int]]:
        """The frame that tells all of a young child which is over; and descriptors that go along."""
        assert child.near is not None
        answer, passed = self._said(child.near)
        child.near.close()
        out_fd, out_end, err_fd, err_end = child.pipes
        out, err = self._written(out_fd), self._written(err_fd)
        if has_left_orphans:
            for fd in child.pipes:
                os.close(fd)
        else:
            # The task may have made them nonblocking, for instance.
            fcntl.fcntl(out_end, fcntl.F_SETFL, os.O_WRONLY)
            fcntl.fcntl(err_end, fcntl.F_SETFL, os.O_WRONLY)
            self._free.append(child.pipes)
        return wire.pack_done(child.id, child.pid, status, usage, answer, out, err, len(passed)), passed

    def _said(self, end: _socket.socket) -> tuple[bytes, list[int]]:
        """What a process that is gone has sent. It never waits: who may yet hold the other end has nothing to say."""
        content = b""
        passed: list[int] = []
        while True:
            try:
                count, ancillary, _, _ = end.recvmsg_into([self._buffer], wire.ANCILLARY_BYTES, _FLAGS)
            except (BlockingIOError, ConnectionResetError):
                return content, passed
            for level, kind, rights in ancillary:
                if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                    passed.extend(wire.descriptors_in(rights))
            content += self._buffer[:count]
            # A message with descriptors ends a read early.
            if not count or (count < _READ_BYTES and not ancillary):
                return content, passed

    def _written(self, fd: int) -> bytes:
        """What is in a pipe now."""
        content = b""
        while fcntl.ioctl(fd, termios.FIONREAD, _NOTHING) != _NOTHING:
            count = os.readv(fd, [self._buffer])
            if len(content) < _OUTPUT_BYTES_MAX:
                content += self._buffer[:count]
        return content


def _make_pipes() -> Pipes:
    out = os.pipe2(os.O_CLOEXEC)
    try:
        return *out, *os.pipe2(os.O_CLOEXEC)
    except OSError:
        os.close(out[0])
        os.close(out[1])
        raise

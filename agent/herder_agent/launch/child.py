"""`Child`: one process for tasks, however it was made: its task socket, its captured output, its pidfd.

Descriptors: the template holds none of them; the child holds the other ends; `close` closes ours. Output is read
lazily: most tasks are over before anybody must read their pipes (64 KiB fit into one), so a reader is attached only
to children that run for longer, and each pipe is drained once more when the child answers or exits.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import deque
from typing import Literal

from herder_agent.launch.control import Channel, FromChild
from herder_shared.limits import LOG_HEAD_BYTES, LOG_TAIL_BYTES
from herder_shared.wire.messages import Logs

Kind = Literal["fork", "fresh", "command"]

_READ_BYTES = 64 * 1024


class Capture:
    """The read end of one output pipe: keeps the first `head_bytes` and the last `tail_bytes`, drops the middle."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fd: int,
        head_bytes: int = LOG_HEAD_BYTES,
        tail_bytes: int = LOG_TAIL_BYTES,
    ) -> None:
        os.set_blocking(fd, False)
        self._loop = loop
        self._fd = fd
        self._head_bytes = head_bytes
        self._tail_bytes = tail_bytes
        self._head = bytearray()
        self._tail: deque[bytes] = deque()
        self._tail_size = 0
        self._dropped = False
        self._is_attached = False

    def attach(self) -> None:
        """Read whenever there is something, so that the child is never held up."""
        if self._fd >= 0 and not self._is_attached:
            self._is_attached = True
            self._loop.add_reader(self._fd, self._read)

    def drain(self, rounds: int = 64) -> None:
        """Read what is there now; at most `rounds` × 64 KiB, as somebody may go on writing."""
        while rounds > 0 and self._read():
            rounds -= 1

    def take(self) -> tuple[bytes, bool]:
        """What was kept since the last call, and whether something was dropped."""
        if not self._head:
            return b"", False
        tail = b"".join(self._tail)
        dropped = self._dropped or len(tail) > self._tail_bytes
        kept = bytes(self._head) + tail[-self._tail_bytes :]
        self._head.clear()
        self._tail.clear()
        self._tail_size = 0
        self._dropped = False
        return kept, dropped

    @staticmethod
    def shorten(content: bytes) -> bytes:
        """The first and last bytes of `content` that a task's log keeps."""
        if len(content) <= LOG_HEAD_BYTES + LOG_TAIL_BYTES:
            return content
        return content[:LOG_HEAD_BYTES] + content[-LOG_TAIL_BYTES:]

    def close(self) -> None:
        """Close our end. Idempotent."""
        if self._fd >= 0:
            if self._is_attached:
                self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _read(self) -> bool:
        if self._fd < 0:
            return False
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self.close()
            return False
        self._keep(data)
        return True

    def _keep(self, data: bytes) -> None:
        room = self._head_bytes - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        if not data:
            return
        self._tail.append(data)
        self._tail_size += len(data)
        while self._tail_size - len(self._tail[0]) >= self._tail_bytes:
            self._tail_size -= len(self._tail.popleft())
            self._dropped = True


class Child:
    """A child that exists. `template` is the number of the template that made it and reaps it."""

    def __init__(self, number: int, pid: int, kind: Kind, template: int) -> None:
        self.number = number
        self.pid = pid
        self.kind = kind
        self.template = template
        self.channel: Channel[FromChild] | None = None
        self.stdout: Capture | None = None
        self.stderr: Capture | None = None
        self.pidfd = -1
        #: RssAnon that it has before its task: what it shares with its template.
        self.baseline_bytes = 0
        #: The function sent last, which it still has.
        self.function = ""
        #: Its last task's scratch folder, which is there only if the task asked for it.
        self.scratch = ""
        #: Its task is one that a fork may have spoiled: it is looked at whether it goes on.
        self.is_watched = kind == "fork"
        #: It runs more than one task.
        self.reuses = False
        #: It has said that it ends after this answer, whatever it could yet be given.
        self.ends = False

    def send_task(self, head: dict[str, object], parts: list[bytes], descriptors: list[int]) -> None:
        """Give it a task."""
        if self.channel is not None:
            self.channel.send(head, parts, descriptors)

    def stop(self) -> None:
        """Ask it to end; for one that has no task."""
        if self.channel is not None:
            self.channel.send({"t": "stop"})

    def attach(self) -> None:
        """Hear what it says, and read its output, as it comes."""
        if self.channel is not None:
            self.channel.watch()
        self.attach_output()

    def attach_output(self) -> None:
        """Read its output as it comes."""
        for capture in (self.stdout, self.stderr):
            if capture is not None:
                capture.attach()

    def drain_output(self) -> None:
        """Read what it has written until now."""
        for capture in (self.stdout, self.stderr):
            if capture is not None:
                capture.drain()

    def take_logs(self) -> Logs | None:
        """What it has written since the last call; None if nothing."""
        out, out_dropped = self.stdout.take() if self.stdout is not None else (b"", False)
        err, err_dropped = self.stderr.take() if self.stderr is not None else (b"", False)
        return Logs(out, err, out_dropped or err_dropped) if out or err else None

    def kill(self) -> None:
        """SIGKILL to the process itself, by its pidfd; for when its template is gone."""
        if self.pidfd >= 0:
            try:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def close(self) -> None:
        """Close all our ends. Idempotent."""
        if self.channel is not None:
            self.channel.close()
        for capture in (self.stdout, self.stderr):
            if capture is not None:
                capture.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

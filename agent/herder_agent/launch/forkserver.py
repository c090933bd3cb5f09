"""Templates: exec'd clean from the agent's main thread, spoken to over a control socket, reaped by pidfd.

Who holds what: the template has its end of the control socket as descriptor 3, `/dev/null` as stdin and a log file as
stdout and stderr. Everything else of the agent's is close-on-exec. EOF on the control socket ends a template; the
death of the agent does both. `exited` is called once, after all that the template said was taken and its process was
reaped.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from herder_agent.launch.control import Channel, FromTemplate, Ready, from_template
from herder_agent.launch.poller import Poller
from herder_shared.errors import RemoteProtocolError
from herder_shared.wire.messages import WorkloadSpec

_MAIN = Path(__file__).parent.parent / "template" / "main.py"
#: A template that was asked to end, or closed its socket, is killed after this.
_EXIT_LIMIT_S = 2.0
_LOG_TAIL_BYTES = 4096


def interpreter(python: str) -> list[str]:
    """The command line of an interpreter for our entry scripts."""
    return [python, "-P", "-X", "utf8"]


def open_log(log: Path) -> int:
    """A template's log file, emptied."""
    return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)


def open_head(
    spec: WorkloadSpec | None, *, cluster: str, node: str, cloudpickle_path: str, publish: bool = False
) -> dict[str, object]:
    """The `open` frame's head; its body is the pickled setup. `publish`: only run setup and hand over its value."""
    workload: dict[str, object] = {}
    setup = b""
    if spec is not None:
        setup = spec.setup or b""
        workload = {
            "key": spec.key,
            "name": spec.name,
            "kind": spec.kind,
            "start": spec.start,
            "preload": spec.preload,
            "setup_import": spec.setup_import,
            "setup_name": spec.setup_name,
            "paths": spec.paths,
            "working_dir": spec.working_dir,
            "max_tasks_per_child": spec.max_tasks_per_child,
            "max_tasks_given": spec.max_tasks_given,
            "allow_threads": spec.allow_threads,
            "blas_threads": spec.blas_threads,
            "immortal": spec.immortal,
        }
    return {
        "t": "open",
        "workload": workload,
        "spawner": spec is None,
        "publish": publish,
        "cluster": cluster,
        "node": node,
        "cloudpickle_path": cloudpickle_path,
        "setup_len": len(setup),
    }


class Template:
    """One running template or spawner."""

    def __init__(
        self,
        number: int,
        spec: WorkloadSpec | None,
        *,
        loop: asyncio.AbstractEventLoop,
        poller: Poller,
        received: Callable[[Template, FromTemplate, bytes, list[int]], None],
        exited: Callable[[Template, str], None],
    ) -> None:
        self.number = number
        self.spec = spec
        self.pid = 0
        self.is_stopping = False
        #: RssAnon of its idle children, and how many were made since it was measured.
        self.baseline_bytes = 0
        self.baseline_age = 0
        self._loop = loop
        self._poller = poller
        self._received = received
        self._exited = exited
        self._channel: Channel[FromTemplate] | None = None
        #: Orders given before it was ready to take them, with descriptors of our own.
        self._early: list[tuple[dict[str, object], list[int]]] = []
        self._is_ready = False
        self._pidfd = -1
        self._log = Path()
        self._said = ""
        self._kill_timer: asyncio.TimerHandle | None = None
        #: Another template's fork, which that one reaps.
        self._is_branch = False

    def start(self, environment: dict[str, str], log: Path, opening: dict[str, object]) -> None:
        """Exec it and tell it what to become. Takes about a millisecond of the main thread.

        Raises:
            OSError: the interpreter cannot be exec'd.
        """
        python = (self.spec.python if self.spec is not None else None) or sys.executable
        self._log = log
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            output = open_log(log)
            try:
                self.pid = os.posix_spawnp(
                    python,
                    [*interpreter(python), str(_MAIN), "3"],
                    environment,
                    file_actions=[
                        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                        (os.POSIX_SPAWN_DUP2, output, 1),
                        (os.POSIX_SPAWN_DUP2, output, 2),
                        (os.POSIX_SPAWN_DUP2, theirs.fileno(), 3),
                    ],
                    setsid=True,
                    setsigmask=[],
                    setsigdef=[signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM, signal.SIGINT],
                )
            finally:
                os.close(output)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._attend(ours, os.pidfd_open(self.pid), opening)

    def adopt(self, pid: int, end: int, pidfd: int, log: Path, opening: dict[str, object]) -> None:
        """Another template has forked it: take its control socket and its pidfd, and tell it what to become."""
        self.pid = pid
        self._log = log
        self._is_branch = True
        self._attend(socket.socket(fileno=end), pidfd, opening)

    def _attend(self, ours: socket.socket, pidfd: int, opening: dict[str, object]) -> None:
        self._pidfd = pidfd
        self._loop.add_reader(pidfd, self._ended)
        self._channel = Channel(self._loop, ours, from_template, self._took, self._closed, self._poller)
        setup = (self.spec.setup or b"") if self.spec is not None else b""
        self._channel.send(opening, [setup] if setup else [])

    def run(self, head: dict[str, object], parts: Sequence[bytes]) -> None:
        """Have it fork a child with its task; for one that is ready."""
        if self._channel is not None:
            self._channel.send(head, parts)

    def send(self, head: dict[str, object], descriptors: Sequence[int] = ()) -> None:
        """Give it an order; kept until it is ready. Does nothing when it is gone: `exited` tells."""
        if not self._is_ready:
            self._early.append((head, [os.dup(fd) for fd in descriptors]))
        elif self._channel is not None:
            self._channel.send(head, (), descriptors)

    @property
    def is_ready(self) -> bool:
        """It has been set up."""
        return self._is_ready

    def stop(self) -> None:
        """Ask it to end, with its children; it is killed if it does not."""
        self.is_stopping = True
        if self._channel is not None:
            self._channel.send({"t": "exit"})
        self._kill_later()

    def kill(self) -> None:
        """SIGKILL; its children die with it."""
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def log_tail(self) -> str:
        """The end of what it wrote to its stdout and stderr."""
        try:
            with self._log.open("rb") as file:
                file.seek(max(0, self._log.stat().st_size - _LOG_TAIL_BYTES))
                return file.read().decode("utf-8", "replace").strip()
        except OSError:
            return ""

    def _took(self, head: FromTemplate, body: bytes, descriptors: list[int]) -> None:
        if isinstance(head, Ready):
            self._is_ready = True
            self._send_early()
        self._received(self, head, body, descriptors)

    def _send_early(self) -> None:
        early, self._early = self._early, []
        for head, descriptors in early:
            if self._channel is not None:
                self._channel.send(head, (), descriptors)
            for fd in descriptors:
                os.close(fd)

    def _closed(self, error: RemoteProtocolError | None) -> None:
        if error is not None:
            self._said = str(error)
            self.kill()
        self._kill_later()

    def _kill_later(self) -> None:
        if self._kill_timer is None and self._pidfd >= 0:
            self._kill_timer = self._loop.call_later(_EXIT_LIMIT_S, self.kill)

    def _ended(self) -> None:
        """The pidfd is readable: the process is a zombie."""
        if self._channel is not None:
            self._channel.drain()
            self._channel.close()
        self._send_early()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        if self._kill_timer is not None:
            self._kill_timer.cancel()
        how = "a fork of another template, which may have ended" if self._is_branch else self._reap()
        self._exited(self, self._said or f"the template ended ({how}). {self.log_tail()}".strip())

    def _reap(self) -> str:
        try:
            _, status = os.waitpid(self.pid, 0)
        except ChildProcessError:
            return "reaped when all of the agent's processes were ended at once"
        number = status & 0x7F
        return f"killed by {signal.Signals(number).name}" if number else f"exit status {status >> 8 & 0xFF}"

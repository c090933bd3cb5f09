"""LocalCluster: a whole cluster on this machine: a coordinator and agents as processes of their own, real TLS, nothing
to configure.

Each process holds the read end of one pipe, its *lifeline*, whose only write end is ours: however this process ends,
the pipe closes, and they end and leave nothing behind. Each says on another pipe, once, that it is ready and where
(`hello`). They are sessions of their own, so that Ctrl-C at the terminal reaches the client alone, which then cancels
what it submitted.
"""

from __future__ import annotations

import atexit
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from herder.client import Client
from herder.options import size_bytes
from herder_shared import tls
from herder_shared.config import Profile, create_profile, save_profile
from herder_shared.errors import HerderError, Unreachable

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
_LOG_TAIL_BYTES = 4096


class Hello(msgspec.Struct, frozen=True):
    """What a program says on its hello pipe when it is ready."""

    pid: int
    address: str = ""
    http: str = ""
    epoch: int = 0
    cluster: str = ""
    node: str = ""


@dataclass(eq=False)
class Process:
    """One of a local cluster's processes. Part of the surface for tests: kill it, and see what happens."""

    name: str
    arguments: tuple[str, ...]
    log: Path
    popen: subprocess.Popen[bytes]
    #: Our end: the write end of its lifeline. Closed by `stop`, or by the kernel when we die.
    lifeline_fd: int
    #: Our end: the read end of its hello pipe, until it has said hello.
    hello_fd: int | None
    hello: Hello | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.popen.pid

    def log_tail(self) -> str:
        """The last lines that it wrote."""
        try:
            content = self.log.read_bytes()
        except FileNotFoundError:
            return ""
        return content[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()


class LocalCluster:
    """A coordinator and `agents` agents on this machine, from construction until `close`.

    Args:
        cores: slots in all, split over the agents; may exceed the machine's (then tasks are not pinned). None: the
        CPUs that
            this process may use.
        agents: how many; each counts as a node.
        memory: what tasks may use in all, as bytes or "4GiB"; None: the machine's.
        state_dir: where keys, journal and logs are kept, and found again by a later cluster; None: a private folder
        that
            `close` removes.

    Raises:
        HerderError: one of the processes did not come up; the message has the end of its log.
    """

    def __init__(
        self,
        cores: int | None = None,
        *,
        agents: int = 1,
        memory: int | str | None = None,
        state_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        cpus = sorted(os.sched_getaffinity(0))
        total = len(cpus) if cores is None else cores
        _check_counts(total, agents)
        self._memory_bytes = None if memory is None else size_bytes("memory", memory)
        self._clients: weakref.WeakSet[Client] = weakref.WeakSet()
        self._processes: dict[str, Process] = {}
        self._is_temporary = state_dir is None
        self._pid = os.getpid()
        self._is_closed = False
        self.state_dir = Path(tempfile.mkdtemp(prefix="herder-")) if state_dir is None else Path(state_dir).absolute()
        _clusters.add(self)
        atexit.register(self.close)
        try:
            self._profile = self._make_profile()
            self._start_coordinator("127.0.0.1:0", "127.0.0.1:0")
            self._start_agents(_split(total, agents, cpus))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else f"{len(self._processes) - 1} agents"
        return f"<herder.LocalCluster at {self.address}: {state}>"

    @property
    def address(self) -> str:
        """Of the coordinator: "127.0.0.1:port"."""
        return self._profile.addresses[0] if self._profile.addresses else ""

    @property
    def http(self) -> str:
        """Of its page and metrics: "http://127.0.0.1:port"."""
        return self._profile.http

    @property
    def profile(self) -> Profile:
        """With which other programs reach it: `HERDER_PROFILES=<profile.folder.parent>
        HERDER_PROFILE=<profile.name>`."""
        return self._profile

    @property
    def environ(self) -> dict[str, str]:
        """Variables that make the command line, and `herder.Client()` in another program, use this cluster."""
        return {"HERDER_PROFILES": str(self._profile.folder.parent), "HERDER_PROFILE": self._profile.name}

    @property
    def processes(self) -> Mapping[str, Process]:
        """For tests: "coordinator" and the agents by their node's name."""
        return self._processes

    def client(self, **options: Any) -> Client:
        """A client of this cluster, with these options as defaults. `close` ends it, if nobody did before."""
        client = Client(profile=self._profile, **options)
        self._clients.add(client)
        return client

    def close(self) -> None:
        """End everything; what has not ended is cancelled. May be called again."""
        if self._is_closed or os.getpid() != self._pid:
            return
        self._is_closed = True
        atexit.unregister(self.close)
        for client in list(self._clients):
            client.abort()
        running = list(self._processes.values())
        for process in reversed(running):
            _release(process)
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        for process in reversed(running):
            try:
                process.popen.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.popen.kill()
                process.popen.wait()
        if self._is_temporary:
            shutil.rmtree(self.state_dir, ignore_errors=True)

    def restart(self, name: str) -> Process:
        """For tests: start "coordinator" or an agent again with the same arguments, after it was killed. It must be
        dead."""
        old = self._processes[name]
        old.popen.wait(STOP_TIMEOUT_S)
        _release(old)
        process = self._spawn(name, old.arguments)
        self._await_hello(process)
        return process

    # --- inside -------------------------------------------------------------------------------------------------------

    def _make_profile(self) -> Profile:
        self.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        profiles = self.state_dir / "profiles"
        if (profiles / "local" / "profile.toml").exists():
            from herder_shared.config import load_profile

            return load_profile("local", environ={"HERDER_PROFILES": str(profiles)})
        return create_profile("local", environ={"HERDER_PROFILES": str(profiles)})

    def _start_coordinator(self, listen: str, http_listen: str) -> None:
        process = self._spawn("coordinator", self._coordinator_arguments(listen, http_listen))
        hello = self._await_hello(process)
        # From now on a restarted coordinator must be where agents and clients look for it.
        process.arguments = self._coordinator_arguments(hello.address, hello.http.removeprefix("http://"))
        http = hello.http if hello.http.startswith("http") else f"http://{hello.http}"
        self._profile = msgspec.structs.replace(self._profile, addresses=(hello.address,), http=http)
        save_profile(self._profile)

    def _coordinator_arguments(self, listen: str, http_listen: str) -> tuple[str, ...]:
        return (
            "-m",
            "herder_coordinator",
            *("--identity", str(self._profile.coordinator)),
            *("--state-dir", str(self.state_dir / "coordinator")),
            *("--listen", listen),
            *("--http-listen", http_listen),
        )

    def _start_agents(self, shares: list[tuple[int, tuple[int, ...] | None]]) -> None:
        """Start all agents at once, then wait for all of them."""
        width = len(str(len(shares)))
        for n, (cores, cpus) in enumerate(shares, start=1):
            node = f"local-{n:0{width}d}"
            identity = self.state_dir / "agents" / node / "identity"
            if not identity.exists():
                tls.issue(self._profile.authority, identity, "agent", node)
            arguments = [
                "-m",
                "herder_agent",
                *("--identity", str(identity)),
                *("--state-dir", str(identity.parent / "state")),
                *("--coordinator", self.address),
                *("--node", node),
                *("--cores", str(cores)),
            ]
            arguments += ["--no-pin"] if cpus is None else ["--cpus", ",".join(map(str, cpus))]
            if self._memory_bytes is not None:
                arguments += ["--memory", str(self._memory_bytes // len(shares))]
            self._spawn(node, tuple(arguments))
        for name, process in self._processes.items():
            if name != "coordinator":
                self._await_hello(process)

    def _spawn(self, name: str, arguments: tuple[str, ...]) -> Process:
        log = self.state_dir / "logs" / f"{name}.log"
        log.parent.mkdir(mode=0o700, exist_ok=True)
        hello_read, hello_write = os.pipe()
        lifeline_read, lifeline_write = os.pipe()
        try:
            with log.open("ab") as output:
                popen = subprocess.Popen(
                    (sys.executable, *arguments, "--hello-fd", str(hello_write), "--lifeline-fd", str(lifeline_read)),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(hello_write, lifeline_read),
                    start_new_session=True,
                    cwd="/",
                )
        except BaseException:
            os.close(hello_read)
            os.close(lifeline_write)
            raise
        finally:
            # The child's ends.
            os.close(hello_write)
            os.close(lifeline_read)
        process = Process(name, arguments, log, popen, lifeline_write, hello_read)
        self._processes[name] = process
        return process

    def _await_hello(self, process: Process) -> Hello:
        """Wait until it says that it is ready.

        Raises:
            HerderError: it ended, or said nothing in time.
        """
        assert process.hello_fd is not None
        deadline_s = time.monotonic() + START_TIMEOUT_S
        line = b""
        try:
            while not line.endswith(b"\n"):
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or not select.select([process.hello_fd], [], [], left_s)[0]:
                    raise Unreachable(
                        f"the {process.name} of the local cluster said nothing in {START_TIMEOUT_S:g} s; end of its "
                        f"log ({process.log}):\n{process.log_tail()}"
                    )
                chunk = os.read(process.hello_fd, 65536)
                if not chunk:
                    status = process.popen.wait(STOP_TIMEOUT_S)
                    raise HerderError(
                        f"the {process.name} of the local cluster ended with status {status} before it was ready; "
                        f"end of its log:\n{process.log_tail()}"
                    )
                line += chunk
        finally:
            os.close(process.hello_fd)
            process.hello_fd = None
        process.hello = msgspec.json.decode(line, type=Hello)
        return process.hello


_clusters: weakref.WeakSet[LocalCluster] = weakref.WeakSet()


def _release_in_child() -> None:
    """A fork of this process must not keep the lifelines open."""
    for cluster in list(_clusters):
        for process in cluster.processes.values():
            _release(process)


os.register_at_fork(after_in_child=_release_in_child)


def _release(process: Process) -> None:
    """Let go of its lifeline: it ends at once."""
    if process.lifeline_fd >= 0:
        os.close(process.lifeline_fd)
        process.lifeline_fd = -1
    if process.hello_fd is not None:
        os.close(process.hello_fd)
        process.hello_fd = None


def _check_counts(cores: int, agents: int) -> None:
    for name, value in (("cores", cores), ("agents", agents)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be a whole number, not {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if agents > cores:
        raise ValueError(f"{agents} agents need at least as many cores, not {cores}")


def _split(cores: int, agents: int, cpus: list[int]) -> list[tuple[int, tuple[int, ...] | None]]:
    """Each agent's cores, and its CPUs, disjoint; None for the CPUs when there are not enough to pin."""
    base, extra = divmod(cores, agents)
    shares: list[tuple[int, tuple[int, ...] | None]] = []
    taken = 0
    for n in range(agents):
        count = base + (n < extra)
        shares.append((count, tuple(cpus[taken : taken + count]) if cores <= len(cpus) else None))
        taken += count
    return shares

"""A coordinator in miniature for tests of a real agent process: it gives orders and keeps what the agent reports.

It runs its own event loop, only while a test waits: everything is called from the test's thread.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
import msgspec

from herder_shared import tls
from herder_shared.errors import HerderError
from herder_shared.ids import AttemptId, BlobId, ClusterId, JobId, WorkloadKey, blob_id
from herder_shared.limits import BLOB_CHUNK_BYTES
from herder_shared.wire.messages import (
    AckAttempts,
    AttemptEnd,
    AttemptsEnded,
    AttemptsStarted,
    AttemptStart,
    BlobStored,
    CancelAttempts,
    CommandSpec,
    Function,
    Heartbeat,
    HeartbeatAck,
    Hello,
    JobBrief,
    Message,
    Metrics,
    Payload,
    PullMetrics,
    PutBlob,
    Refused,
    StartAttempts,
    Stop,
    Sync,
    SyncOk,
    TaskOptions,
    WantBlob,
    Welcome,
    WorkloadReport,
    WorkloadSpec,
    WorkloadsReported,
)
from herder_shared.wire.session import Peer
from herder_shared.wire.stream import Acceptor, Link

CLUSTER = ClusterId("c" * 32)
#: Generous: the machines that run tests are small and busy.
WAIT_S = 60.0


class Coordinator:
    """The fake. `ends` are what the agent reported, by attempt; acknowledged unless `acknowledges` is off."""

    def __init__(self, authority: Path, identity: Path) -> None:
        self.authority = authority
        self.loop = asyncio.new_event_loop()
        self.epoch = 1
        self.acknowledges = True
        self.link: Link | None = None
        self.hello: Hello | None = None
        self.syncs: list[Sync] = []
        self.started: set[AttemptId] = set()
        self.ends: dict[AttemptId, AttemptEnd] = {}
        self.end_count = 0
        self.reports: dict[WorkloadKey, WorkloadReport] = {}
        self.heartbeats: list[Heartbeat] = []
        self.expositions: list[Metrics] = []
        self.blobs: dict[BlobId, bytes] = {}
        self.sessions = 0
        self._last = 0
        self._known: set[object] = set()
        self._parts: dict[BlobId, bytearray] = {}
        self._acceptor = Acceptor(
            context=tls.server_context(identity), cluster=CLUSTER, welcome=self._welcome, observer=self
        )
        self.address = self.loop.run_until_complete(self._acceptor.listen("127.0.0.1", 0))

    # What a test orders.

    def start(
        self,
        function: Callable[..., Any],
        *args: Any,
        workload: WorkloadSpec | None = None,
        options: TaskOptions | None = None,
        start: str = "",
        as_blob: bool = False,
    ) -> AttemptId:
        """Order one attempt of a function."""
        content = cloudpickle.dumps(function, protocol=5)
        known = Function(blob_id(content), content)
        arguments = pickle.dumps((args, {}), 5)
        payload = Payload(arguments, None, len(arguments))
        if as_blob:
            blob = blob_id(arguments)
            self.blobs[blob] = arguments
            payload = Payload(b"", blob, len(arguments))
        spec = workload or WorkloadSpec(WorkloadKey("w" * 16))
        return self._order(spec, options or TaskOptions(), known, payload, start)

    def run(self, command: CommandSpec, options: TaskOptions | None = None) -> AttemptId:
        """Order one attempt of a command."""
        content = msgspec.msgpack.encode(command)
        spec = WorkloadSpec(WorkloadKey("c" * 16), kind="command")
        return self._order(spec, options or TaskOptions(), None, Payload(content, None, len(content)), "")

    def _order(
        self, spec: WorkloadSpec, options: TaskOptions, function: Function | None, args: Payload, start: str
    ) -> AttemptId:
        assert self.link is not None
        self._last += 1
        attempt = AttemptId(self.epoch, self._last)
        job = JobId(f"{self._last:016x}")
        order = AttemptStart(attempt, job, 0, 1, function.id if function else None, args, (), start)
        brief = JobBrief(job, "test", spec.key, options)
        functions = (function,) if function is not None and function.id not in self._known else ()
        workloads = (spec,) if spec.key not in self._known else ()
        self._known |= {f.id for f in functions} | {w.key for w in workloads}
        self.link.send(StartAttempts(self.link.session, (order,), workloads, (brief,), functions))
        return attempt

    def cancel(self, *attempts: AttemptId, grace_s: float = 2.0) -> None:
        """Order the end of attempts."""
        self.send(CancelAttempts(attempts, grace_s))

    def send(self, message: Message) -> None:
        """Send any order."""
        assert self.link is not None
        self.link.send(message)

    # What a test waits for.

    def wait(self, condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
        """Run until `condition` holds; it is looked at whenever something has come, and every few milliseconds."""

        async def until() -> None:
            async with asyncio.timeout(timeout_s):
                while not condition():  # noqa: ASYNC110 - conditions are about processes and files too
                    await asyncio.sleep(0.002)

        self.loop.run_until_complete(until())

    def end_of(self, attempt: AttemptId, timeout_s: float = WAIT_S) -> AttemptEnd:
        """Wait for an attempt's end."""
        self.wait(lambda: attempt in self.ends, timeout_s)
        return self.ends[attempt]

    def value_of(self, attempt: AttemptId) -> Any:
        """Wait for an attempt's end, and unpickle its result."""
        end = self.end_of(attempt)
        assert end.result is not None, end
        blob = end.result.blob
        return pickle.loads(end.result.inline if blob is None else self.blobs[blob])

    def wait_linked(self) -> None:
        """Wait until an agent has connected and synced."""
        self.wait(lambda: self.link is not None and len(self.syncs) == self.sessions)

    def fault(self) -> str:
        """What the agent says is wrong with its node, in its last heartbeat."""
        report = self.heartbeats[-1].report if self.heartbeats else None
        return report.fault if report is not None else ""

    def close(self) -> None:
        """End the link and the loop."""
        self.loop.run_until_complete(self._acceptor.close())
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()

    # What the link says.

    def _welcome(self, hello: Hello, peer: Peer) -> Welcome | Refused:
        self.hello = hello
        self.sessions += 1
        return Welcome(CLUSTER, self.epoch, self.sessions, heartbeat_s=0.2, lease_s=30.0)

    def opened(self, link: Link) -> None:
        self.link = link
        self._known.clear()

    def closed(self, link: Link, error: HerderError | None) -> None:
        if self.link is link:
            self.link = None

    def received(self, link: Link, messages: list[Message]) -> None:
        for message in messages:
            self._take(link, message)

    def _take(self, link: Link, message: Message) -> None:
        match message:
            case Heartbeat():
                self.heartbeats.append(message)
                link.send(HeartbeatAck(message.n))
            case Sync():
                self.syncs.append(message)
                link.send(SyncOk(link.session))
                self._ended(link, message.ended)
            case AttemptsStarted():
                self.started.update(message.attempts)
            case AttemptsEnded():
                self._ended(link, message.ends)
            case WorkloadsReported():
                self.reports.update({report.key: report for report in message.reports})
            case Metrics():
                self.expositions.append(message)
            case WantBlob():
                content = self.blobs[message.id]
                for offset in range(message.offset, len(content), BLOB_CHUNK_BYTES):
                    data = content[offset : offset + BLOB_CHUNK_BYTES]
                    link.send(PutBlob(message.id, offset, len(content), data))
            case PutBlob():
                part = self._parts.setdefault(message.id, bytearray())
                assert message.offset == len(part)
                part += message.data
                link.send(BlobStored(message.id, len(part)))
                if len(part) == message.total:
                    self.blobs[message.id] = bytes(self._parts.pop(message.id))
            case BlobStored():
                pass
            case _:
                raise AssertionError(message)

    def _ended(self, link: Link, ends: tuple[AttemptEnd, ...]) -> None:
        self.end_count += len(ends)
        self.ends.update({end.attempt: end for end in ends})
        if self.acknowledges and ends:
            link.send(AckAttempts(tuple(end.attempt for end in ends)))

    def pull_metrics(self) -> str:
        """The agent's exposition."""
        self.send(PullMetrics(1))
        before = len(self.expositions)
        self.wait(lambda: len(self.expositions) > before)
        return self.expositions[-1].text.decode()


class AgentProcess:
    """A real agent."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, state_dir: Path) -> None:
        self.process = process
        self.log = log
        self.state_dir = state_dir

    @property
    def pid(self) -> int:
        return self.process.pid


def start_agent(
    coordinator: Coordinator, folder: Path, cores: int = 2, *flags: str, under: Sequence[str] = ()
) -> AgentProcess:
    """Start a real agent process; its folders are below `folder`. `under`: the program that execs it."""
    identity = folder / "agent"
    if not identity.exists():
        tls.issue(coordinator.authority, identity, "agent", "n1")
    log = folder / "agent.log"
    host, port = coordinator.address
    command = [
        *under,
        sys.executable,
        "-m",
        "herder_agent",
        "--identity",
        str(identity),
        "--state-dir",
        str(folder / "state"),
    ]
    command += ["--coordinator", f"{host}:{port}", "--node", "n1", "--cores", str(cores), "--no-pin", *flags]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=dict(os.environ)
        )
    return AgentProcess(process, log, folder / "state")


@contextmanager
def running(
    folder: Path, cores: int = 2, *flags: str, under: Sequence[str] = ()
) -> Iterator[tuple[Coordinator, AgentProcess]]:
    """A coordinator and its agent, linked. Both are gone afterwards; the agent's end must be in good order."""
    tls.create_authority(folder / "authority", CLUSTER)
    tls.issue(folder / "authority", folder / "coordinator", "coordinator", "coordinator")
    coordinator = Coordinator(folder / "authority", folder / "coordinator")
    agent = start_agent(coordinator, folder, cores, *flags, under=under)
    try:
        coordinator.wait_linked()
        yield coordinator, agent
        if agent.process.poll() is None:
            if coordinator.link is not None:
                coordinator.send(Stop("the test is over"))
                coordinator.wait(lambda: agent.process.poll() is not None, 60.0)
            else:
                agent.process.terminate()
            assert agent.process.wait(60.0) == 0, agent.log.read_text()
    finally:
        agent.process.kill()
        agent.process.wait()
        coordinator.close()

"""Coordinators for tests, in this loop or as processes; and clients and agents that speak real messages to them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from herder_coordinator.core.records import Record
from herder_coordinator.journal.interface import JournalError
from herder_coordinator.server.server import Server
from herder_shared.config import CoordinatorConfig
from herder_shared.ids import AttemptId, BlobId, ClusterId, Incarnation, JobId, NodeName, WorkloadKey, blob_id
from herder_shared.limits import GIB, PROTOCOL_VERSION
from herder_shared.states import Outcome
from herder_shared.wire import messages as m
from herder_shared.wire.stream import Link
from support.links import CLUSTER, Authority, Client, running

JOB = JobId("0123456789abcdef")
FUNCTION = m.Function(blob_id(b"a pickled function"), b"a pickled function")

_M = TypeVar("_M", bound=m.Message)


class MemoryJournal:
    """A journal without a disk. `hold` keeps batches from becoming durable until `commit` (or for ever)."""

    def __init__(self, cluster: ClusterId = CLUSTER, records: Sequence[Record] = (), epoch: int = 1) -> None:
        self.cluster = cluster
        self.epoch = epoch
        self.records: list[Record] = list(records)
        self.hold = False
        self.is_closed = False
        self.size_bytes = 0
        self.shortage = ""
        self._queued: list[tuple[Sequence[Record], Callable[[float], None]]] = []
        self._on_failure: Callable[[JournalError], None] | None = None

    def replay(self) -> Iterator[Record]:
        yield from self.records

    def begin(self, snapshot: Iterable[Record]) -> None:
        self.records = list(snapshot)

    def append(self, records: Sequence[Record], durable: Callable[[float], None]) -> None:
        self._queued.append((records, durable))
        if not self.hold:
            self.commit()

    def commit(self) -> None:
        queued, self._queued = self._queued, []
        for records, durable in queued:
            self.records += records
            durable(0.001)

    def fail(self, error: JournalError) -> None:
        assert self._on_failure is not None
        self._on_failure(error)

    def on_failure(self, callback: Callable[[JournalError], None]) -> None:
        self._on_failure = callback

    def close(self) -> None:
        self.is_closed = True


class Running:
    """A coordinator in this loop."""

    def __init__(self, server: Server, journal: MemoryJournal, ending: asyncio.Task[None]) -> None:
        self.server = server
        self.journal = journal
        self.ending = ending

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.server.address.rpartition(":")
        return host, int(port)

    @property
    def url(self) -> str:
        return f"http://{self.server.http.address}"


@contextlib.asynccontextmanager
async def coordinating(
    authority: Authority, folder: Path, journal: MemoryJournal | None = None, **options: Any
) -> AsyncIterator[Running]:
    """A coordinator in this loop, ended on leaving; an error with which it ended by itself is for the test to take."""
    journal = journal or MemoryJournal()
    server = Server(config_for(authority, folder, **options), lambda _folder, _cluster: journal)
    ready = asyncio.Event()
    ending = asyncio.ensure_future(server.run(lambda _: ready.set()))
    up = asyncio.ensure_future(ready.wait())
    await asyncio.wait([ending, up], return_when=asyncio.FIRST_COMPLETED)
    up.cancel()
    if ending.done():
        ending.result()
    try:
        yield Running(server, journal, ending)
    finally:
        server.end("the test is over")
        await asyncio.wait([ending])
    ending.result()


def config_for(authority: Authority, folder: Path, **options: Any) -> CoordinatorConfig:
    options.setdefault("listen", "127.0.0.1:0")
    options.setdefault("http_listen", "127.0.0.1:0")
    state_dir = folder / "state"
    state_dir.mkdir(mode=0o700, exist_ok=True)
    return CoordinatorConfig(identity=authority.identity("coordinator", "coordinator"), state_dir=state_dir, **options)


# --- peers -----------------------------------------------------------------------------------------------------------


class Peer:
    """A client or agent: a link of its own, and what came over it."""

    def __init__(self, client: Client, link: Link) -> None:
        self.client = client
        self.link = link
        #: How far the messages were looked through, by kind.
        self._read: dict[type, int] = {}

    @property
    def messages(self) -> list[m.Message]:
        return self.client.observer.messages

    def send(self, *messages: m.Message) -> None:
        for message in messages:
            self.link.send(message)

    async def next(self, kind: type[_M]) -> _M:
        """The next message of this kind, in order; others stay for those who ask for them."""
        found: list[_M] = []

        def seen() -> bool:
            while not found and self._read.setdefault(kind, 0) < len(self.messages):
                message = self.messages[self._read[kind]]
                self._read[kind] += 1
                if isinstance(message, kind):
                    found.append(cast("_M", message))
            return bool(found)

        await self.client.observer.until(seen)
        return found[0]

    async def ask(self, number: int, what: Any, job: JobId | None = None, index: int | None = None) -> m.Answer:
        self.send(m.Query(number, what, job, index))
        return await self.next(m.Answer)


@contextlib.asynccontextmanager
async def client_of(
    authority: Authority,
    address: tuple[str, int],
    incarnation: str = "c" * 16,
    role: m.Role = "client",
) -> AsyncIterator[Peer]:
    hello = m.Hello(PROTOCOL_VERSION, CLUSTER, Incarnation(incarnation), owner="ann")
    async with running(Client(authority.identity(role, "ann"), address, hello=hello)) as client:
        yield Peer(client, await client.observer.link())


@contextlib.asynccontextmanager
async def agent_of(
    authority: Authority,
    address: tuple[str, int],
    *,
    node: str = "n1",
    cores: int = 2,
    incarnation: str = "a" * 16,
    sync: m.Sync | None = None,
) -> AsyncIterator[Peer]:
    facts = m.NodeFacts(NodeName(node), cores, GIB)
    hello = m.Hello(PROTOCOL_VERSION, CLUSTER, Incarnation(incarnation), node=facts)
    async with running(Client(authority.identity("agent", node), address, hello=hello)) as client:
        agent = Peer(client, await client.observer.link())
        agent.send(sync or m.Sync())
        yield agent


def job_spec(job: JobId = JOB, **changes: Any) -> m.JobSpec:
    workload = m.WorkloadSpec(WorkloadKey("feedfeedfeedfeed"), name=changes.pop("workload_name", "sums"))
    return m.JobSpec(job, "a job", workload, **changes)


def tasks(*args: bytes) -> tuple[m.TaskItem, ...]:
    return tuple(m.TaskItem(m.Payload(inline=content)) for content in args)


def submission(count: int, job: JobId = JOB, first: int = 0) -> m.SubmitTasks:
    return m.SubmitTasks(job, first, FUNCTION, tasks(*(b"args %d" % n for n in range(first, first + count))))


def ended(start: m.AttemptStart, result: m.Payload | None = None, outcome: Outcome = Outcome.SUCCEEDED) -> m.AttemptEnd:
    usage = m.Usage(node=NodeName("n1"), attempt=1, start_method="fork", start_s=0.001, wall_s=0.5, core_s=0.6)
    payload = result or m.Payload(inline=b"result of " + start.args.inline)
    return m.AttemptEnd(start.attempt, start.job, start.index, outcome, payload, usage=usage)


async def run_all(agent: Peer, count: int) -> list[AttemptId]:
    """Be an agent that runs `count` attempts at once and successfully."""
    done: list[AttemptId] = []
    while len(done) < count:
        order = await agent.next(m.StartAttempts)
        attempts = tuple(start.attempt for start in order.attempts)
        agent.send(m.AttemptsStarted(attempts), m.AttemptsEnded(tuple(map(ended, order.attempts))))
        done += attempts
    return done


async def collect_ends(client: Peer, count: int, job: JobId = JOB) -> list[m.TaskEnd]:
    """The client's side: every terminal record, acknowledged as it comes, each cursor exactly once."""
    ends: list[m.TaskEnd] = []
    while len(ends) < count:
        message = await client.next(m.TasksEnded)
        assert (message.job, message.cursor) == (job, len(ends))
        ends += message.ends
        client.send(m.AckEvents(job, len(ends)))
    return ends


def chunks(content: bytes, size_bytes: int) -> list[m.PutBlob]:
    blob: BlobId = blob_id(content)
    offsets = range(0, max(1, len(content)), size_bytes)
    return [m.PutBlob(blob, offset, len(content), content[offset : offset + size_bytes]) for offset in offsets]


# --- processes -------------------------------------------------------------------------------------------------------


class Process:
    """`python -m herder_coordinator`. The lifeline's writing end is ours: when we die, it ends."""

    def __init__(self, process: subprocess.Popen[bytes], hello_fd: int, lifeline: int, log: Path) -> None:
        self.process = process
        self.hello: dict[str, Any] = {}
        self.log = log
        self._hello = os.fdopen(hello_fd)
        self._lifeline: int | None = lifeline

    def await_hello(self) -> None:
        """Wait until it is ready."""
        line = self._hello.readline()
        assert line, f"the coordinator did not start:\n{self.log.read_text()}"
        self.hello = json.loads(line)

    def close(self) -> None:
        self._hello.close()

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.hello["address"].rpartition(":")
        return host, int(port)

    @property
    def url(self) -> str:
        return f"http://{self.hello['http']}"

    def cut_lifeline(self) -> None:
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(15)


def start_arguments(config: CoordinatorConfig) -> list[str]:
    arguments = [sys.executable, "-m", "herder_coordinator"]
    for name in ("identity", "state_dir", "listen", "http_listen"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    for name in ("store", "blob_dir"):
        if getattr(config, name):
            arguments += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    return arguments


@contextlib.contextmanager
def coordinator_process(config: CoordinatorConfig, *more: str, **environ: str) -> Iterator[Process]:
    """A real coordinator, ready. Killed on leaving if it still runs."""
    with coordinator_starting(config, *more, **environ) as started:
        started.await_hello()
        yield started


@contextlib.contextmanager
def coordinator_starting(config: CoordinatorConfig, *more: str, **environ: str) -> Iterator[Process]:
    """The same, but it may not be ready for a long time."""
    hello_read, hello_write = os.pipe()
    life_read, life_write = os.pipe()
    log = config.state_dir.parent / "coordinator.log"
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [*start_arguments(config), "--hello-fd", str(hello_write), "--lifeline-fd", str(life_read), *more],
            pass_fds=(hello_write, life_read),
            stdin=subprocess.DEVNULL,
            stderr=stream,
            env={**os.environ, **environ},
        )
    os.close(hello_write)
    os.close(life_read)
    started = Process(process, hello_read, life_write, log)
    try:
        yield started
    finally:
        started.kill()
        started.cut_lifeline()
        started.close()

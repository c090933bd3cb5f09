"""A coordinator for the client's tests: the real wire and TLS, with tasks run in threads of the test's own process.

It keeps the protocol's promises (dense indices, cursors, events again after `Attach`) and can be told to misbehave:
hold tasks back, drop the link, fall silent on acknowledgements, refuse.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from herder_shared import tls
from herder_shared.config import Profile
from herder_shared.errors import HerderError
from herder_shared.ids import BlobId, ClusterId, JobId, NodeName, task_id
from herder_shared.limits import BLOB_CHUNK_BYTES, INLINE_BYTES_MAX
from herder_shared.states import Cause, Outcome
from herder_shared.wire import messages as m
from herder_shared.wire.session import Peer
from herder_shared.wire.stream import Acceptor, Link

CLUSTER = ClusterId("c" * 32)
NODE = NodeName("fake")
T = TypeVar("T")


@dataclass
class FakeJob:
    spec: m.JobSpec
    tasks: dict[int, m.TaskItem] = field(default_factory=dict)
    functions: dict[int, m.Function | None] = field(default_factory=dict)
    events: list[m.TaskEnd] = field(default_factory=list)
    started: set[int] = field(default_factory=set)
    ended: dict[int, m.TaskEnd] = field(default_factory=dict)
    acked: int = 0
    closed: int | None = None
    python: set[str] = field(default_factory=set)


class FakeCoordinator:
    """Runs from `start` to `stop`. `hold` keeps submitted tasks from starting; `heard` is all that clients said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = 0
        self.epoch = 1
        self.hold = False
        self.silent = False
        self.heard: list[m.Message] = []
        self.jobs: dict[JobId, FakeJob] = {}
        self.blobs: dict[BlobId, bytes] = {}
        self.refusal: m.Refused | None = None
        self.links: list[Link] = []
        self._arriving: dict[BlobId, bytearray] = {}
        self._waiting: list[tuple[JobId, int]] = []
        self._sessions = 0
        self._heard = threading.Condition()
        self._pool = ThreadPoolExecutor(4)

    # --- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)))
        self._thread.start()
        assert ready.wait(10)

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(10)

    def close(self) -> None:
        self.stop()
        self._pool.shutdown()

    async def _serve(self, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        context = tls.server_context(self.folder / "coordinator")
        acceptor = Acceptor(context=context, cluster=CLUSTER, welcome=self._welcome, observer=self)
        _, self.port = await acceptor.listen("127.0.0.1", self.port)
        ready.set()
        await self._stopping.wait()
        await acceptor.close()

    def profile(self) -> Profile:
        return Profile(name="fake", folder=self.folder, addresses=(f"127.0.0.1:{self.port}",), cluster=CLUSTER, http="")

    def _welcome(self, _hello: m.Hello, _peer: Peer) -> m.Welcome | m.Refused:
        if self.refusal is not None:
            return self.refusal
        self._sessions += 1
        return m.Welcome(CLUSTER, self.epoch, self._sessions)

    # --- what tests do -----------------------------------------------------------------------------------------------

    def call(self, act: Callable[[], T]) -> T:
        """Do it in the coordinator's thread."""

        async def acted() -> T:
            return act()

        return asyncio.run_coroutine_threadsafe(acted(), self._loop).result(10)

    def drop(self) -> None:
        """Break every link, without a word."""

        def close() -> None:
            for link in self.links:
                link.close()

        self.call(close)

    def release(self) -> None:
        """Start what was held."""

        def start() -> None:
            self.hold = False
            waiting, self._waiting = self._waiting, []
            for job, index in waiting:
                self._start(job, index)

        self.call(start)

    def send(self, message: m.Message) -> None:

        def send() -> None:
            for link in self.links:
                link.send(message)

        self.call(send)

    def until(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Wait until something that was received makes this true."""
        with self._heard:
            assert self._heard.wait_for(condition, timeout_s), "it did not come to pass"

    def said(self, kind: type[T]) -> list[T]:
        return [each for each in list(self.heard) if isinstance(each, kind)]

    # --- LinkObserver ------------------------------------------------------------------------------------------------

    def opened(self, link: Link) -> None:
        self.links.append(link)

    def closed(self, link: Link, _error: HerderError | None) -> None:
        self.links.remove(link)

    def _receive(self, link: Link, message: m.Message) -> None:
        match message:
            case m.Heartbeat():
                link.send(m.HeartbeatAck(message.n))
            case m.OpenJob():
                self.jobs.setdefault(message.spec.job, FakeJob(message.spec))
                self._acknowledge(link, message.spec.job, 0)
            case m.SubmitTasks():
                self._submit(link, message)
            case m.CloseJob():
                self.jobs[message.job].closed = message.count
            case m.CancelTasks():
                self._cancel(link, message)
            case m.Attach():
                self._attach(link, message)
            case m.AckEvents():
                self.jobs[message.job].acked = message.cursor
            case m.PutBlob():
                self._put(link, message)
            case m.WantBlob():
                content = self.blobs[message.id]
                for offset in range(message.offset, len(content), BLOB_CHUNK_BYTES):
                    chunk = content[offset : offset + BLOB_CHUNK_BYTES]
                    link.send(m.PutBlob(message.id, offset, len(content), chunk))
            case m.Query():
                self._answer(link, message)
            case _:
                pass

    def received(self, link: Link, messages: list[m.Message]) -> None:
        for message in messages:
            self._receive(link, message)
        with self._heard:
            self.heard.extend(messages)
            self._heard.notify_all()

    def _submit(self, link: Link, message: m.SubmitTasks) -> None:
        job = self.jobs[message.job]
        upto = message.first + len(message.tasks)
        assert message.first <= len(job.tasks), "indices are dense"
        job.python.add(message.python)
        for index, item in enumerate(message.tasks, start=message.first):
            if index in job.tasks:
                continue
            assert item.args.blob is None or item.args.blob in self.blobs, "blobs come first"
            job.tasks[index] = item
            job.functions[index] = message.function
            self._waiting.append((message.job, index))
        self._acknowledge(link, message.job, upto)
        if not self.hold:
            waiting, self._waiting = self._waiting, []
            for each in waiting:
                self._start(*each)

    def _acknowledge(self, link: Link, job: JobId, upto: int) -> None:
        if not self.silent:
            link.send(m.SubmitOk(job, upto))

    def _attach(self, link: Link, message: m.Attach) -> None:
        job = self.jobs.get(message.job)
        if job is not None and job.events[message.cursor :]:
            link.send(m.TasksEnded(message.job, message.cursor, tuple(job.events[message.cursor :])))

    def _cancel(self, link: Link, message: m.CancelTasks) -> None:
        job = self.jobs[message.job]
        indices = tuple(job.tasks) if message.indices is None else message.indices
        link.send(m.CancelOk(message.job, message.indices, message.running))
        for index in indices:
            if index not in job.ended and (message.running or index not in job.started):
                self._end(message.job, m.TaskEnd(index, Outcome.CANCELLED))

    def _put(self, link: Link, message: m.PutBlob) -> None:
        content = self._arriving.setdefault(message.id, bytearray())
        if message.offset == 0:
            content.clear()
        assert message.offset == len(content)
        content += message.data
        if len(content) == message.total:
            self.blobs[message.id] = bytes(self._arriving.pop(message.id))
        link.send(m.BlobStored(message.id, message.offset + len(message.data)))

    def _answer(self, link: Link, message: m.Query) -> None:
        if message.job is not None and message.job not in self.jobs:
            link.send(m.Answer(message.id, error="JobNotFound", message="no such job"))
        elif message.what == "logs":
            link.send(m.Answer(message.id, logs=m.Logs(b"out", b"err")))
        elif message.what == "status":
            link.send(m.Answer(message.id, status=m.StatusInfo(CLUSTER, self.epoch, "0")))
        elif message.what == "job" and message.job is not None:
            job = self.jobs[message.job]
            info = m.JobInfo(message.job, job.spec.name, "", "auto", "running", tasks=len(job.tasks))
            link.send(m.Answer(message.id, jobs=(info,)))
        else:
            link.send(m.Answer(message.id, nodes=(), jobs=(), workloads=(), tasks=()))

    # --- running -----------------------------------------------------------------------------------------------------

    def _start(self, job_id: JobId, index: int) -> None:
        job = self.jobs[job_id]
        if index in job.ended:
            return
        for dep_job, dep_index in job.tasks[index].deps:
            end = self.jobs[dep_job].ended.get(dep_index)
            if end is None:
                self._waiting.append((job_id, index))
                return
            if end.outcome is not Outcome.SUCCEEDED:
                cause = Cause.CANCELLED if end.outcome is Outcome.CANCELLED else Cause.DEPENDENCY_FAILED
                root = task_id(dep_job, dep_index)
                failure = m.Failure(cause, "a dependency failed", root=root, root_failure=end.failure)
                outcome = Outcome.CANCELLED if cause is Cause.CANCELLED else Outcome.FAILED
                self._end(job_id, m.TaskEnd(index, outcome, failure=failure))
                return
        job.started.add(index)
        for link in self.links:
            link.send(m.TasksStarted(job_id, ((index, NODE),)))
        self._pool.submit(self._run, job_id, index)

    def _run(self, job_id: JobId, index: int) -> None:
        job = self.jobs[job_id]
        usage = m.Usage(NODE, 1, "fork", pid=1)
        try:
            end = m.TaskEnd(index, Outcome.SUCCEEDED, result=self._payload(self._compute(job, index)), usage=usage)
        except BaseException as error:  # noqa: BLE001 - a task may raise anything
            failure = m.Failure(
                Cause.EXCEPTION, str(error), type(error).__qualname__, traceback.format_exc(), _pickled(error)
            )
            end = m.TaskEnd(index, Outcome.FAILED, failure=failure, usage=usage)
        with contextlib.suppress(RuntimeError):  # stopped meanwhile
            self._loop.call_soon_threadsafe(self._end, job_id, end)

    def _compute(self, job: FakeJob, index: int) -> bytes:
        item, function = job.tasks[index], job.functions[index]
        content = item.args.inline if item.args.blob is None else self.blobs[item.args.blob]
        if function is None:
            spec = msgspec.msgpack.decode(content, type=m.CommandSpec)
            result = m.CommandResult(0, stdout=" ".join(spec.argv).encode())
            return msgspec.msgpack.encode(result)
        with _task_module(lambda of, at: self._value(JobId(of), at)):
            args, kwargs = pickle.loads(content)
            call = pickle.loads(function.content or self.blobs[function.id])
        return pickle.dumps(call(*args, **kwargs))

    def _value(self, job: JobId, index: int) -> Any:
        result = self.jobs[job].ended[index].result
        assert result is not None
        return pickle.loads(result.inline if result.blob is None else self.blobs[result.blob])

    def _payload(self, content: bytes) -> m.Payload:
        if len(content) <= INLINE_BYTES_MAX:
            return m.Payload(inline=content, size_bytes=len(content))
        name = BlobId(f"{len(self.blobs):040d}")
        self.blobs[name] = content
        return m.Payload(blob=name, size_bytes=len(content))

    def _end(self, job_id: JobId, end: m.TaskEnd) -> None:
        job = self.jobs[job_id]
        if end.index in job.ended:
            return
        job.ended[end.index] = end
        job.events.append(end)
        for link in self.links:
            link.send(m.TasksEnded(job_id, len(job.events) - 1, (end,)))
        if not self.hold:
            waiting, self._waiting = self._waiting, []
            for each in waiting:
                self._start(*each)


_module_lock = threading.Lock()


@contextlib.contextmanager
def _task_module(dependency: Callable[[str, int], Any]) -> Iterator[None]:
    """`_herder_task`, as a child has it."""
    module = types.ModuleType("_herder_task")
    module.dependency = dependency  # type: ignore[attr-defined]
    with _module_lock:
        sys.modules["_herder_task"] = module
        try:
            yield
        finally:
            del sys.modules["_herder_task"]


def _pickled(error: BaseException) -> bytes | None:
    try:
        return pickle.dumps(error)
    except Exception:  # noqa: BLE001 - whatever it is, it does not pickle
        return None


def make_folder(folder: Path) -> Path:
    """A profile's folder with keys."""
    tls.create_authority(folder / "authority", CLUSTER)
    tls.issue(folder / "authority", folder / "coordinator", "coordinator", "coordinator")
    tls.issue(folder / "authority", folder / "client", "client", "tester")
    return folder


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """For what no event announces."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come to pass"
        time.sleep(0.005)

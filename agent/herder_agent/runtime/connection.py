"""The coordinator's messages, as events; the loop's reports, as messages; blobs in both directions.

A report that finds no connection is dropped: the next `Sync` says everything again. Results that are blobs are uploaded
before the end that names them is reported.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from herder_agent.core import events
from herder_agent.core.events import Event
from herder_agent.runtime.blobs import BlobStore, FunctionCache, Partial
from herder_agent.runtime.relays import Relays
from herder_shared.errors import HerderError
from herder_shared.ids import AttemptId, BlobId
from herder_shared.limits import BATCH_BYTES_MAX, BATCH_TASKS_MAX, BLOB_CHUNK_BYTES, BLOB_CHUNKS_IN_FLIGHT
from herder_shared.wire.messages import (
    AckAttempts,
    AttemptEnd,
    AttemptsEnded,
    AttemptsStarted,
    BlobStored,
    CancelAttempts,
    Drain,
    DropTaskClient,
    ForgetJobs,
    HeartbeatAck,
    Message,
    Metrics,
    NoBlob,
    PullMetrics,
    PutBlob,
    RunningAttempt,
    StartAttempts,
    Stop,
    Sync,
    SyncOk,
    TellTaskClient,
    WantBlob,
    WorkloadReport,
    WorkloadsReported,
)
from herder_shared.wire.stream import Link

_log = logging.getLogger("herder.agent")

#: What an end takes on the wire besides its result, its logs and its texts.
_END_BYTES = 400


@dataclass(slots=True)
class _Download:
    waiting: set[AttemptId] = field(default_factory=set)
    partial: Partial | None = None


@dataclass(slots=True)
class _Upload:
    fd: int
    total: int
    sent: int = 0


class Connection:
    """Between the link and the loop: an observer of links that decides nothing."""

    def __init__(
        self,
        *,
        store: BlobStore,
        functions: FunctionCache,
        dispatch: Callable[[Event], None],
        exposition: Callable[[bool], tuple[bytes, str]],
        stop: Callable[[str], None],
        linked: Callable[[int], None],
        relays: Relays,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._functions = functions
        self._dispatch = dispatch
        self._exposition = exposition
        self._stop = stop
        self._linked = linked
        self._relays = relays
        self._clock_s = clock_s
        self.link: Link | None = None
        self.is_draining = False
        self._needs: dict[AttemptId, tuple[BlobId, ...]] = {}
        self._downloads: dict[BlobId, _Download] = {}
        self._uploads: dict[BlobId, _Upload] = {}
        #: When the inventory and the heartbeats that are not answered yet were sent: from then a lease counts.
        self._sync_s = 0.0
        self._beats_s: dict[int, float] = {}

    # What the link says.

    def opened(self, link: Link) -> None:
        """A new session: say what we have, and ask again for what was under way."""
        self.link = link
        self._beats_s.clear()
        _log.info("connected: epoch %d, session %d", link.epoch, link.session)
        self._linked(link.epoch)
        self._drop_uploads()
        self._dispatch(events.Connected(link.session))
        self._relays.linked(link)
        for blob, download in self._downloads.items():
            link.send(WantBlob(blob, download.partial.size if download.partial is not None else 0))

    def closed(self, link: Link, error: HerderError | None) -> None:
        """What runs goes on."""
        if self.link is not link:
            return
        self.link = None
        if error is not None:
            _log.warning("%s", error)
        self._drop_uploads()
        self._relays.unlinked()
        self._dispatch(events.Disconnected(link.session))

    def received(self, link: Link, messages: list[Message]) -> None:
        """Each message becomes an event."""
        if link is not self.link:
            return
        for message in messages:
            self._take(link, message)

    def _take(self, link: Link, message: Message) -> None:
        match message:
            case StartAttempts():
                for function in message.functions:
                    if function.content:
                        self._functions.add(function.id, function.content)
                as_blobs = tuple(function.id for function in message.functions if not function.content)
                self._dispatch(
                    events.AttemptsOrdered(message.session, message.attempts, message.workloads, message.jobs, as_blobs)
                )
            case AckAttempts():
                self._dispatch(events.AttemptsAcked(message.attempts))
            case CancelAttempts():
                self._dispatch(events.CancelOrdered(message.attempts, message.grace_s, message.waiting_only))
            case SyncOk():
                if message.drop:
                    self._dispatch(events.AttemptsAcked(message.drop))
                self._dispatch(events.LeaseRenewed(self._sync_s + link.welcome.lease_s))
            case HeartbeatAck():
                sent_s = self._beats_s.pop(message.n, None)
                if sent_s is not None:
                    self._dispatch(events.LeaseRenewed(sent_s + link.welcome.lease_s))
                self._dispatch(events.WorkWaitingHeard(message.work_waiting))
            case PutBlob():
                self._put(link, message)
            case BlobStored():
                self._stored(link, message)
            case NoBlob():
                self._lost(message.id, f"blob {message.id} is not with the coordinator any more")
            case TellTaskClient():
                self._relays.told(message)
            case DropTaskClient():
                self._relays.dropped(message)
            case WantBlob():  # it has lost a result, which an end that it was told of names
                if self._store.has(message.id):
                    self.upload(message.id)
                else:
                    link.send(NoBlob(message.id))
            case ForgetJobs():
                self._dispatch(events.JobsForgotten(message.jobs))
            case PullMetrics():
                text, content_type = self._exposition(message.openmetrics)
                link.send(Metrics(message.id, text, content_type))
            case Drain():
                self.is_draining = message.on
                _log.info("draining" if message.on else "in use again")
            case Stop():
                self._stop(message.reason or "the coordinator asked for it")
            case _:
                _log.warning("dropped a message that is not for agents: %s", type(message).__name__)

    # What the loop reports.

    def sync(self, running: tuple[RunningAttempt, ...], ended: tuple[AttemptEnd, ...]) -> None:
        """Say all that we have; ends that do not fit into one frame follow."""
        if self.link is None:
            return
        batches = list(_batches(ended))
        self._sync_s = self._clock_s()
        self.link.send(Sync(running, batches[0] if batches else (), more=len(batches) > 1))
        for batch in batches[1:]:
            self.link.send(AttemptsEnded(batch))

    def beat(self, n: int) -> None:
        """Heartbeat `n` of this link leaves now."""
        self._beats_s[n] = self._clock_s()

    def report(self, started: list[AttemptId], ends: list[AttemptEnd], workloads: list[WorkloadReport]) -> None:
        """Send the reports of one turn of the loop."""
        link = self.link
        if link is None:
            return
        if workloads:
            link.send(WorkloadsReported(tuple(workloads)))
        if started:
            link.send(AttemptsStarted(tuple(started)))
        for batch in _batches(tuple(ends)):
            link.send(AttemptsEnded(batch))

    # Blobs that come.

    def fetch(self, attempt: AttemptId, blobs: tuple[BlobId, ...]) -> None:
        """Have these blobs here, and keep them until `release`."""
        self._needs[attempt] = blobs
        for blob in blobs:
            self._store.pin(blob)
            if self._store.has(blob):
                continue
            download = self._downloads.get(blob)
            if download is None:
                download = self._downloads[blob] = _Download()
                if self.link is not None:
                    self.link.send(WantBlob(blob))
            download.waiting.add(attempt)
        self._tell_if_complete(attempt)

    def release(self, attempt: AttemptId) -> None:
        """The attempt has ended."""
        for blob in self._needs.pop(attempt, ()):
            self._store.unpin(blob)
            download = self._downloads.get(blob)
            if download is not None:
                download.waiting.discard(attempt)

    def _tell_if_complete(self, attempt: AttemptId) -> None:
        if all(self._store.has(blob) for blob in self._needs.get(attempt, ())):
            self._dispatch(events.BlobsArrived(attempt))

    def _put(self, link: Link, message: PutBlob) -> None:
        download = self._downloads.get(message.id)
        if download is None:
            return
        try:
            if download.partial is None:
                download.partial = self._store.receive(message.total)
            partial = download.partial
            if message.offset != partial.size:
                return  # A repetition after a reconnection.
            partial.write(message.data)
            link.send(BlobStored(message.id, partial.size))
            if partial.size < message.total:
                return
            whole = self._store.complete(partial, message.id)
        except OSError as error:
            self._lost(message.id, f"blob {message.id} cannot be stored on this node: {error}")
            return
        if not whole:
            self._lost(message.id, f"blob {message.id} came damaged")
            return
        for attempt in sorted(self._downloads.pop(message.id).waiting):
            self._tell_if_complete(attempt)

    def _lost(self, blob: BlobId, message: str) -> None:
        download = self._downloads.pop(blob, None)
        if download is None:
            return
        if download.partial is not None:
            download.partial.abandon()
        for attempt in sorted(download.waiting):
            self._dispatch(events.BlobsLost(attempt, message))

    # Blobs that go.

    def upload(self, blob: BlobId) -> None:
        """Send a result; `BlobUploaded` when the coordinator has it."""
        if self.link is None or blob in self._uploads:
            return
        upload = self._uploads[blob] = _Upload(self._store.open(blob), self._store.size_of(blob))
        self._send_chunks(self.link, blob, upload, 0)

    def _stored(self, link: Link, message: BlobStored) -> None:
        upload = self._uploads.get(message.id)
        if upload is None:
            return
        if message.upto < upload.total:
            self._send_chunks(link, message.id, upload, message.upto)
            return
        os.close(self._uploads.pop(message.id).fd)
        self._dispatch(events.BlobUploaded(message.id))

    def _send_chunks(self, link: Link, blob: BlobId, upload: _Upload, confirmed: int) -> None:
        window = confirmed + BLOB_CHUNKS_IN_FLIGHT * BLOB_CHUNK_BYTES
        while upload.sent < min(upload.total, window):
            data = os.pread(upload.fd, BLOB_CHUNK_BYTES, upload.sent)
            link.send(PutBlob(blob, upload.sent, upload.total, data))
            upload.sent += len(data)

    def _drop_uploads(self) -> None:
        for upload in self._uploads.values():
            os.close(upload.fd)
        self._uploads.clear()

    def close(self) -> None:
        """Let go of what was under way."""
        self._drop_uploads()
        for download in self._downloads.values():
            if download.partial is not None:
                download.partial.abandon()
        self._downloads.clear()


def _batches(ends: tuple[AttemptEnd, ...]) -> list[tuple[AttemptEnd, ...]]:
    """Cut into what fits into a frame well."""
    batches: list[tuple[AttemptEnd, ...]] = []
    batch: list[AttemptEnd] = []
    size = 0
    for end in ends:
        bytes_ = size_of(end)
        if batch and (size + bytes_ > BATCH_BYTES_MAX or len(batch) >= BATCH_TASKS_MAX):
            batches.append(tuple(batch))
            batch, size = [], 0
        batch.append(end)
        size += bytes_
    if batch:
        batches.append(tuple(batch))
    return batches


def size_of(end: AttemptEnd) -> int:
    """About how many bytes an end takes on the wire, and in memory."""
    size = _END_BYTES
    if end.result is not None:
        size += len(end.result.inline)
    if end.logs is not None:
        size += len(end.logs.stdout) + len(end.logs.stderr)
    if end.failure is not None:
        failure = end.failure
        size += len(failure.message) + len(failure.traceback) + len(failure.stderr_tail) + len(failure.pickled or b"")
    return size

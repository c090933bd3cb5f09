"""What this client has to tell the coordinator, in order, until the coordinator says that it has it. No I/O, no clock.

Theory of operation. Everything leaves in the order in which it was given, because a task may depend on any earlier
one. An entry waits, then is sent, then is acknowledged (`SubmitOk`, `CancelOk`); `rewind` after a lost connection puts
what was sent and not acknowledged back in front, and as the coordinator drops what it has, everything exists once. A
submission whose arguments are blobs holds back what is behind it until these are stored: blobs of the first few such
submissions are uploaded side by side, each with a window of chunks.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from herder_shared.ids import BlobId, JobId
from herder_shared.limits import BATCH_BYTES_MAX, BATCH_TASKS_MAX, BLOB_CHUNK_BYTES, BLOB_CHUNKS_IN_FLIGHT
from herder_shared.wire.messages import (
    CancelTasks,
    ClientToCoordinator,
    CloseJob,
    JobSpec,
    OpenJob,
    PutBlob,
    SubmitTasks,
)

if TYPE_CHECKING:
    from herder.payload import PickledFunction
    from herder_shared.wire.messages import TaskItem

#: Blobs on their way up at a time.
UPLOADS_MAX = 4
#: What a task costs in the account of unacknowledged bytes beyond its payload.
TASK_OVERHEAD_BYTES = 64
#: Indices in one `CancelTasks`: about 5 bytes each.
CANCEL_INDICES_MAX = 20_000


@dataclass(slots=True, eq=False)
class Open:
    """The first word about a job."""

    spec: JobSpec
    order: int = 0


@dataclass(slots=True, eq=False)
class Batch:
    """Consecutive tasks of one job with one function."""

    job: JobId
    first: int
    function: PickledFunction | None
    python: str
    items: list[TaskItem]
    size_bytes: int
    #: Tasks whose results must be kept until these are acknowledged, as `(job, index)`.
    claims: list[tuple[JobId, int]] = field(default_factory=list)
    blobs: list[tuple[BlobId, bytes]] = field(default_factory=list)
    order: int = 0

    @property
    def upto(self) -> int:
        return self.first + len(self.items)


@dataclass(slots=True, eq=False)
class Close:
    """No more tasks: `count` is how many there are."""

    job: JobId
    count: int
    order: int = 0


@dataclass(slots=True, eq=False)
class Cancel:
    """`indices` None: the whole job."""

    job: JobId
    indices: tuple[int, ...] | None
    running: bool
    order: int = 0


Entry = Open | Batch | Close | Cancel


@dataclass(slots=True, eq=False)
class _Upload:
    content: bytes
    #: Batches that need it and are not acknowledged.
    needed: int = 0
    sent_bytes: int = 0
    stored_bytes: int = 0

    @property
    def is_stored(self) -> bool:
        return self.stored_bytes >= len(self.content)

    def next_chunk(self, name: BlobId) -> PutBlob | None:
        if (
            self.sent_bytes >= len(self.content)
            or self.sent_bytes - self.stored_bytes >= BLOB_CHUNKS_IN_FLIGHT * BLOB_CHUNK_BYTES
        ):
            return None
        start = self.sent_bytes
        chunk = self.content[start : start + BLOB_CHUNK_BYTES]
        self.sent_bytes += len(chunk)
        return PutBlob(name, start, len(self.content), chunk)


class Outbox:
    """Invariant: an entry is in exactly one of `_waiting` and the sent ones; sent ones are in the order of sending."""

    def __init__(self) -> None:
        self._waiting: deque[Entry] = deque()
        self._opens: dict[JobId, Open] = {}
        #: Jobs of which something was said here and that have not been forgotten.
        self._jobs: set[JobId] = set()
        self._batches: dict[JobId, deque[Batch]] = {}
        self._closes: dict[JobId, Close] = {}
        self._cancels: list[Cancel] = []
        self._uploads: dict[BlobId, _Upload] = {}
        self._order = 0

    def add(self, entry: Entry) -> None:
        """Put an entry at the end."""
        self._order += 1
        entry.order = self._order
        if isinstance(entry, Open):
            self._jobs.add(entry.spec.job)
        if isinstance(entry, Batch):
            for name, content in entry.blobs:
                upload = self._uploads.setdefault(name, _Upload(content))
                upload.needed += 1
            if self._merge(entry):
                return
        self._waiting.append(entry)

    def pump(self) -> list[ClientToCoordinator]:
        """All that can be said now. To be called while there is a connection, after each change."""
        out: list[ClientToCoordinator] = []
        self._pump_uploads(out)
        waiting = self._waiting
        while waiting:
            entry = waiting[0]
            if isinstance(entry, Batch) and not all(self._uploads[name].is_stored for name, _ in entry.blobs):
                break
            waiting.popleft()
            out.append(self._sent(self._gathered(entry) if isinstance(entry, Cancel) else entry))
        return out

    def _gathered(self, first: Cancel) -> Cancel:
        """A cancellation and those behind it that make one message with it: futures are cancelled one by one."""
        waiting = self._waiting
        if first.indices is None or not waiting or not isinstance(waiting[0], Cancel):
            return first
        indices = list(first.indices)
        while waiting and isinstance(entry := waiting[0], Cancel):
            if entry.job != first.job or entry.running != first.running or entry.indices is None:
                break
            if len(indices) + len(entry.indices) > CANCEL_INDICES_MAX:
                break
            indices.extend(entry.indices)
            waiting.popleft()
        return Cancel(first.job, tuple(indices), first.running, first.order)

    def rewind(self) -> None:
        """The connection was lost: what was not acknowledged is to be said again, in the old order."""
        again: list[Entry] = [*self._opens.values(), *self._closes.values(), *self._cancels]
        for batches in self._batches.values():
            again.extend(batches)
        again.sort(key=lambda entry: entry.order)
        self._waiting.extendleft(reversed(again))
        self._opens.clear()
        self._closes.clear()
        self._cancels.clear()
        self._batches.clear()
        for upload in self._uploads.values():
            upload.sent_bytes = upload.stored_bytes = 0

    def submit_ok(self, job: JobId, upto: int) -> list[Batch]:
        """Tasks below `upto` are durable: the batches of which that is true."""
        self._opens.pop(job, None)
        batches = self._batches.get(job)
        done: list[Batch] = []
        while batches and batches[0].upto <= upto:
            done.append(batches.popleft())
        if batches is not None and not batches:
            del self._batches[job]
        for batch in done:
            self._release(batch)
        return done

    def cancel_ok(self, job: JobId, indices: tuple[int, ...] | None, running: bool) -> None:
        """The first such cancellation is durable. A harder one of the same tasks may be behind it, with its own
        answer to come; this one may come twice, if it was asked for on two connections."""
        for position, each in enumerate(self._cancels):
            if each.job == job and each.indices == indices and each.running == running:
                del self._cancels[position]
                return

    def forget(self, job: JobId) -> list[Batch]:
        """Nothing more is to be said about this job: the batches that were not acknowledged."""
        dropped = list(self._batches.pop(job, ()))
        self._jobs.discard(job)
        self._opens.pop(job, None)
        self._closes.pop(job, None)
        self._cancels = [each for each in self._cancels if each.job != job]
        kept: deque[Entry] = deque()
        for entry in self._waiting:
            if isinstance(entry, Batch) and entry.job == job:
                dropped.append(entry)
            elif (entry.spec.job if isinstance(entry, Open) else entry.job) != job:
                kept.append(entry)
        self._waiting = kept
        for batch in dropped:
            self._release(batch)
        return dropped

    def blob_stored(self, name: BlobId, upto: int) -> None:
        """The coordinator has the first `upto` bytes of this blob."""
        upload = self._uploads.get(name)
        if upload is not None:
            upload.stored_bytes = max(upload.stored_bytes, upto)
            upload.sent_bytes = max(upload.sent_bytes, upto)

    def blob_wanted(self, name: BlobId, offset: int) -> None:
        """The coordinator asks for this blob from `offset` on."""
        upload = self._uploads.get(name)
        if upload is not None:
            upload.sent_bytes = upload.stored_bytes = offset

    def is_opened(self, job: JobId) -> bool:
        """The coordinator has acknowledged the job, or will before whatever is said next. Not of a job whose `Open` a
        user thread is about to add."""
        if job not in self._jobs or job in self._opens:
            return False
        return not any(isinstance(entry, Open) and entry.spec.job == job for entry in self._waiting)

    def _merge(self, batch: Batch) -> bool:
        """Let the last waiting entry take the batch in, where both make one message."""
        last = self._waiting[-1] if self._waiting else None
        if (
            not isinstance(last, Batch)
            or last.job != batch.job
            or last.upto != batch.first
            or last.python != batch.python
            or len(last.items) + len(batch.items) > BATCH_TASKS_MAX
            or last.size_bytes + batch.size_bytes > BATCH_BYTES_MAX
            or (last.function and last.function.function.id) != (batch.function and batch.function.function.id)
            or last.blobs
            or batch.blobs
        ):
            return False
        last.items.extend(batch.items)
        last.size_bytes += batch.size_bytes
        last.claims.extend(batch.claims)
        return True

    def _sent(self, entry: Entry) -> ClientToCoordinator:
        match entry:
            case Open():
                self._opens[entry.spec.job] = entry
                return OpenJob(entry.spec)
            case Batch():
                self._batches.setdefault(entry.job, deque()).append(entry)
                function = entry.function.function if entry.function is not None else None
                return SubmitTasks(entry.job, entry.first, function, tuple(entry.items), entry.python)
            case Close():
                self._closes[entry.job] = entry
                return CloseJob(entry.job, entry.count)
            case Cancel():
                self._cancels.append(entry)
                return CancelTasks(entry.job, entry.indices, entry.running)

    def _pump_uploads(self, out: list[ClientToCoordinator]) -> None:
        started = 0
        if not self._uploads:
            return
        for entry in self._waiting:
            for name, _ in entry.blobs if isinstance(entry, Batch) else ():
                upload = self._uploads[name]
                if upload.is_stored:
                    continue
                while (chunk := upload.next_chunk(name)) is not None:
                    out.append(chunk)
                started += 1
            if started >= UPLOADS_MAX:
                return

    def _release(self, batch: Batch) -> None:
        for name, _ in batch.blobs:
            upload = self._uploads[name]
            upload.needed -= 1
            if upload.needed <= 0:
                del self._uploads[name]

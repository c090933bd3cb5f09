"""The journal over any store: reads it and judges damage, groups commits, compacts while it runs.

Theory of operation. `append` only queues. The writer takes all that is queued, writes it as one row (or a few, by
size) in one transaction, and calls everyone back when the commit is on disk. While it syncs, the next group gathers:
so batches grow with the disk's latency by themselves, and no timer is needed (a 2 ms linger made the median four times
as long when it was measured, and saved 7 % of the CPU).

`begin` writes the snapshot, the new epoch and the end of all older rows in one transaction: a crash leaves the old
journal or the new one. It comes on *every* start: pages that an earlier life failed to sync may be read back from
the cache as if they were on disk, and only writing everything again makes sure.

Any error is fail-stop: after a failed write a store may well succeed with the next one (seen with an injected EIO),
and everything acknowledged since would stand on a hole. A full disk is none: the statement was refused as a whole
before anything of it was synced. The group then waits, with all that come after it; the store frees what it had set
aside for this, so that what runs can end, and `shortage` has new submissions refused until there is room again.

Damage at the tail is cut, kept in a file of its own, and said; damage before it refuses to start, as what follows
cannot be trusted. Compaction: see compaction.py; its few statements are *errands* which the writer does between two
groups, a slice at a time.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from herder_coordinator.core.records import Record
from herder_coordinator.journal.codec import DamagedBatch, decode_batch, encode_rows, encode_snapshot
from herder_coordinator.journal.compaction import Compaction
from herder_coordinator.journal.interface import JournalDamaged, JournalError, JournalFull
from herder_coordinator.journal.repair import Dropped
from herder_coordinator.journal.store import Base, Row, Store, all_batches, all_parts, part_number
from herder_shared.limits import MIB

log = logging.getLogger(__name__)

#: Batches beyond this many bytes, and beyond what the snapshot itself takes, are made a new snapshot: the journal stays
#: within twice the state and this, and each byte is rewritten about once.
COMPACT_BYTES = 64 * MIB
#: Between two tries to write where there is no room, and to set room aside again.
RETRY_S = 0.25
#: After a compaction that failed.
COMPACT_AGAIN_S = 60.0

_T = TypeVar("_T")


class _Batch:
    """Records, whom to call when they are durable, and when they came."""

    __slots__ = ("durable", "queued_s", "records")

    def __init__(self, records: Sequence[Record], durable: Callable[[float], None]) -> None:
        self.records = records
        self.durable = durable
        self.queued_s = time.monotonic()


class _Errand:
    """Something for the writer to do between two groups; whoever gave it waits for `done`."""

    __slots__ = ("done", "error", "work")

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        self.done = threading.Event()
        self.error: JournalError | None = None


class StoredJournal:
    """See `interface.Journal`. Owns its store and, from `begin` to `close`, one thread; another while it compacts."""

    def __init__(
        self, store: Store, *, cut_folder: Path, compact_bytes: int = COMPACT_BYTES, repair: bool = False
    ) -> None:
        self.cluster = store.cluster
        self.epoch = store.epoch
        self._store = store
        self._cut_folder = cut_folder
        self._compact_bytes = compact_bytes
        #: With `--repair`: what was dropped.
        self.dropped = Dropped() if repair else None
        #: What the writer reads; None is its last. A `SimpleQueue` wakes it with one futex, a `Condition` with three.
        self._queue: queue.SimpleQueue[_Batch | _Errand | None] = queue.SimpleQueue()
        #: Guards the three below.
        self._mutex = threading.Lock()
        self._is_closing = False
        self._failure: JournalError | None = None
        self._on_failure: Callable[[JournalError], None] | None = None
        self._thread: threading.Thread | None = None
        self._shortage = ""
        #: The writer's. Bytes in the base, and in the batches after it.
        self._base_bytes = 0
        self._batch_bytes = 0
        self._compaction: Compaction | None = None
        self._compact_again_s = 0.0
        self._spare_due_s = 0.0

    # --- before it runs ----------------------------------------------------------------------------------------------

    def replay(self) -> Iterator[Record]:
        """Every record, oldest first.

        Raises:
            JournalDamaged: something is damaged or missing, and what is after it is not; the message names the place.
            JournalError: the store cannot be read.
        """
        is_whole = True
        offset = 0
        for content, records in self._read_parts():
            offset += len(content)
            yield from records
        if self.dropped is not None and self.dropped:
            is_whole = False
        base = self._store.base
        expected = base.upto + 1 if base.generation else None
        for seq, content in all_batches(self._store, base.upto):
            if not is_whole:
                assert self.dropped is not None
                self.dropped.add(seq, content)
                continue
            try:
                if expected is not None and seq != expected:
                    raise DamagedBatch(f"batch {expected} is missing")
                records = decode_batch(seq, content)
            except DamagedBatch as error:
                if self.dropped is None:
                    self._cut_tail(seq, offset, error)
                    return
                self.dropped.begin(f"batch {seq}, {offset} bytes into the journal: {error}")
                self.dropped.add(seq, content)
                is_whole = False
                continue
            yield from records
            offset += len(content)
            expected = seq + 1

    def _read_parts(self) -> Iterator[tuple[bytes, list[Record]]]:
        """The snapshot. Nothing of it may be missing: it was synced as a whole before it became the base."""
        base = self._store.base
        expected, offset, why = part_number(base.generation, 0), 0, ""
        for number, content in all_parts(self._store):
            if why:
                assert self.dropped is not None
                self.dropped.add(number, content)
                continue
            try:
                if number != expected:
                    raise DamagedBatch(f"part {expected - part_number(base.generation, 0)} is missing")
                records = decode_batch(number, content)
            except DamagedBatch as error:
                why = f"the snapshot of {self._store.label} is damaged {offset} bytes into it: {error}"
                self._refuse(why)
                assert self.dropped is not None
                self.dropped.add(number, content)
                continue
            yield content, records
            expected, offset = expected + 1, offset + len(content)
        found = expected - part_number(base.generation, 0)
        if not why and found != base.parts:
            self._refuse(f"the snapshot of {self._store.label} has {base.parts} parts, and only {found} are there")

    def _refuse(self, why: str) -> None:
        if self.dropped is None:
            raise JournalDamaged(f"{why}. Restore the state folder from a copy, or see what `--repair` would drop")
        self.dropped.begin(why)

    def _cut_tail(self, seq: int, offset: int, damage: DamagedBatch) -> None:
        """Accept damage that nothing follows; `begin` will remove it. The bytes are kept beside the journal."""
        rows = list(all_batches(self._store, seq - 1))
        for later, content in rows:
            try:
                decode_batch(later, content)
            except DamagedBatch:
                continue
            raise JournalDamaged(
                f"{self._store.label} is damaged at batch {seq}, {offset} bytes into it ({damage}), and batch {later} "
                "after it is whole: not started, so that nothing acknowledged is dropped in silence. Restore the state "
                "folder from a copy, or see what `--repair` would drop"
            ) from damage
        size_bytes = sum(len(content) for _, content in rows)
        kept = self._cut_folder / f"journal.cut-{seq}"
        kept.write_bytes(b"".join(content for _, content in rows))
        log.warning(
            "%s ends in %d damaged bytes from batch %d on (%s): cut, kept in %s",
            self._store.label,
            size_bytes,
            seq,
            damage,
            kept,
        )

    def begin(self, snapshot: Iterable[Record]) -> None:
        """Replace all rows by the snapshot, make the epoch durable, start the writer.

        Raises:
            JournalFull: no space; nothing has changed.
            JournalError: the storage failed.
        """
        store = self._store
        generation = store.base.generation + 1
        counted = _Counted(encode_snapshot(part_number(generation, 0), snapshot))
        store.replace(counted, Base(generation, 0, store.last_seq))
        self._base_bytes = counted.size_bytes
        self._thread = threading.Thread(target=self._write_groups, name="herder-journal")
        self._thread.start()

    # --- what the loop calls -----------------------------------------------------------------------------------------

    def append(self, records: Sequence[Record], durable: Callable[[float], None]) -> None:
        """Queue; see `interface.Journal.append`. What comes after a failure is dropped, its callback never called."""
        if self._failure is None and not self._is_closing:
            self._queue.put(_Batch(records, durable))

    def on_failure(self, callback: Callable[[JournalError], None]) -> None:
        """Called once, in the writer's thread. At once and in the caller's, if the journal has failed already."""
        with self._mutex:
            self._on_failure = callback
            failure = self._failure
        if failure is not None:
            callback(failure)

    def close(self) -> None:
        """Commit what is queued, end the threads, let go of the store. Idempotent."""
        with self._mutex:
            if self._is_closing:
                return
            self._is_closing = True
        if self._compaction is not None:
            self._compaction.cancel()
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()
        self._store.close(has_failed=self._failure is not None)

    @property
    def size_bytes(self) -> int:
        """On disk."""
        return self._store.size_bytes

    @property
    def shortage(self) -> str:
        """See `interface.Journal.shortage`."""
        return self._shortage

    # --- the writer's thread -----------------------------------------------------------------------------------------

    def _write_groups(self) -> None:
        is_last = False
        try:
            while not is_last:
                group, errand, is_last = self._next_group()
                if group:
                    self._commit(group)
                    now_s = time.monotonic()
                    for batch in group:
                        batch.durable(now_s - batch.queued_s)
                if errand is not None:
                    _run(errand)
                self._look_around()
        except JournalError as error:
            self._fail(error)
        except Exception as error:
            log.exception("%s cannot be written", self._store.label)
            self._fail(JournalError(f"{self._store.label} cannot be written: {error!r}"))
        finally:
            self._end_errands()

    def _next_group(self) -> tuple[list[_Batch], _Errand | None, bool]:
        """Wait for a batch; take it and all that are queued behind it, up to an errand. True with the last of all."""
        group: list[_Batch] = []
        try:
            entry = self._queue.get(timeout=self._patience_s())
        except queue.Empty:
            return group, None, False
        while True:
            if entry is None:
                return group, None, True
            if isinstance(entry, _Errand):
                return group, entry, False
            group.append(entry)
            if self._queue.empty():
                return group, None, False
            entry = self._queue.get()

    def _patience_s(self) -> float | None:
        return RETRY_S if self._shortage else self._store.beat_s

    def _look_around(self) -> None:
        """What is due between two groups."""
        now_s = time.monotonic()
        if not self._shortage and (shortage := self._store.shortage()):
            log.error("%s: new submissions are refused until there is room", shortage)
            self._shortage = shortage
            self._spare_due_s = now_s + RETRY_S
        if self._shortage and now_s >= self._spare_due_s:
            self._spare_due_s = now_s + RETRY_S
            if self._store.restore_spare():
                log.warning("%s has room again", self._store.label)
                self._shortage = ""
        if self._store.beat_s is not None:
            self._store.beat()
        if self._compaction is not None and self._compaction.is_over:
            self._compacted(self._compaction)
        is_due = self._batch_bytes > max(self._compact_bytes, self._base_bytes)
        if is_due and self._compaction is None and not self._shortage and now_s >= self._compact_again_s:
            self._compact()

    def _commit(self, group: Sequence[_Batch]) -> None:
        """Write a group, and while there is no room for it, wait."""
        records = [record for batch in group for record in batch.records]
        if not records:
            return
        rows = list(encode_rows(self._store.last_seq + 1, records))
        while True:
            try:
                self._store.insert(rows)
            except JournalFull as error:
                self._run_short(error)
            else:
                break
        self._batch_bytes += sum(len(content) for _, content in rows)

    def _run_short(self, error: JournalFull) -> None:
        if not self._shortage:
            log.error("%s: what is there goes on, new submissions are refused until there is room", error)
        self._shortage = str(error)
        if self._store.spare():
            return
        if self._is_closing:
            raise error
        time.sleep(RETRY_S)

    def _fail(self, error: JournalError) -> None:
        log.critical("%s; nothing more is acknowledged", error)
        with self._mutex:
            self._failure = error
            callback = self._on_failure
        if callback is not None:
            callback(error)

    # --- compaction --------------------------------------------------------------------------------------------------

    def _compact(self) -> None:
        upto = self._store.last_seq
        with self._mutex:
            if self._is_closing:
                return
            log.info("compacting %s: %d bytes since the last snapshot", self._store.label, self._batch_bytes)
            self._compaction = Compaction(
                self._store, upto, self._ask, size_bytes=self._batch_bytes, folder=self._cut_folder
            )
            self._compaction.start()

    def _compacted(self, compaction: Compaction) -> None:
        self._compaction = None
        if compaction.error is None:
            self._base_bytes = compaction.base_bytes
            self._batch_bytes -= compaction.size_bytes
            log.info("compacted %s into a snapshot of %d bytes", self._store.label, self._base_bytes)
        elif not self._is_closing:
            self._compact_again_s = time.monotonic() + COMPACT_AGAIN_S
            log.warning("%s was not compacted, and grows: %s", self._store.label, compaction.error)

    def _ask(self, work: Callable[[], _T]) -> _T:
        """In the compaction's thread: have the writer do this between two groups."""
        answer: list[_T] = []
        errand = _Errand(lambda: answer.append(work()))
        self._queue.put(errand)
        while not errand.done.wait(1.0):
            if self._failure is not None:
                raise self._failure
        if errand.error is not None:
            raise errand.error
        return answer[0]

    def _end_errands(self) -> None:
        while not self._queue.empty():
            entry = self._queue.get()
            if isinstance(entry, _Errand):
                entry.error = JournalError("the journal is closed")
                entry.done.set()


class _Counted:
    """Rows, and what they weighed."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self._rows = rows
        self.size_bytes = 0

    def __iter__(self) -> Iterator[Row]:
        for number, content in self._rows:
            self.size_bytes += len(content)
            yield number, content


def _run(errand: _Errand) -> None:
    """A full disk fails the errand; anything else the journal."""
    try:
        errand.work()
    except JournalFull as error:
        errand.error = error
    except JournalError as error:
        errand.error = error
        raise
    finally:
        errand.done.set()

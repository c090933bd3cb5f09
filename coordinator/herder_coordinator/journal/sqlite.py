"""The journal in SQLite: batches of records as rows which are inserted, never updated, by one thread over one
connection.

Theory of operation. `append` only queues. The writer takes all that is queued, writes it as one row (or a few, by
size) in one transaction, and calls everyone back when the commit is on disk (WAL with `synchronous=FULL`: the log
is synced before the commit returns). While it syncs, the next group gathers: so batches grow with the disk's
latency by themselves, and no timer is needed (a 2 ms linger made the median four times as long when it was
measured, and saved 7 % of the CPU).

`begin` writes the snapshot, the new epoch and the end of all older rows in one transaction: a crash leaves the old
journal or the new one. It comes on *every* start: pages that an earlier life failed to sync may be read back from
the cache as if they were on disk, and only writing everything again makes sure.

Any error is fail-stop: after a failed write SQLite may well succeed with the next one (seen with an injected EIO),
and everything acknowledged since would stand on a hole. Damage at the tail is cut, kept in a file of its own, and
said; damage before it refuses to start, as what follows cannot be trusted.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import apsw

from herder_coordinator.core.records import Record
from herder_coordinator.journal import folder
from herder_coordinator.journal.codec import DamagedBatch, decode_batch, encode_batch
from herder_coordinator.journal.interface import JournalError, JournalFull
from herder_shared.ids import ClusterId

log = logging.getLogger(__name__)

#: Version of the tables and of the meaning of records. A newer one is refused.
FORMAT = 1
FILE_NAME = "journal.sqlite"
#: Records in one row: what a crash can tear, and what a replay holds in memory at a time.
ROW_RECORDS_MAX = 1_000
#: WAL pages (4 KiB) between checkpoints: 16 MiB.
_CHECKPOINT_PAGES = 4_096

_TABLES = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS epochs (epoch INTEGER PRIMARY KEY);
CREATE TABLE IF NOT EXISTS batches (seq INTEGER PRIMARY KEY, content BLOB NOT NULL);
"""


#: Records, whom to call when they are durable, and when they came.
_Batch = tuple[Sequence[Record], Callable[[float], None], float]


class SqliteJournal:
    """See `interface.Journal`. Owns its connection, its lock and (from `begin` to `close`) one thread."""

    def __init__(self, state_dir: Path, cluster: ClusterId, connection: apsw.Connection, lock: int) -> None:
        self.cluster = cluster
        self._path = state_dir / FILE_NAME
        self._connection = connection
        self._lock = lock
        self._last_seq = _scalar(connection, "SELECT coalesce(max(seq), 0) FROM batches")
        self.epoch = _scalar(connection, "SELECT coalesce(max(epoch), 0) FROM epochs") + 1
        #: What the writer reads; None is its last. A `SimpleQueue` wakes it with one futex, a `Condition` with three.
        self._queue: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        #: Guards the three below.
        self._mutex = threading.Lock()
        self._is_closing = False
        self._failure: JournalError | None = None
        self._on_failure: Callable[[JournalError], None] | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def open(cls, state_dir: Path, cluster: ClusterId) -> SqliteJournal:
        """Take the folder and read what the journal is.

        Raises:
            JournalLocked: another coordinator has it.
            JournalFull: no space to open it.
            JournalError: the folder cannot serve, or the journal is another cluster's, newer, or damaged.
        """
        folder.prepare(state_dir)
        lock = folder.lock(state_dir)
        connection: apsw.Connection | None = None
        try:
            connection = _connect(state_dir / FILE_NAME)
            _check_identity(connection, state_dir / FILE_NAME, cluster)
            folder.sync(state_dir)
            return cls(state_dir, cluster, connection, lock)
        except BaseException as error:
            if connection is not None:
                connection.close(True)
            os.close(lock)
            if isinstance(error, apsw.Error | OSError):
                raise _journal_error(error, f"the journal {state_dir / FILE_NAME} cannot be opened") from error
            raise

    def replay(self) -> Iterator[Record]:
        """Every record, oldest first.

        Raises:
            JournalError: a batch is damaged or missing, and later ones are not; the message names it.
        """
        expected: int | None = None
        try:
            for seq, content in self._connection.execute("SELECT seq, content FROM batches ORDER BY seq"):
                try:
                    if expected is not None and seq != expected:
                        raise DamagedBatch(f"batch {expected} is missing")
                    records = decode_batch(seq, content)
                except DamagedBatch as error:
                    self._cut_tail(seq, error)
                    return
                yield from records
                expected = seq + 1
        except apsw.Error as error:
            where = "at its beginning" if expected is None else f"after batch {expected - 1}"
            raise _journal_error(error, f"the journal {self._path} cannot be read {where}") from error

    def _cut_tail(self, seq: int, damage: DamagedBatch) -> None:
        """Accept damage that nothing follows; `begin` will remove it. The bytes are kept beside the journal."""
        rows = list(self._connection.execute("SELECT seq, content FROM batches WHERE seq >= ? ORDER BY seq", (seq,)))
        for later, content in rows:
            try:
                decode_batch(later, content)
            except DamagedBatch:
                continue
            raise JournalError(
                f"the journal {self._path} is damaged at batch {seq} ({damage}), and batch {later} after it is whole: "
                "not started, so that nothing acknowledged is dropped in silence"
            ) from damage
        size_bytes = sum(len(content) for _, content in rows)
        kept = self._path.with_name(f"{FILE_NAME}.cut-{seq}")
        kept.write_bytes(b"".join(content for _, content in rows))
        log.warning(
            "the journal %s ends in %d damaged bytes from batch %d on (%s): cut, kept in %s",
            self._path,
            size_bytes,
            seq,
            damage,
            kept,
        )

    def begin(self, snapshot: Sequence[Record]) -> None:
        """Replace all rows by the snapshot, make the epoch durable, start the writer.

        Raises:
            JournalFull: no space; nothing has changed.
            JournalError: the storage failed.
        """
        first = self._last_seq + 1
        try:
            with self._transaction():
                self._connection.execute("INSERT INTO epochs (epoch) VALUES (?)", (self.epoch,))
                self._insert(snapshot)
                self._connection.execute("DELETE FROM batches WHERE seq < ?", (first,))
        except apsw.Error as error:
            raise _journal_error(error, f"the snapshot cannot be written to {self._path}") from error
        self._thread = threading.Thread(target=self._write_groups, name="herder-journal")
        self._thread.start()

    def append(self, records: Sequence[Record], durable: Callable[[float], None]) -> None:
        """Queue; see `interface.Journal.append`. What comes after a failure is dropped, its callback never called."""
        if self._failure is None and not self._is_closing:
            self._queue.put((records, durable, time.monotonic()))

    def on_failure(self, callback: Callable[[JournalError], None]) -> None:
        """Called once, in the writer's thread. At once and in the caller's, if the journal has failed already."""
        with self._mutex:
            self._on_failure = callback
            failure = self._failure
        if failure is not None:
            callback(failure)

    def close(self) -> None:
        """Commit what is queued, end the thread, release the folder. Idempotent."""
        with self._mutex:
            if self._is_closing:
                return
            self._is_closing = True
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()
        try:
            self._connection.close(self._failure is not None)
        except apsw.Error as error:
            log.warning("the journal %s did not close cleanly: %s", self._path, error)
        os.close(self._lock)

    @property
    def size_bytes(self) -> int:
        """Of the database and its log on disk."""
        total = 0
        for path in (self._path, self._path.with_name(FILE_NAME + "-wal")):
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
        return total

    # --- the writer's thread -----------------------------------------------------------------------------------------

    def _write_groups(self) -> None:
        is_last = False
        while not is_last:
            group, is_last = self._next_group()
            try:
                self._commit([record for records, _, _ in group for record in records])
            except (apsw.Error, OSError, MemoryError) as error:
                self._fail(_journal_error(error, f"the journal {self._path} cannot be written"))
                return
            now_s = time.monotonic()
            for _, durable, queued_s in group:
                durable(now_s - queued_s)

    def _next_group(self) -> tuple[list[_Batch], bool]:
        """Wait for a batch; take it and all that are queued behind it. True with the last group of all."""
        group: list[_Batch] = []
        batch = self._queue.get()
        while batch is not None:
            group.append(batch)
            if self._queue.empty():
                return group, False
            batch = self._queue.get()
        return group, True

    def _commit(self, records: Sequence[Record]) -> None:
        if len(records) > ROW_RECORDS_MAX:
            with self._transaction():
                self._insert(records)
        else:
            self._insert(records)  # one row, and a statement is a transaction of its own

    def _fail(self, error: JournalError) -> None:
        log.critical("%s; nothing more is acknowledged", error)
        with self._mutex:
            self._failure = error
            callback = self._on_failure
        if callback is not None:
            callback(error)

    def _transaction(self) -> _Transaction:
        return _Transaction(self._connection)

    def _insert(self, records: Sequence[Record]) -> None:
        seq = self._last_seq
        for first in range(0, len(records), ROW_RECORDS_MAX):
            seq += 1
            content = encode_batch(seq, records[first : first + ROW_RECORDS_MAX])
            self._connection.execute("INSERT INTO batches (seq, content) VALUES (?, ?)", (seq, content))
        self._last_seq = seq


class _Transaction:
    """`BEGIN IMMEDIATE` … `COMMIT`; after an error nothing of it remains."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._connection.execute("COMMIT")
        elif self._connection.in_transaction:
            self._connection.execute("ROLLBACK")


def _connect(path: Path) -> apsw.Connection:
    flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_NOFOLLOW
    if not path.exists():
        path.touch(mode=0o600)
    connection = apsw.Connection(os.path.realpath(path.parent) + "/" + path.name, flags)
    # Exclusive: no shared memory file, and nobody else can write behind our back.
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    assert mode is not None
    if mode[0] != "wal":
        connection.close(True)
        raise JournalError(f"the journal {path} cannot be switched to a write-ahead log (mode {mode[0]!r})")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
    return connection


def _check_identity(connection: apsw.Connection, path: Path, cluster: ClusterId) -> None:
    """Refuse another cluster's journal and a newer one's; mark a new one as ours."""
    with _Transaction(connection):
        connection.execute(_TABLES)
        meta: dict[str, object] = {
            str(name): value for name, value in connection.execute("SELECT name, value FROM meta")
        }
        if not meta:
            connection.execute("INSERT INTO meta VALUES ('format', ?), ('cluster', ?)", (FORMAT, cluster))
            return
    found = meta.get("format")
    if not isinstance(found, int) or found > FORMAT:
        raise JournalError(
            f"the journal {path} has format {found}, and this version knows {FORMAT} at most: "
            "it was written by a newer Herder"
        )
    if meta.get("cluster") != cluster:
        raise JournalError(
            f"the journal {path} belongs to the cluster {meta.get('cluster')}, not to {cluster}: "
            "name another --state-dir"
        )


def _scalar(connection: apsw.Connection, query: str) -> int:
    row = connection.execute(query).fetchone()
    assert row is not None
    value = row[0]
    assert isinstance(value, int)
    return value


def _journal_error(error: BaseException, what: str) -> JournalError:
    if isinstance(error, apsw.FullError) or (isinstance(error, OSError) and error.errno == 28):
        return JournalFull(f"{what}: no space left on its disk")
    if isinstance(error, apsw.NotADBError | apsw.CorruptError):
        return JournalError(f"{what}: the file is damaged ({error})")
    return JournalError(f"{what}: {error}")

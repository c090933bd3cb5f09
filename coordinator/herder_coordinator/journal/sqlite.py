"""The journal's store in SQLite: one file in the state folder, one connection, one thread at a time. The default.

WAL with `synchronous=FULL`: the log is synced before a commit returns. Rows are inserted, never updated. The lock on
the database is exclusive: no shared memory file, and nobody else can write behind our back.

What SQLite would do in silence is refused here: when it recovers, it ends the write-ahead log at the first frame whose
checksum is wrong, whatever follows (`wal.py`).

When little is left on its disk, new submissions are refused. A spare file lies beside the database: deleted when the
disk is full all the same, it lets what runs end."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import apsw

from herder_coordinator.journal import folder
from herder_coordinator.journal.interface import JournalDamaged, JournalError, JournalFull
from herder_coordinator.journal.store import SLICE_BYTES, SLICE_ROWS, Base, Row, part_number
from herder_coordinator.journal.stored import COMPACT_BYTES, StoredJournal
from herder_coordinator.journal.wal import WriteAheadLog
from herder_shared.ids import ClusterId
from herder_shared.limits import KIB, MIB

log = logging.getLogger(__name__)

#: Version of the tables and of the meaning of records. A newer one is refused. 2: snapshots have a table of their own.
FORMAT = 2
FILE_NAME = "journal.sqlite"
LOG_NAME = FILE_NAME + "-wal"
#: There once the first journal has begun: without it an empty folder is a new one, with it a journal is missing.
MARK_NAME = "journal.began"
SPARE_NAME = "journal.spare"
#: Set aside for a full disk: this share of the disk, and this much at most (the ends of some 50,000 tasks).
SPARE_SHARE = 20
SPARE_BYTES_MAX = 16 * MIB
#: In spares: less than this left is little (what clients have under way must still fit), this much is enough again.
LOW_SPARES = 4
ENOUGH_SPARES = 5
#: WAL pages (4 KiB) between checkpoints: 16 MiB.
_CHECKPOINT_PAGES = 4_096
#: How often a spare file that was used is tried to be made again.
_SPARE_AGAIN_S = 1.0

_TABLES = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS epochs (epoch INTEGER PRIMARY KEY);
CREATE TABLE IF NOT EXISTS batches (seq INTEGER PRIMARY KEY, content BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS parts (number INTEGER PRIMARY KEY, content BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS bases (generation INTEGER PRIMARY KEY, parts INTEGER NOT NULL, upto INTEGER NOT NULL);
"""


def open_journal(
    state_dir: Path, cluster: ClusterId, *, compact_bytes: int = COMPACT_BYTES, repair: bool = False
) -> StoredJournal:
    """Take the folder and read what the journal is.

    Raises:
        JournalLocked: another coordinator has it.
        JournalFull: no space to open it.
        JournalDamaged: what was acknowledged cannot all be read (with `repair`: is read as far as it can be).
        JournalError: the folder cannot serve, or the journal is another cluster's, or newer.
    """
    store = SqliteStore.open(state_dir, cluster, repair=repair)
    journal = StoredJournal(store, cut_folder=state_dir, compact_bytes=compact_bytes, repair=repair)
    if journal.dropped is not None and store.log_damage:
        journal.dropped.begin(store.log_damage)
    return journal


class SqliteStore:
    """See `store.Store`. Owns its connection and its lock."""

    beat_s: float | None = None

    def __init__(self, state_dir: Path, cluster: ClusterId, connection: apsw.Connection, lock: int) -> None:
        self.cluster = cluster
        self.label = f"the journal {state_dir / FILE_NAME}"
        self._folder = state_dir
        self._connection = connection
        self._lock = lock
        self._spare_s = 0.0
        #: With `repair`: what SQLite has cut off the write-ahead log although it was acknowledged.
        self.log_damage = ""
        self.epoch = _scalar(connection, "SELECT coalesce(max(epoch), 0) FROM epochs") + 1
        self.base = _newest_base(connection)
        self.last_seq = max(_scalar(connection, "SELECT coalesce(max(seq), 0) FROM batches"), self.base.upto)

    @classmethod
    def open(cls, state_dir: Path, cluster: ClusterId, *, repair: bool = False) -> SqliteStore:
        """See `open_journal`."""
        folder.prepare(state_dir)
        lock = folder.lock(state_dir)
        connection: apsw.Connection | None = None
        try:
            _check_presence(state_dir)
            write_ahead_log = WriteAheadLog.read(state_dir / LOG_NAME)
            connection = _connect(state_dir / FILE_NAME)
            damage = _check_log(connection, write_ahead_log, repair=repair)
            _check_identity(connection, state_dir / FILE_NAME, cluster)
            folder.sync(state_dir)
            store = cls(state_dir, cluster, connection, lock)
            store.log_damage = damage
            return store
        except BaseException as error:
            if connection is not None:
                connection.close(True)
            os.close(lock)
            if isinstance(error, apsw.Error | OSError):
                raise _journal_error(error, f"the journal {state_dir / FILE_NAME} cannot be opened") from error
            raise

    def batches(self, after: int, upto: int | None = None) -> list[Row]:
        """See `store.Store`."""
        query = "SELECT seq, content FROM batches WHERE seq > ? AND seq <= ? ORDER BY seq"
        return self._slice(query, (after, 2**63 - 1 if upto is None else upto), f"after batch {after}")

    def parts(self, after: int) -> list[Row]:
        """See `store.Store`."""
        query = "SELECT number, content FROM parts WHERE number > ? AND number < ? ORDER BY number"
        return self._slice(query, (after, part_number(self.base.generation + 1, 0)), "in its snapshot")

    def _slice(self, query: str, bounds: tuple[int, int], where: str) -> list[Row]:
        rows: list[Row] = []
        size_bytes = 0
        with self._wrapped(f"{self.label} cannot be read {where}"):
            cursor = self._connection.execute(query, bounds)
            for number, content in cursor:
                rows.append((number, content))
                size_bytes += len(content)
                if size_bytes >= SLICE_BYTES or len(rows) >= SLICE_ROWS:
                    break
            cursor.close(True)
        return rows

    def insert(self, rows: Sequence[Row]) -> None:
        """See `store.Store`."""
        with self._wrapped(f"{self.label} cannot be written"):
            if len(rows) == 1:
                self._connection.execute("INSERT INTO batches VALUES (?, ?)", rows[0])  # a transaction of its own
            else:
                with self._transaction():
                    self._connection.executemany("INSERT INTO batches VALUES (?, ?)", rows)
        self.last_seq = rows[-1][0]

    def add_parts(self, rows: Sequence[Row]) -> None:
        """See `store.Store`."""
        with self._wrapped(f"a snapshot cannot be written to {self.label}"), self._transaction():
            self._connection.executemany("INSERT INTO parts VALUES (?, ?)", rows)

    def adopt(self, base: Base) -> None:
        """See `store.Store`."""
        with self._wrapped(f"a snapshot cannot be written to {self.label}"):
            self._insert_base(base)
        self.base = base

    def drop_remainder(self) -> bool:
        """See `store.Store`."""
        generation = self.base.generation
        own = (part_number(generation, 0), part_number(generation + 1, 0))
        with self._wrapped(f"{self.label} cannot be compacted"), self._transaction():
            gone = self._delete("batches", "seq", "<=", self.base.upto)
            gone += self._delete("parts", "number", "<", own[0]) + self._delete("parts", "number", ">=", own[1])
            gone += self._delete("bases", "generation", "<", generation)
        return gone > 0

    def _delete(self, table: str, key: str, compared: str, bound: int) -> int:
        chosen = f"SELECT {key} FROM {table} WHERE {key} {compared} ? LIMIT ?"
        self._connection.execute(f"DELETE FROM {table} WHERE {key} IN ({chosen})", (bound, SLICE_ROWS))
        return self._connection.changes()

    def replace(self, rows: Iterable[Row], base: Base) -> None:
        """See `store.Store`."""
        with self._wrapped(f"the snapshot cannot be written to {self.label}"):
            with self._transaction():
                self._connection.execute("INSERT INTO epochs (epoch) VALUES (?)", (self.epoch,))
                self._connection.execute("DELETE FROM batches")
                self._connection.execute("DELETE FROM parts WHERE number >= ?", (part_number(base.generation, 0),))
                count = 0
                for row in rows:
                    self._connection.execute("INSERT INTO parts VALUES (?, ?)", row)
                    count += 1
                self.base = Base(base.generation, count, base.upto)
                self._connection.execute("DELETE FROM parts WHERE number < ?", (part_number(base.generation, 0),))
                self._connection.execute("DELETE FROM bases")
                self._insert_base(self.base)
                self._connection.execute("UPDATE meta SET value = ? WHERE name = 'format'", (FORMAT,))
            self._connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
            (self._folder / MARK_NAME).touch(mode=0o600)
            folder.sync(self._folder)
        self._make_spare()

    def _insert_base(self, base: Base) -> None:
        self._connection.execute("INSERT INTO bases VALUES (?, ?, ?)", (base.generation, base.parts, base.upto))

    def beat(self) -> None:
        """Nobody watches."""

    def spare(self) -> bool:
        """See `store.Store`."""
        try:
            (self._folder / SPARE_NAME).unlink()
        except OSError:
            return False
        self._spare_s = time.monotonic() + _SPARE_AGAIN_S
        return True

    def shortage(self) -> str:
        """See `store.Store`."""
        try:
            disk = os.statvfs(self._folder)
        except OSError:
            return ""
        free_bytes = disk.f_bavail * disk.f_frsize
        if not disk.f_blocks or free_bytes >= LOW_SPARES * _spare_bytes(disk):
            return ""  # (some file systems do not say how large they are)
        return f"{free_bytes // KIB} KiB are left on the disk of {self.label}"

    def restore_spare(self) -> bool:
        """See `store.Store`."""
        now_s = time.monotonic()
        if now_s < self._spare_s:
            return False
        self._spare_s = now_s + _SPARE_AGAIN_S
        disk = os.statvfs(self._folder)
        if disk.f_blocks and disk.f_bavail * disk.f_frsize < ENOUGH_SPARES * _spare_bytes(disk):
            return False
        return self._make_spare()

    def _make_spare(self) -> bool:
        path = self._folder / SPARE_NAME
        descriptor = -1
        try:
            size_bytes = _spare_bytes(os.statvfs(self._folder))
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            if os.fstat(descriptor).st_size != size_bytes:
                os.ftruncate(descriptor, 0)
                os.posix_fallocate(descriptor, 0, size_bytes)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                log.warning("no room can be set aside in %s for a full disk: %s", self._folder, error.strerror)
                return True
            path.unlink(missing_ok=True)
            return False
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        return True

    def close(self, *, has_failed: bool) -> None:
        """See `store.Store`."""
        try:
            self._connection.close(has_failed)
        except apsw.Error as error:
            log.warning("%s did not close cleanly: %s", self.label, error)
        os.close(self._lock)

    @property
    def size_bytes(self) -> int:
        """Of the database and its log on disk."""
        total = 0
        for name in (FILE_NAME, LOG_NAME):
            with contextlib.suppress(FileNotFoundError):
                total += (self._folder / name).stat().st_size
        return total

    def _transaction(self) -> _Transaction:
        return _Transaction(self._connection)

    @contextlib.contextmanager
    def _wrapped(self, what: str) -> Iterator[None]:
        try:
            yield
        except (apsw.Error, OSError, MemoryError) as error:
            raise _journal_error(error, what) from error


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


def _spare_bytes(disk: os.statvfs_result) -> int:
    share = disk.f_blocks * disk.f_frsize // SPARE_SHARE
    return min(SPARE_BYTES_MAX, max(64 * KIB, share // (4 * KIB) * (4 * KIB)))


def _check_presence(state_dir: Path) -> None:
    """A folder in which a journal has begun and is no more must not become a new cluster's in silence."""
    database, mark = state_dir / FILE_NAME, state_dir / MARK_NAME
    if mark.exists() and (not database.exists() or not database.stat().st_size):
        raise JournalDamaged(
            f"the journal {database} is missing, and a coordinator has lived in its folder: restore it from a copy; if "
            f"it is gone for good, with all jobs in it, delete {mark} to begin an empty one"
        )


def _connect(path: Path) -> apsw.Connection:
    flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_NOFOLLOW
    if not path.exists():
        path.touch(mode=0o600)
    connection = apsw.Connection(os.path.realpath(path.parent) + "/" + path.name, flags)
    try:
        # Until the journal has begun the write-ahead log stays as it is, whatever comes: it may be evidence.
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        assert mode is not None
        if mode[0] != "wal":
            raise JournalError(f"the journal {path} cannot be switched to a write-ahead log (mode {mode[0]!r})")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
    except BaseException:
        connection.close(True)
        raise
    return connection


def _check_log(connection: apsw.Connection, found: WriteAheadLog | None, *, repair: bool) -> str:
    """Compare what SQLite took of its log with what is in it. What was lost that had been acknowledged; else "".

    Raises:
        JournalDamaged: just that, without `repair`.
    """
    if found is None:
        return ""
    connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()  # it recovers
    taken, _ = connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
    damage = found.damage(max(taken, 0))
    if damage and not repair:
        raise JournalDamaged(f"{damage}: not started, so that nothing acknowledged is dropped in silence. Restore the "
                             "state folder from a copy, or see what `--repair` would drop")  # fmt: skip
    kept, size_bytes = found.keep_tail(max(taken, 0))
    if size_bytes and not damage:
        text = "%s ends in %d damaged bytes, of a transaction that was not complete: cut, kept in %s"
        log.warning(text, found.path, size_bytes, kept)
    return damage


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


# --- the rest --------------------------------------------------------------------------------------------------------


def _newest_base(connection: apsw.Connection) -> Base:
    row = connection.execute("SELECT generation, parts, upto FROM bases ORDER BY generation DESC LIMIT 1").fetchone()
    return Base(*row) if row is not None else Base()


def _scalar(connection: apsw.Connection, query: str) -> int:
    row = connection.execute(query).fetchone()
    assert row is not None
    value = row[0]
    assert isinstance(value, int)
    return value


def _journal_error(error: BaseException, what: str) -> JournalError:
    if isinstance(error, apsw.FullError) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        return JournalFull(f"{what}: no space left on its disk")
    if isinstance(error, apsw.NotADBError | apsw.CorruptError):
        return JournalDamaged(f"{what}: the file is damaged ({error}). Restore the state folder from a copy")
    return JournalError(f"{what}: {error}")

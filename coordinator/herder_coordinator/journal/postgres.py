"""The journal's store in PostgreSQL, for those whom one machine no longer serves: others stand by to take over.

Theory of operation. Three things keep two coordinators from writing one history:

1. An advisory lock, held by the database session. A coordinator that cannot have it stands by. A killed holder's
   session ends with its socket, and the lock is free at once; that of a machine which lost its power after some
   seconds, by keepalives.
2. A holder that is stopped or cut off keeps its session. So it *beats*: each write counts up a number in the one row
   of `leader`, a tenth of a lease apart at most. A standby that sees the number stand still for two thirds of a lease,
   by its own clock, ends the holder's session.
3. Whoever has the lock raises the epoch in that row before it reads anything; and every statement that writes begins
   with `UPDATE leader … WHERE epoch = mine`. One that comes late, by whatever way, changes nothing, and its coordinator
   ends. So the fence is the row; the lock only says whose turn it is.

A connection that breaks is a storage error: fail-stop. The program that is started again is a standby, or the holder.

`synchronous_commit` is on for our session whatever the server's default is. Rows are as in SQLite, in a schema
`herder`; a database holds one cluster's. Blobs are not in it: see docs/guides/cluster.md.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, LiteralString
from urllib.parse import parse_qs, urlsplit

from herder_coordinator.journal.interface import (
    JournalError,
    JournalFenced,
    JournalFull,
    JournalLocked,
    StandBy,
    StandbyEnded,
)
from herder_coordinator.journal.store import SLICE_BYTES, SLICE_ROWS, Base, Row, part_number
from herder_coordinator.journal.stored import COMPACT_BYTES, StoredJournal
from herder_shared.errors import ConfigError
from herder_shared.ids import ClusterId
from herder_shared.limits import LEASE_S

try:
    import psycopg
    from psycopg import errors
except ImportError as missing:
    raise ConfigError(
        "a journal in PostgreSQL needs psycopg: install herder[postgres] (`pip install 'herder[postgres]'`)"
    ) from missing

log = logging.getLogger(__name__)

#: Version of the tables and of the meaning of records. A newer one is refused.
FORMAT = 1
#: Of the advisory lock: "HERD", and what it is for.
_LOCK = (0x48455244, 1)
#: In parts of a lease: how far apart beats are at most; after how long without one the holder is given up; how often a
#: The session of a coordinator that has just ended lets go of its lock within this.
LET_GO_S = 1.0
_LET_GO_LOOK_S = 0.05
#: standby looks, and that in seconds at most.
_BEATS_PER_LEASE = 10
_SILENT_LEASES = 2 / 3
_LOOKS_PER_LEASE = 20
_LOOK_S_MAX = 1.0
_CONNECT_TIMEOUT_S = 10

_TABLES = """
CREATE SCHEMA IF NOT EXISTS herder;
CREATE TABLE IF NOT EXISTS herder.meta (name text PRIMARY KEY, value text NOT NULL);
CREATE TABLE IF NOT EXISTS herder.leader
    (one boolean PRIMARY KEY DEFAULT true CHECK (one),
     epoch bigint NOT NULL, beats bigint NOT NULL, holder text NOT NULL);
CREATE TABLE IF NOT EXISTS herder.batches (seq bigint PRIMARY KEY, content bytea NOT NULL);
CREATE TABLE IF NOT EXISTS herder.parts (number bigint PRIMARY KEY, content bytea NOT NULL);
CREATE TABLE IF NOT EXISTS herder.bases (generation bigint PRIMARY KEY, parts bigint NOT NULL, upto bigint NOT NULL);
ALTER TABLE herder.batches ALTER content SET STORAGE EXTERNAL;
ALTER TABLE herder.parts ALTER content SET STORAGE EXTERNAL;
"""
#: What each statement that writes begins with: of another epoch, it changes nothing.
_FENCE: LiteralString = "WITH me AS (UPDATE herder.leader SET beats = beats + 1 WHERE epoch = %s RETURNING 1) "
_INSERT_ROWS: LiteralString = "SELECT n, c FROM me, unnest(%b::bigint[], %b::bytea[]) AS rows(n, c)"


def open_journal(
    url: str,
    state_dir: Path,
    cluster: ClusterId,
    *,
    lease_s: float = LEASE_S,
    stand_by: StandBy | None = None,
    compact_bytes: int = COMPACT_BYTES,
    repair: bool = False,
) -> StoredJournal:
    """Hold the journal, once nobody else does.

    Raises:
        JournalLocked: another coordinator holds it, and there is no `stand_by`.
        StandbyEnded: told to end before it was our turn.
        ConfigError: the URL cannot be used.
        JournalError: the database cannot be reached or serve, or holds another cluster's journal, or a newer one.
    """
    store = PostgresStore.open(url, cluster, lease_s=lease_s, stand_by=stand_by)
    return StoredJournal(store, cut_folder=state_dir, compact_bytes=compact_bytes, repair=repair)


def check_url(url: str) -> None:
    """Raises:
    ConfigError: it is none, or holds a password: arguments, environment and logs are no place for one.
    """
    parts = urlsplit(url)
    if parts.scheme not in {"postgresql", "postgres"}:
        raise ConfigError(
            f"{url!r} is not a store: leave it out for SQLite in the state folder, or name postgresql://…"
        )
    if parts.password is not None or "password" in parse_qs(parts.query):
        raise ConfigError(
            "the URL of the store holds a password: leave it out, and put it into ~/.pgpass (mode 0600) or a file "
            "named by `?passfile=…`"
        )


class PostgresStore:
    """See `store.Store`. Owns its connection, whose session has the lock."""

    def __init__(
        self, connection: psycopg.Connection[Any], cluster: ClusterId, epoch: int, *, label: str, lease_s: float
    ) -> None:
        self.cluster = cluster
        self.label = label
        self.epoch = epoch
        self.beat_s: float | None = lease_s / _BEATS_PER_LEASE
        self._connection = connection
        self._written_s = time.monotonic()
        self._size_bytes = 0
        found = self._read("SELECT generation, parts, upto FROM herder.bases ORDER BY generation DESC LIMIT 1", ())
        self.base = Base(*found[0]) if found else Base()
        last = self._read("SELECT coalesce(max(seq), 0) FROM herder.batches", ())
        self.last_seq = max(last[0][0], self.base.upto)

    @classmethod
    def open(
        cls, url: str, cluster: ClusterId, *, lease_s: float = LEASE_S, stand_by: StandBy | None = None
    ) -> PostgresStore:
        """See `open_journal`."""
        check_url(url)
        connection = _Candidate(url, lease_s, stand_by).wait_for_lock()
        label = f"the journal {_place(connection)}"
        try:
            with _wrapped(f"{label} cannot be opened"):
                _check_server(connection, label)
                with connection.transaction():
                    connection.execute(_TABLES)
                    _check_identity(connection, label, cluster)
                    epoch = _raise_epoch(connection)
                return cls(connection, cluster, epoch, label=label, lease_s=lease_s)
        except BaseException:
            connection.close()
            raise

    # --- reading -----------------------------------------------------------------------------------------------------

    def batches(self, after: int, upto: int | None = None) -> list[Row]:
        """See `store.Store`."""
        query: LiteralString = (
            "SELECT seq, content FROM herder.batches WHERE seq > %s AND seq <= %s ORDER BY seq LIMIT %s"
        )
        return self._slice(query, (after, 2**63 - 1 if upto is None else upto))

    def parts(self, after: int) -> list[Row]:
        """See `store.Store`."""
        query: LiteralString = (
            "SELECT number, content FROM herder.parts WHERE number > %s AND number < %s ORDER BY number LIMIT %s"
        )
        return self._slice(query, (after, part_number(self.base.generation + 1, 0)))

    def _slice(self, query: LiteralString, bounds: tuple[int, int]) -> list[Row]:
        """Also shows that we live: a replay may take longer than a lease."""
        self.beat()
        rows: list[Row] = []
        while sum(len(content) for _, content in rows) < SLICE_BYTES and len(rows) < SLICE_ROWS:
            found = self._read(query, (rows[-1][0] if rows else bounds[0], bounds[1], 4))
            rows += [(number, bytes(content)) for number, content in found]
            if len(found) < 4:
                break
        return rows

    def _read(self, query: LiteralString, parameters: tuple[object, ...]) -> list[Any]:
        with _wrapped(f"{self.label} cannot be read"):
            return self._connection.execute(query, parameters, binary=True).fetchall()

    # --- writing -----------------------------------------------------------------------------------------------------

    def insert(self, rows: Sequence[Row]) -> None:
        """See `store.Store`. One statement, one round trip."""
        self._insert_rows("INSERT INTO herder.batches ", rows)
        self.last_seq = rows[-1][0]

    def add_parts(self, rows: Sequence[Row]) -> None:
        """See `store.Store`."""
        self._insert_rows("INSERT INTO herder.parts ", rows)

    def _insert_rows(self, into: LiteralString, rows: Sequence[Row]) -> None:
        numbers, contents = [number for number, _ in rows], [content for _, content in rows]
        self._write(_FENCE + into + _INSERT_ROWS, (self.epoch, numbers, contents), len(rows))

    def adopt(self, base: Base) -> None:
        """See `store.Store`."""
        statement: LiteralString = "INSERT INTO herder.bases SELECT %s, %s, %s FROM me"
        self._write(_FENCE + statement, (self.epoch, base.generation, base.parts, base.upto), 1)
        self.base = base

    def drop_remainder(self) -> bool:
        """See `store.Store`."""
        generation = self.base.generation
        own = (part_number(generation, 0), part_number(generation + 1, 0))
        gone = self._delete("batches", "seq", "<=", self.base.upto)
        gone += self._delete("parts", "number", "<", own[0]) + self._delete("parts", "number", ">=", own[1])
        gone += self._delete("bases", "generation", "<", generation)
        return gone > 0

    def _delete(self, table: LiteralString, key: LiteralString, compared: LiteralString, bound: int) -> int:
        statement = (
            f"DELETE FROM herder.{table} WHERE {key} IN"
            f" (SELECT {key} FROM herder.{table}, me WHERE {key} {compared} %s LIMIT %s)"
        )
        return self._write(_FENCE + statement, (self.epoch, bound, SLICE_ROWS))

    def replace(self, rows: Iterable[Row], base: Base) -> None:
        """See `store.Store`. The epoch is durable since we hold the journal; the parts come in slices, so that the
        beats between them are seen, and the last word is one row. The old rows are dropped afterwards."""
        while self.drop_remainder():
            pass
        count = 0
        slice_rows: list[Row] = []
        for row in rows:
            slice_rows.append(row)
            count += 1
            if sum(len(content) for _, content in slice_rows) >= SLICE_BYTES:
                self.add_parts(slice_rows)
                slice_rows = []
        if slice_rows:
            self.add_parts(slice_rows)
        self.adopt(Base(base.generation, count, base.upto))
        while self.drop_remainder():
            pass
        self._measure()

    def beat(self) -> None:
        """See `store.Store`."""
        assert self.beat_s is not None
        if time.monotonic() - self._written_s >= self.beat_s:
            self._write("UPDATE herder.leader SET beats = beats + 1 WHERE epoch = %s", (self.epoch,), 1)
            self._measure()

    def _write(self, statement: LiteralString, parameters: tuple[object, ...], expected: int | None = None) -> int:
        """How many rows it changed.

        Raises:
            JournalFenced: none, because the epoch is another's.
        """
        with _wrapped(f"{self.label} cannot be written"):
            count = self._connection.execute(statement, parameters).rowcount
        if expected is not None and count != expected:
            raise JournalFenced(
                f"another coordinator has taken over {self.label}, of which this one was the holder in epoch "
                f"{self.epoch}: start it again to stand by"
            )
        self._written_s = time.monotonic()
        return count

    def _measure(self) -> None:
        query: LiteralString = (
            "SELECT pg_total_relation_size('herder.batches') + pg_total_relation_size('herder.parts')"
        )
        self._size_bytes = self._read(query, ())[0][0]

    # --- the rest ----------------------------------------------------------------------------------------------------

    def shortage(self) -> str:
        """The database's disk is not ours to look at."""
        return ""

    def spare(self) -> bool:
        """The database's disk is not ours: there is nothing to free."""
        return False

    def restore_spare(self) -> bool:
        """Whether there is room shows at the next write."""
        return True

    def close(self, *, has_failed: bool) -> None:
        """See `store.Store`. The lock goes with the session."""
        del has_failed
        self._connection.close()

    @property
    def size_bytes(self) -> int:
        """As of the last beat."""
        return self._size_bytes


class _Candidate:
    """Waits for the lock, and for a holder that has gone silent."""

    def __init__(self, url: str, lease_s: float, stand_by: StandBy | None) -> None:
        self._url = url
        self._lease_s = lease_s
        self._stand_by = stand_by
        self._look_s = min(_LOOK_S_MAX, lease_s / _LOOKS_PER_LEASE)
        self._seen: Any = None
        self._seen_s = time.monotonic()

    def wait_for_lock(self) -> psycopg.Connection[Any]:
        """A connection whose session has the lock."""
        connection: psycopg.Connection[Any] | None = None
        was_reached = False
        began_s = time.monotonic()
        try:
            while True:
                try:
                    if connection is None:
                        connection = _connect(self._url, self._lease_s)
                        was_reached = True
                    if _take_lock(connection):
                        return connection
                    reason = self._watch(connection)
                except psycopg.Error as error:
                    if connection is not None:
                        connection.close()
                        connection = None
                    if not was_reached or self._stand_by is None:
                        raise _journal_error(error, "the database of the journal cannot be used") from error
                    reason = f"the database does not answer: {_text(error)}"
                if self._stand_by is None:
                    if time.monotonic() - began_s >= LET_GO_S:
                        raise JournalLocked(f"another coordinator holds the journal: {reason}")
                    time.sleep(_LET_GO_LOOK_S)
                    continue
                if not self._stand_by(reason, self._look_s):
                    raise StandbyEnded
        except BaseException:
            if connection is not None:
                connection.close()
            raise

    def _watch(self, connection: psycopg.Connection[Any]) -> str:
        """Who holds it. If it has been silent for too long, end its session."""
        try:
            found = connection.execute("SELECT epoch, beats, holder FROM herder.leader").fetchone()
        except errors.UndefinedTable:
            found = None
        now_s = time.monotonic()
        key = found and found[:2]
        if key != self._seen:
            self._seen, self._seen_s = key, now_s
        holder = f"{found[2]}, epoch {found[0]}" if found else "a coordinator that is just starting"
        silent_s = now_s - self._seen_s
        if silent_s > self._lease_s * _SILENT_LEASES:
            log.warning("the holder (%s) has been silent for %.1f s: ending its session", holder, silent_s)
            self._seen_s = now_s
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted"
                " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
                " AND classid = %s AND objid = %s AND objsubid = 2",
                _LOCK,
            )
        return holder


def _connect(url: str, lease_s: float) -> psycopg.Connection[Any]:
    lease_ms = int(lease_s * 1000)
    keepalive_s = max(1, int(lease_s / 6))
    options = (
        f"-c synchronous_commit=on -c idle_in_transaction_session_timeout={lease_ms} -c client_min_messages=warning"
        f" -c tcp_keepalives_idle={keepalive_s} -c tcp_keepalives_interval={keepalive_s} -c tcp_keepalives_count=2"
        f" -c tcp_user_timeout={lease_ms}"
    )
    return psycopg.connect(
        url,
        autocommit=True,
        connect_timeout=_CONNECT_TIMEOUT_S,
        keepalives=1,
        keepalives_idle=keepalive_s,
        keepalives_interval=keepalive_s,
        keepalives_count=2,
        tcp_user_timeout=lease_ms,
        options=options,
        application_name="herder coordinator",
    )


def _take_lock(connection: psycopg.Connection[Any]) -> bool:
    found = connection.execute("SELECT pg_try_advisory_lock(%s, %s)", _LOCK).fetchone()
    return found is not None and bool(found[0])


def _raise_epoch(connection: psycopg.Connection[Any]) -> int:
    """From now on whoever held it before changes nothing any more."""
    holder = f"pid {os.getpid()} on host {socket.gethostname()}"
    found = connection.execute(
        "INSERT INTO herder.leader (epoch, beats, holder) VALUES (1, 0, %s)"
        " ON CONFLICT (one) DO UPDATE SET epoch = leader.epoch + 1, beats = 0, holder = excluded.holder"
        " RETURNING epoch",
        (holder,),
    ).fetchone()
    assert found is not None
    epoch: int = found[0]
    return epoch


def _check_server(connection: psycopg.Connection[Any], label: str) -> None:
    found = connection.execute("SELECT pg_is_in_recovery(), current_setting('fsync')").fetchone()
    assert found is not None
    if found[0]:
        raise JournalError(f"{label} is on a read-only replica: name the primary server")
    if found[1] != "on":
        log.warning("%s is on a server with fsync = off: what is acknowledged does not survive its power", label)


def _check_identity(connection: psycopg.Connection[Any], label: str, cluster: ClusterId) -> None:
    """Refuse another cluster's journal and a newer one's; mark a new one as ours."""
    meta: dict[str, str] = dict(connection.execute("SELECT name, value FROM herder.meta").fetchall())
    if not meta:
        connection.execute(
            "INSERT INTO herder.meta VALUES ('format', %s), ('cluster', %s)", (str(FORMAT), str(cluster))
        )
        return
    if int(meta["format"]) > FORMAT:
        raise JournalError(
            f"{label} has format {meta['format']}, and this version knows {FORMAT} at most: "
            "it was written by a newer Herder"
        )
    if meta["cluster"] != cluster:
        raise JournalError(f"{label} belongs to the cluster {meta['cluster']}, not to {cluster}: name another database")


def _place(connection: psycopg.Connection[Any]) -> str:
    info = connection.info
    return f"postgresql://{info.user}@{info.host or 'localhost'}:{info.port}/{info.dbname}"


@contextlib.contextmanager
def _wrapped(what: str) -> Iterator[None]:
    try:
        yield
    except (psycopg.Error, OSError, MemoryError) as error:
        raise _journal_error(error, what) from error


def _journal_error(error: Exception, what: str) -> JournalError:
    if isinstance(error, errors.DiskFull):
        return JournalFull(f"{what}: no space left on its disk")
    if isinstance(error, errors.AdminShutdown) or "closed the connection" in str(error):
        # The word of why may be lost with the connection.
        return JournalError(f"{what}: the database ended the session; perhaps another coordinator has taken over")
    return JournalError(f"{what}: {_text(error)}")


def _text(error: Exception) -> str:
    return " ".join(str(error).split())

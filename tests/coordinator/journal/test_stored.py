"""What every store's journal must do: it keeps what it called durable, and says clearly why it will not start.

Each test runs on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import pytest

from herder_coordinator.core.records import DrainSet, EpochStarted, Record
from herder_coordinator.journal import postgres, sqlite
from herder_coordinator.journal.interface import JournalDamaged, JournalError, JournalLocked
from herder_coordinator.journal.stored import StoredJournal
from herder_shared.ids import ClusterId, NodeName
from support.postgres import Postgres

CLUSTER = ClusterId("c" * 32)
FIRST: list[Record] = [EpochStarted(CLUSTER, 1)]


def record(number: int, size_bytes: int = 0) -> Record:
    return DrainSet(NodeName(f"n{number}" + "x" * size_bytes), on=True)


class Kind:
    """One kind of store, in one place."""

    def __init__(self, folder: Path, server: Postgres | None) -> None:
        self.folder = folder
        self._server = server
        self.url = server.new_database() if server is not None else ""
        self._opened: list[StoredJournal] = []

    def open(self, cluster: ClusterId = CLUSTER, *, repair: bool = False) -> StoredJournal:
        if self.url:
            # The server lets go of a closed connection's lock when it hears of it, and that may take a moment.
            deadline_s = time.monotonic() + 20.0
            while True:
                try:
                    journal = postgres.open_journal(self.url, self.folder, cluster, repair=repair)
                    break
                except JournalLocked:
                    if not repair or time.monotonic() > deadline_s:
                        raise
                    time.sleep(0.05)
        else:
            journal = sqlite.open_journal(self.folder, cluster, repair=repair)
        self._opened.append(journal)
        return journal

    def damage(self, statement: str) -> None:
        """Change it behind its back. Written for SQLite."""
        if self._server is not None:
            for table in ("batches", "parts", "bases", "meta", "epochs"):
                statement = statement.replace(f" {table}", f" herder.{table}")
            statement = statement.replace("zeroblob(30)", "decode(repeat('00', 30), 'hex')")
            self._server.execute(self.url, statement)
        else:
            connection = apsw.Connection(str(self.folder / sqlite.FILE_NAME))
            connection.execute(statement)
            connection.close()

    def written(self, batches: int) -> None:
        """A journal with a snapshot and so many batches, each its own row."""
        journal = self.open()
        journal.begin(FIRST)
        for number in range(batches):
            append_and_wait(journal, [record(number)])
        journal.close()

    def read(self) -> list[Record]:
        journal = self.open()
        try:
            return list(journal.replay())
        finally:
            journal.close()

    def close(self) -> None:
        for journal in self._opened:
            journal.close()


@pytest.fixture(scope="session", params=["sqlite", "postgres"])
def server(request: pytest.FixtureRequest) -> Postgres | None:
    found: Postgres | None = request.getfixturevalue("postgres") if request.param == "postgres" else None
    return found


@pytest.fixture
def kind(server: Postgres | None, tmp_path: Path) -> Iterator[Kind]:
    store = Kind(tmp_path, server)
    yield store
    store.close()


def append_and_wait(journal: StoredJournal, records: list[Record]) -> None:
    durable = threading.Event()
    journal.append(records, lambda _: durable.set())
    assert durable.wait(60)


def test_what_was_appended_comes_back_in_order(kind: Kind) -> None:
    journal = kind.open()
    journal.begin(FIRST)
    for number in range(50):
        journal.append([record(number), record(number + 1000)], lambda _: None)
    append_and_wait(journal, [])
    journal.close()
    assert kind.read() == FIRST + [each for number in range(50) for each in (record(number), record(number + 1000))]


def test_groups_and_snapshots_larger_than_a_row_come_back_whole(kind: Kind) -> None:
    many = [record(number) for number in range(2_500)]
    large = [record(number, 3_000_000) for number in range(3)]
    journal = kind.open()
    journal.begin(many + large)
    append_and_wait(journal, large + many)
    journal.close()
    assert kind.read() == many + large + large + many


def test_callbacks_come_in_order_and_an_empty_batch_waits_for_those_before_it(kind: Kind) -> None:
    journal = kind.open()
    journal.begin(FIRST)
    order: list[int] = []
    for number in range(20):
        journal.append([record(number)] if number % 2 else [], lambda _, number=number: order.append(number))  # type: ignore[misc]
    append_and_wait(journal, [])
    assert order == list(range(20))


def test_each_start_is_a_new_epoch_and_replaces_older_rows_by_the_snapshot(kind: Kind) -> None:
    kind.written(5)
    journal = kind.open()
    assert journal.epoch == 2
    journal.begin([record(99)])
    append_and_wait(journal, [record(100)])
    journal.close()
    again = kind.open()
    assert again.epoch == 3
    assert list(again.replay()) == [record(99), record(100)]


def test_a_start_that_ends_before_begin_keeps_what_is_there(kind: Kind) -> None:
    kind.written(3)
    before = kind.read()
    assert kind.read() == before == [*FIRST, record(0), record(1), record(2)]


def test_a_second_coordinator_is_told_who_holds_it(kind: Kind) -> None:
    kind.open().begin(FIRST)
    with pytest.raises(JournalLocked, match=rf"pid {os.getpid()} on host {os.uname().nodename}"):
        kind.open()


def test_another_clusters_journal_is_refused(kind: Kind) -> None:
    kind.written(1)
    with pytest.raises(JournalError, match=r"belongs to the cluster c+, not to d+"):
        kind.open(ClusterId("d" * 32))
    assert len(kind.read()) == 2


def test_a_newer_versions_journal_is_refused(kind: Kind) -> None:
    kind.written(1)
    kind.damage(
        "UPDATE meta SET value = '3' WHERE name = 'format'"
        if kind.url
        else "UPDATE meta SET value = 3 WHERE name = 'format'"
    )
    with pytest.raises(JournalError, match="newer Herder"):
        kind.open()


def test_damage_at_the_tail_is_cut_and_said_and_kept(kind: Kind, caplog: pytest.LogCaptureFixture) -> None:
    kind.written(4)
    kind.damage("UPDATE batches SET content = substr(content, 1, 20) WHERE seq >= 3")
    journal = kind.open()
    assert list(journal.replay()) == [*FIRST, record(0), record(1)]
    assert "40 damaged bytes from batch 3 on" in caplog.text
    assert (kind.folder / "journal.cut-3").stat().st_size == 40
    journal.begin(FIRST)
    journal.close()
    assert kind.read() == FIRST


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        (
            "UPDATE batches SET content = zeroblob(30) WHERE seq = 2",
            r"at batch 2, \d+ bytes into it .*batch 3 after it",
        ),
        ("DELETE FROM batches WHERE seq = 2", r"at batch 3, \d+ bytes into it \(batch 2 is missing"),
        ("DELETE FROM batches WHERE seq = 1", r"at batch 2, \d+ bytes into it \(batch 1 is missing"),
        ("UPDATE parts SET content = zeroblob(30) WHERE number > 0", "snapshot .* is damaged 0 bytes into it"),
        ("DELETE FROM parts WHERE number > 0", "snapshot .* has 1 parts, and only 0 are there"),
    ],
    ids=["zeroed", "missing", "first-missing", "snapshot-zeroed", "snapshot-missing"],
)
def test_damage_before_the_tail_refuses_and_says_where_and_repair_says_what_it_drops(
    kind: Kind, statement: str, told: str
) -> None:
    kind.written(4)
    kind.damage(statement)
    with pytest.raises(JournalDamaged, match=told) as refused:
        kind.read()
    assert "--repair" in str(refused.value)
    journal = kind.open(repair=True)
    kept = list(journal.replay())
    assert kept == [*FIRST, record(0), record(1), record(2), record(3)][: len(kept)]
    assert len(kept) < 5
    assert journal.dropped is not None
    report = "\n".join(journal.dropped.report())
    assert "damage" in report or "missing" in report or "only 0" in report
    assert f"{5 - len(kept)} DrainSet" in report or "unreadable" in report
    journal.begin(kept)
    journal.close()
    assert kind.read() == kept


def test_repair_of_a_whole_journal_drops_nothing(kind: Kind) -> None:
    kind.written(2)
    journal = kind.open(repair=True)
    assert list(journal.replay()) == [*FIRST, record(0), record(1)]
    assert journal.dropped is not None
    assert journal.dropped.report() == ["nothing is damaged, and nothing was dropped"]


WRITER = """
import sys
import threading
from pathlib import Path
from herder_coordinator.core.records import DrainSet
from herder_coordinator.journal import postgres, sqlite

folder, url, first = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
wait = threading.Event().wait
if url:
    journal = postgres.open_journal(url, folder, "c" * 32, stand_by=lambda _reason, seconds: not wait(seconds))
else:
    journal = sqlite.open_journal(folder, "c" * 32)
records = list(journal.replay())
journal.begin(records)
room = threading.Semaphore(200)
number = first
while True:
    room.acquire()
    name = f"n{number}"
    journal.append([DrainSet(name, True)], lambda s, name=name: (print(name, flush=True), room.release()))
    number += 1
"""


@pytest.mark.slow
def test_nothing_that_was_called_durable_is_lost_by_kill_9(kind: Kind) -> None:
    acknowledged: list[str] = []
    for life in range(3):
        command = [sys.executable, "-c", WRITER, str(kind.folder), kind.url, str(life * 1_000_000)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(30 + 37 * life):
                acknowledged.append(writer.stdout.readline().strip())
            writer.send_signal(signal.SIGKILL)
            # What was acknowledged before the signal came, and is still in the pipe. The last line may be torn.
            acknowledged += [line.strip() for line in writer.stdout if line.endswith("\n")]
    kept = [each.node for each in kind.read() if isinstance(each, DrainSet)] if not kind.url else patient(kind)
    assert set(acknowledged) <= set(kept)
    assert len(kept) == len(set(kept))


def patient(kind: Kind) -> list[str]:
    """The database takes a moment to notice that a process is gone."""
    wait: Callable[[float], bool] = threading.Event().wait
    journal = postgres.open_journal(kind.url, kind.folder, CLUSTER, stand_by=lambda _reason, seconds: not wait(seconds))
    try:
        return [each.node for each in journal.replay() if isinstance(each, DrainSet)]
    finally:
        journal.close()

"""The journal keeps what it called durable, and says clearly why it will not start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from herder_coordinator.core.records import DrainSet, EpochStarted, Record
from herder_coordinator.journal import folder
from herder_coordinator.journal.interface import JournalError, JournalFull, JournalLocked
from herder_coordinator.journal.sqlite import FILE_NAME, SqliteJournal
from herder_shared.ids import ClusterId, NodeName

CLUSTER = ClusterId("c" * 32)
FIRST: list[Record] = [EpochStarted(CLUSTER, 1)]


def record(number: int) -> Record:
    return DrainSet(NodeName(f"n{number}"), on=True)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[SqliteJournal]:
    opened = SqliteJournal.open(tmp_path, CLUSTER)
    yield opened
    opened.close()


def append_and_wait(journal: SqliteJournal, records: list[Record]) -> None:
    durable = threading.Event()
    journal.append(records, lambda _: durable.set())
    assert durable.wait(10)


def written(state_dir: Path, batches: int) -> None:
    """A journal with a snapshot (row 1) and so many batches, each its own row."""
    journal = SqliteJournal.open(state_dir, CLUSTER)
    journal.begin(FIRST)
    for number in range(batches):
        append_and_wait(journal, [record(number)])
    journal.close()


def damage(state_dir: Path, statement: str) -> None:
    connection = apsw.Connection(str(state_dir / FILE_NAME))
    connection.execute(statement)
    connection.close()


def test_what_was_appended_comes_back_in_order(tmp_path: Path, journal: SqliteJournal) -> None:
    journal.begin(FIRST)
    for number in range(50):
        journal.append([record(number), record(number + 1000)], lambda _: None)
    append_and_wait(journal, [])
    journal.close()
    again = SqliteJournal.open(tmp_path, CLUSTER)
    expected = FIRST + [each for number in range(50) for each in (record(number), record(number + 1000))]
    assert list(again.replay()) == expected
    again.close()


def test_callbacks_come_in_order_and_an_empty_batch_waits_for_those_before_it(journal: SqliteJournal) -> None:
    journal.begin(FIRST)
    order: list[int] = []
    for number in range(20):
        journal.append([record(number)] if number % 2 else [], lambda _, number=number: order.append(number))  # type: ignore[misc]
    append_and_wait(journal, [])
    assert order == list(range(20))


def test_each_start_is_a_new_epoch_and_replaces_older_rows_by_the_snapshot(tmp_path: Path) -> None:
    written(tmp_path, 5)
    journal = SqliteJournal.open(tmp_path, CLUSTER)
    assert journal.epoch == 2
    journal.begin([record(99)])
    append_and_wait(journal, [record(100)])
    journal.close()
    again = SqliteJournal.open(tmp_path, CLUSTER)
    assert again.epoch == 3
    assert list(again.replay()) == [record(99), record(100)]
    again.close()


def test_a_start_that_ends_before_begin_changes_nothing(tmp_path: Path) -> None:
    written(tmp_path, 3)
    journal = SqliteJournal.open(tmp_path, CLUSTER)
    before = list(journal.replay())
    journal.close()
    again = SqliteJournal.open(tmp_path, CLUSTER)
    assert again.epoch == 2
    assert list(again.replay()) == before
    again.close()


def test_a_second_coordinator_is_told_who_holds_the_folder(tmp_path: Path, journal: SqliteJournal) -> None:
    with pytest.raises(JournalLocked, match=rf"pid {os.getpid()} on host {os.uname().nodename}"):
        SqliteJournal.open(tmp_path, CLUSTER)


def test_another_clusters_journal_is_refused(tmp_path: Path) -> None:
    written(tmp_path, 1)
    with pytest.raises(JournalError, match=r"belongs to the cluster c+, not to d+"):
        SqliteJournal.open(tmp_path, ClusterId("d" * 32))
    SqliteJournal.open(tmp_path, CLUSTER).close()


def test_a_newer_versions_journal_is_refused(tmp_path: Path) -> None:
    written(tmp_path, 1)
    damage(tmp_path, "UPDATE meta SET value = 2 WHERE name = 'format'")
    with pytest.raises(JournalError, match="newer Herder"):
        SqliteJournal.open(tmp_path, CLUSTER)


def test_damage_at_the_tail_is_cut_and_said_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path, 4)
    damage(tmp_path, "UPDATE batches SET content = substr(content, 1, 20) WHERE seq >= 4")
    journal = SqliteJournal.open(tmp_path, CLUSTER)
    assert list(journal.replay()) == [*FIRST, record(0), record(1)]
    assert "40 damaged bytes from batch 4 on" in caplog.text
    assert (tmp_path / f"{FILE_NAME}.cut-4").stat().st_size == 40
    journal.begin(FIRST)
    journal.close()
    again = SqliteJournal.open(tmp_path, CLUSTER)
    assert list(again.replay()) == FIRST
    again.close()


@pytest.mark.parametrize(
    "statement",
    ["UPDATE batches SET content = zeroblob(30) WHERE seq = 3", "DELETE FROM batches WHERE seq = 3"],
    ids=["zeroed", "missing"],
)
def test_damage_before_the_tail_refuses_to_start_and_names_the_batch(tmp_path: Path, statement: str) -> None:
    written(tmp_path, 4)
    damage(tmp_path, statement)
    journal = SqliteJournal.open(tmp_path, CLUSTER)
    with pytest.raises(JournalError, match=r"damaged at batch [34] \(.*batch 3"):
        list(journal.replay())
    journal.close()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"garbage" * 1000)
    with pytest.raises(JournalError, match="damaged"):
        SqliteJournal.open(tmp_path, CLUSTER)


def test_a_full_disk_is_told_apart_and_nothing_is_acknowledged_after_it(
    tmp_path: Path, journal: SqliteJournal, caplog: pytest.LogCaptureFixture
) -> None:
    journal.begin(FIRST)
    append_and_wait(journal, [record(0)])
    journal._connection.execute("PRAGMA max_page_count = 8")
    failures: list[JournalError] = []
    failed = threading.Event()

    def note(error: JournalError) -> None:
        failures.append(error)
        failed.set()

    journal.on_failure(note)
    acknowledged: list[str] = []
    journal.append([DrainSet(NodeName("x" * 100_000), on=True)], lambda _: acknowledged.append("the large one"))
    assert failed.wait(10)
    journal.append([record(1)], lambda _: acknowledged.append("one after it"))
    journal.close()
    assert [type(error) for error in failures] == [JournalFull]
    assert "no space left" in str(failures[0])
    assert acknowledged == []
    again = SqliteJournal.open(tmp_path, CLUSTER)
    assert list(again.replay()) == [*FIRST, record(0)]
    again.close()


def test_a_failed_snapshot_leaves_the_old_journal(tmp_path: Path) -> None:
    written(tmp_path, 3)
    journal = SqliteJournal.open(tmp_path, CLUSTER)
    before = list(journal.replay())
    journal._connection.execute("PRAGMA max_page_count = 8")
    with pytest.raises(JournalFull):
        journal.begin([DrainSet(NodeName("x" * 100_000), on=True)])
    journal.close()
    again = SqliteJournal.open(tmp_path, CLUSTER)
    assert list(again.replay()) == before
    again.close()


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="cannot be made"):
        SqliteJournal.open(tmp_path / "file" / "state", CLUSTER)


def test_the_folder_and_its_files_are_private(tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    journal = SqliteJournal.open(state_dir, CLUSTER)
    journal.begin(FIRST)
    assert state_dir.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in state_dir.iterdir()} == {0}
    assert journal.size_bytes > 0
    journal.close()


MOUNTS = """\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
30 22 0:27 / /home rw,relatime shared:15 - nfs4 server:/home rw,vers=4.2
31 22 0:28 / /home/with\\040space rw - tmpfs tmpfs rw
32 22 0:29 / /mnt/gluster rw - fuse.glusterfs host:/v rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/lib/herder", "ext4"),
        ("/home/me/state", "nfs4"),
        ("/homely", "ext4"),
        ("/home/with space/x", "tmpfs"),
        ("/mnt/gluster", "fuse.glusterfs"),
    ],
)
def test_the_file_system_under_a_folder_is_found(path: str, kind: str) -> None:
    assert folder.file_system_of(Path(path), MOUNTS) == kind


def test_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "file_system_of", lambda *_: "nfs4")
    with pytest.raises(JournalError, match=r"network file system \(nfs4\)"):
        SqliteJournal.open(tmp_path, CLUSTER)


WRITER = """
import sys
import threading
from pathlib import Path
from herder_coordinator.core.records import DrainSet
from herder_coordinator.journal.sqlite import SqliteJournal

journal = SqliteJournal.open(Path(sys.argv[1]), "c" * 32)
records = list(journal.replay())
journal.begin(records)
room = threading.Semaphore(200)
number = int(sys.argv[2])
while True:
    room.acquire()
    name = f"n{number}"
    journal.append([DrainSet(name, True)], lambda s, name=name: (print(name, flush=True), room.release()))
    number += 1
"""


@pytest.mark.slow
def test_nothing_that_was_called_durable_is_lost_by_kill_9(tmp_path: Path) -> None:
    acknowledged: list[str] = []
    for life in range(6):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(life * 1_000_000)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(30 + 37 * life):
                acknowledged.append(writer.stdout.readline().strip())
            writer.send_signal(signal.SIGKILL)
            # What was acknowledged before the signal came, and is still in the pipe. The last line may be torn.
            acknowledged += [line.strip() for line in writer.stdout if line.endswith("\n")]
        journal = SqliteJournal.open(tmp_path, CLUSTER)
        assert journal.epoch == life + 2
        kept = [each.node for each in journal.replay() if isinstance(each, DrainSet)]
        journal.close()
        assert set(acknowledged) <= set(kept)
        assert len(kept) == len(set(kept))

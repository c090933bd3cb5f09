"""What is SQLite's own: its file, its folder, its write-ahead log, a full disk. The rest is in test_stored.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from herder_coordinator.core.records import DrainSet, EpochStarted, Record
from herder_coordinator.journal import folder
from herder_coordinator.journal.interface import JournalDamaged, JournalError, JournalFull
from herder_coordinator.journal.sqlite import FILE_NAME, LOG_NAME, MARK_NAME, SPARE_NAME, SqliteStore, open_journal
from herder_coordinator.journal.stored import StoredJournal
from herder_shared.ids import ClusterId, NodeName

CLUSTER = ClusterId("c" * 32)
FIRST: list[Record] = [EpochStarted(CLUSTER, 1)]


def record(number: int, size_bytes: int = 0) -> Record:
    return DrainSet(NodeName(f"n{number}" + "x" * size_bytes), on=True)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[StoredJournal]:
    opened = open_journal(tmp_path, CLUSTER)
    yield opened
    opened.close()


def append_and_wait(journal: StoredJournal, records: list[Record]) -> None:
    durable = threading.Event()
    journal.append(records, lambda _: durable.set())
    assert durable.wait(60)


def read(state_dir: Path) -> list[Record]:
    journal = open_journal(state_dir, CLUSTER)
    try:
        return list(journal.replay())
    finally:
        journal.close()


def connection_of(journal: StoredJournal) -> apsw.Connection:
    store = journal._store
    assert isinstance(store, SqliteStore)
    return store._connection


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"garbage" * 1000)
    with pytest.raises(JournalDamaged, match="damaged"):
        open_journal(tmp_path, CLUSTER)


def test_a_journal_that_is_missing_from_a_used_folder_is_not_begun_anew(tmp_path: Path, journal: StoredJournal) -> None:
    journal.begin(FIRST)
    journal.close()
    (tmp_path / FILE_NAME).unlink()
    with pytest.raises(JournalDamaged, match=f"is missing.*delete .*{MARK_NAME} to begin an empty one"):
        open_journal(tmp_path, CLUSTER)
    (tmp_path / MARK_NAME).unlink()
    assert read(tmp_path) == []


def test_a_full_disk_makes_acknowledgements_wait_until_there_is_room(journal: StoredJournal, tmp_path: Path) -> None:
    journal.begin(FIRST)
    append_and_wait(journal, [record(0)])
    assert journal.shortage == ""
    assert (tmp_path / SPARE_NAME).stat().st_size > 0
    connection_of(journal).execute("PRAGMA max_page_count = 14")
    order: list[int] = []
    durable = threading.Event()
    journal.append([record(1, 200_000)], lambda _: order.append(1))
    journal.append([record(2)], lambda _: order.append(2))
    journal.append([], lambda _: durable.set())
    assert not durable.wait(0.2)
    assert "no space left" in journal.shortage
    assert order == []
    assert not (tmp_path / SPARE_NAME).exists()
    connection_of(journal).execute("PRAGMA max_page_count = 4294967294")
    assert durable.wait(5)
    assert order == [1, 2]
    deadline = threading.Event()
    for _ in range(100):
        if not journal.shortage:
            break
        deadline.wait(0.05)
    assert journal.shortage == ""
    assert (tmp_path / SPARE_NAME).stat().st_size > 0
    journal.close()
    assert read(tmp_path) == [*FIRST, record(0), record(1, 200_000), record(2)]


def test_a_journal_that_is_closed_while_there_is_no_room_says_so(journal: StoredJournal, tmp_path: Path) -> None:
    journal.begin(FIRST)
    connection_of(journal).execute("PRAGMA max_page_count = 14")
    failures: list[JournalError] = []
    journal.on_failure(failures.append)
    acknowledged: list[int] = []
    journal.append([record(1, 200_000)], lambda _: acknowledged.append(1))
    journal.close()
    assert [type(error) for error in failures] == [JournalFull]
    assert acknowledged == []
    assert read(tmp_path) == FIRST


def test_a_failed_snapshot_leaves_the_old_journal(tmp_path: Path, journal: StoredJournal) -> None:
    journal.begin(FIRST)
    append_and_wait(journal, [record(0)])
    journal.close()
    again = open_journal(tmp_path, CLUSTER)
    before = list(again.replay())
    connection_of(again).execute("PRAGMA max_page_count = 14")
    with pytest.raises(JournalFull):
        again.begin([record(1, 200_000)])
    again.close()
    assert read(tmp_path) == before == [*FIRST, record(0)]


def test_a_journal_of_the_first_format_is_taken_over(tmp_path: Path, journal: StoredJournal) -> None:
    """It had no snapshots: all its rows were batches."""
    journal.begin([])
    append_and_wait(journal, FIRST)
    append_and_wait(journal, [record(0)])
    journal.close()
    old = apsw.Connection(str(tmp_path / FILE_NAME))
    old.execute("DROP TABLE parts; DROP TABLE bases; UPDATE meta SET value = 1 WHERE name = 'format'")
    old.close()
    again = open_journal(tmp_path, CLUSTER)
    found = list(again.replay())
    again.begin(found)
    again.close()
    assert read(tmp_path) == found == [*FIRST, record(0)]


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="cannot be made"):
        open_journal(tmp_path / "file" / "state", CLUSTER)


def test_the_folder_and_its_files_are_private(tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    journal = open_journal(state_dir, CLUSTER)
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
        open_journal(tmp_path, CLUSTER)


# --- the write-ahead log ---------------------------------------------------------------------------------------------

UNCLEAN = """
import os, sys, threading
from pathlib import Path
from herder_coordinator.core.records import DrainSet, EpochStarted
from herder_coordinator.journal.sqlite import open_journal

journal = open_journal(Path(sys.argv[1]), "c" * 32)
journal.begin([EpochStarted("c" * 32, 1)])
for number in range(6):
    durable = threading.Event()
    journal.append([DrainSet(f"n{number}", True)], lambda _: durable.set())
    assert durable.wait(60)
os._exit(0)
"""


@pytest.fixture(scope="module")
def unclean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as kill -9 leaves it, with six batches in the write-ahead log."""
    state_dir = tmp_path_factory.mktemp("unclean")
    subprocess.run([sys.executable, "-c", UNCLEAN, str(state_dir)], check=True, timeout=30)
    assert (state_dir / LOG_NAME).stat().st_size > 6 * 4096
    return state_dir


def copy_of(unclean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unclean, tmp_path / "state"))


def test_an_unclean_end_loses_nothing_and_says_nothing(
    unclean: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read(copy_of(unclean, tmp_path)) == [*FIRST, *map(record, range(6))]
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("how", ["cut", "zero-filled", "garbage"])
def test_a_torn_tail_of_the_log_is_cut_and_said_with_its_bytes(
    unclean: Path, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    state_dir = copy_of(unclean, tmp_path)
    log = state_dir / LOG_NAME
    content = log.read_bytes()
    torn = {"cut": b"", "zero-filled": bytes(1000), "garbage": os.urandom(1000)}[how]
    log.write_bytes(content[:-1000] + torn)
    found = read(state_dir)
    assert found == [*FIRST, *map(record, range(5))]
    assert "damaged bytes, of a transaction that was not complete: cut" in caplog.text
    assert (state_dir / "journal.cut-log").stat().st_size >= 4120 - 1000
    # What was cut is cut for good: nothing of it comes back.
    again = open_journal(state_dir, CLUSTER)
    again.begin(found)
    append_and_wait(again, [record(9)])
    again.close()
    assert read(state_dir) == [*found, record(9)]


@pytest.mark.parametrize("where", ["frame", "salt", "head"])
def test_a_flipped_bit_in_the_middle_of_the_log_refuses_with_the_offset(
    unclean: Path, tmp_path: Path, where: str
) -> None:
    """SQLite itself would drop the rest in silence."""
    state_dir = copy_of(unclean, tmp_path)
    log = state_dir / LOG_NAME
    content = bytearray(log.read_bytes())
    frame = 32 + (len(content) - 32) // 4120 // 2 * 4120
    content[{"frame": frame + 2000, "salt": frame + 10, "head": 20}[where]] ^= 4
    log.write_bytes(content)
    told = "head of the write-ahead log" if where == "head" else r"damaged at offset \d+"
    for _ in range(2):  # refusing leaves the evidence
        with pytest.raises(JournalDamaged, match=told):
            open_journal(state_dir, CLUSTER)
        assert log.read_bytes() == content
    journal = open_journal(state_dir, CLUSTER, repair=True)
    kept = list(journal.replay())
    assert kept == [*FIRST, *map(record, range(6))][: len(kept)]
    assert len(kept) < 7
    assert journal.dropped is not None
    assert "write-ahead log" in "\n".join(journal.dropped.report())
    journal.close()

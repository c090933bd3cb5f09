"""A journal becomes short while it is used, and whatever dies on the way leaves the old one or the new one."""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator.core.test_snapshot import busy_lab
from herder_coordinator.core import events
from herder_coordinator.core.effects import Effect
from herder_coordinator.core.records import DrainSet, EpochStarted, Record
from herder_coordinator.core.state import new_state
from herder_coordinator.core.step import finish_replay, replay_record
from herder_coordinator.journal import postgres, sqlite
from herder_coordinator.journal.codec import decode_batch, encode_rows
from herder_coordinator.journal.compaction import Compaction, compact, read_rows, write_end, write_rows
from herder_coordinator.journal.interface import JournalError, JournalFull
from herder_coordinator.journal.sqlite import SqliteStore
from herder_coordinator.journal.store import Base, part_number
from herder_coordinator.journal.stored import StoredJournal
from herder_shared.ids import NodeName
from sim.digest import digest
from support.core_lab import CLUSTER, JOB, Lab, item, success


def state_of(history: list[Record]) -> dict[str, Any]:
    state = new_state(CLUSTER, 1)
    for record in history:
        replay_record(state, record)
    finish_replay(state, 100.0)
    return digest(state)


def compacted(history: list[Record]) -> list[Record]:
    """By the process's own code."""
    stdin, stdout = io.BytesIO(), io.BytesIO()
    stdin.write(json.dumps({"cluster": CLUSTER, "epoch": 1, "generation": 3, "folder": "/"}).encode() + b"\n")
    write_rows(stdin, encode_rows(1, history))
    write_end(stdin)
    stdin.seek(0)
    compact(stdin, stdout)
    stdout.seek(0)
    rows = list(read_rows(stdout))
    assert [number for number, _ in rows] == [part_number(3, n) for n in range(len(rows))]
    return [record for number, content in rows for record in decode_batch(number, content)]


class Turns(Lab):
    """A lab that remembers where its turns end: a compaction never cuts one in two."""

    def __init__(self) -> None:
        self.ends: list[int] = [0]
        super().__init__()

    def _step(self, event: events.Event) -> list[Effect]:
        done = super()._step(event)
        self.ends.append(len(self.records))
        return done


def test_a_history_goes_on_behind_a_snapshot_of_any_of_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.core.test_snapshot.Lab", Turns)
    lab = busy_lab()
    assert isinstance(lab, Turns)
    # A dependant that comes late: its value is of a task whose record the client has acknowledged.
    lab.submit(items=[item(index=10, deps=[(JOB, 1)])])
    lab.ended(success(lab.attempt(10), 10))
    whole = state_of(lab.records)
    for end in sorted(set(lab.ends)):
        base = compacted(lab.records[:end])
        assert state_of(base + lab.records[end:]) == whole, f"after {end} of {len(lab.records)} records"
        again = compacted(base)
        assert state_of(again + lab.records[end:]) == whole


def record(number: int) -> Record:
    return DrainSet(NodeName(f"n{number % 7}"), on=number % 3 > 0)


def churn(journal: StoredJournal, numbers: range) -> None:
    """Batches of records that say little in sum."""
    for number in numbers:
        durable = threading.Event()
        journal.append([record(n) for n in range(number, number + 200)], lambda _, durable=durable: durable.set())  # type: ignore[misc]
        assert durable.wait(60)


@pytest.fixture(scope="session", params=["sqlite", "postgres"])
def server(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("postgres") if request.param == "postgres" else None


@pytest.fixture
def open_one(server: Any, tmp_path: Path) -> Callable[[], StoredJournal]:
    url = server.new_database() if server is not None else ""

    def open_it() -> StoredJournal:
        if url:
            return postgres.open_journal(url, tmp_path, CLUSTER, compact_bytes=10_000)
        return sqlite.open_journal(tmp_path, CLUSTER, compact_bytes=10_000)

    return open_it


@pytest.mark.slow
def test_a_journal_becomes_short_while_it_is_used(open_one: Callable[[], StoredJournal]) -> None:
    journal = open_one()
    journal.begin([EpochStarted(CLUSTER, 1)])
    number = 0
    while journal._store.base.generation == 1:
        churn(journal, range(number, number + 2))
        number += 2
    churn(journal, range(number, number + 3))
    number += 3
    journal.close()
    base = journal._store.base
    assert base.parts == 1
    assert base.upto > 1
    again = open_one()
    found = state_of(list(again.replay()))
    again.begin([])
    assert (again._store.batches(0), again._store.base.generation) == ([], base.generation + 1)
    again.close()
    assert found == state_of([record(n) for first in range(number) for n in range(first, first + 200)])


@pytest.mark.slow
def test_closing_ends_a_compaction_that_is_under_way(open_one: Callable[[], StoredJournal]) -> None:
    journal = open_one()
    journal.begin([EpochStarted(CLUSTER, 1)])
    number = 0
    while journal._compaction is None:
        churn(journal, range(number, number + 1))
        number += 1
    journal.close()
    again = open_one()
    found = state_of(list(again.replay()))
    again.begin([])
    again.close()
    assert found == state_of([record(n) for first in range(number) for n in range(first, first + 200)])


# --- what dies on the way --------------------------------------------------------------------------------------------


def open_store(folder: Path) -> SqliteStore:
    return SqliteStore.open(folder, CLUSTER)


def read_state(folder: Path) -> dict[str, Any]:
    journal = sqlite.open_journal(folder, CLUSTER)
    try:
        return state_of(list(journal.replay()))
    finally:
        journal.close()


@pytest.fixture
def store(tmp_path: Path) -> Any:
    folder = tmp_path / "state"
    opened = open_store(folder)
    opened.replace(encode_rows(part_number(1, 0), busy_lab().records), Base(1, 0, 0))
    for number in range(200):
        opened.insert(list(encode_rows(number + 1, [record(number)])))
    yield opened
    opened.close(has_failed=False)


@pytest.mark.slow
def test_a_crash_after_any_step_of_a_compaction_leaves_the_old_journal_or_the_new_one(
    store: SqliteStore, tmp_path: Path
) -> None:
    steps = 0
    expected = state_of(busy_lab().records + [record(number) for number in range(200)])
    generations: list[int] = []

    def step_and_crash(work: Callable[[], Any]) -> Any:
        nonlocal steps
        answer = work()
        steps += 1
        # Files as they are between two transactions, which is all that a killed process can leave.
        crashed = Path(shutil.copytree(tmp_path / "state", tmp_path / f"crash-{steps}"))
        generations.append(store.base.generation)
        assert read_state(crashed) == expected, f"after step {steps}"
        journal = sqlite.open_journal(crashed, CLUSTER)
        journal.begin(list(journal.replay()))
        assert not journal._store.drop_remainder()
        journal.close()
        assert read_state(crashed) == expected
        shutil.rmtree(crashed)
        return answer

    compaction = Compaction(store, store.last_seq, step_and_crash, size_bytes=1, folder=tmp_path)
    compaction.start()
    compaction._thread.join()
    assert compaction.error is None
    assert steps >= 9
    assert set(generations) == {1, 2}
    assert store.batches(0) == []


@pytest.mark.parametrize("dies_at", [1, 4, 6])
def test_a_compaction_that_fails_changes_nothing_and_the_next_one_succeeds(
    store: SqliteStore, tmp_path: Path, dies_at: int
) -> None:
    calls = 0
    before = store.base

    def fail(work: Callable[[], Any]) -> Any:
        nonlocal calls
        calls += 1
        if calls == dies_at:
            raise JournalFull("no space left on its disk")
        return work()

    failed = Compaction(store, store.last_seq, fail, size_bytes=1, folder=tmp_path)
    failed.start()
    failed._thread.join()
    assert isinstance(failed.error, JournalFull)
    assert store.base == before
    again = Compaction(store, store.last_seq, lambda work: work(), size_bytes=1, folder=tmp_path)
    again.start()
    again._thread.join()
    assert again.error is None
    assert store.base.generation == 2
    assert store.batches(0) == []


def test_a_compacting_process_that_is_killed_is_said(store: SqliteStore, tmp_path: Path) -> None:
    compaction = Compaction(store, store.last_seq, lambda work: work(), size_bytes=1, folder=tmp_path)

    def kill(work: Callable[[], Any]) -> Any:
        if compaction._process is not None:
            compaction._process.kill()
        return work()

    compaction._ask = kill
    compaction.start()
    compaction._thread.join()
    assert isinstance(compaction.error, EOFError | OSError | JournalError)
    assert store.base.generation == 1

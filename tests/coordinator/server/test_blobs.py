"""The blob store on a real disk."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.server.conftest import Run
from herder_coordinator.server.blobs import ORPHAN_S, BlobStore, WrongHash, is_blob_id
from herder_shared.ids import BlobId, blob_id

CONTENT = bytes(range(256)) * 3000
BLOB = blob_id(CONTENT)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlobStore]:
    store = BlobStore(tmp_path / "blobs")
    store.open([], 0.0)
    yield store
    store.close()


def put(store: BlobStore, content: bytes = CONTENT, now_s: float = 0.0) -> BlobId:
    blob = blob_id(content)
    incoming = store.incoming(blob, "1")
    incoming.write(content)
    incoming.finish()
    store.stored(blob, len(content), now_s)
    return blob


def reopened(folder: Path, named: list[BlobId], now_s: float = 0.0) -> BlobStore:
    store = BlobStore(folder / "blobs")
    store.open(named, now_s)
    return store


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "blobs").glob("*/*"))


def test_a_stored_blob_is_there_after_a_restart(store: BlobStore, tmp_path: Path, run: Run) -> None:
    put(store)
    again = reopened(tmp_path, [BLOB])
    assert BLOB in again
    assert again.size_bytes(BLOB) == len(CONTENT)

    async def read() -> None:
        assert await again.read(BLOB, 1000) == CONTENT[1000 : 1000 + 256 * 1024]

    run(read())
    again.close()


def test_bytes_of_another_hash_leave_nothing(store: BlobStore, tmp_path: Path) -> None:
    incoming = store.incoming(BLOB, "1")
    incoming.write(b"something else")
    with pytest.raises(WrongHash):
        incoming.finish()
    assert BLOB not in store
    assert files(tmp_path) == []


def test_half_written_files_are_deleted_at_the_start(store: BlobStore, tmp_path: Path) -> None:
    incoming = store.incoming(BLOB, "1")
    incoming.write(CONTENT[:10])
    assert files(tmp_path) == [f"{BLOB}.1.part"]
    reopened(tmp_path, []).close()
    assert files(tmp_path) == []
    incoming.abandon()


def test_a_dropped_blob_is_gone(store: BlobStore, tmp_path: Path) -> None:
    store.name([put(store)])
    store.drop([BLOB])
    assert BLOB not in store
    store.close()
    assert files(tmp_path) == []


def test_a_blob_that_was_promised_to_another_is_not_dropped(store: BlobStore) -> None:
    store.name([put(store)])
    store.promise(BLOB, 0.0)
    store.drop([BLOB])
    assert BLOB in store


def test_an_orphan_is_dropped_when_its_time_is_over_unless_needed(store: BlobStore) -> None:
    needed = put(store, b"needed")
    put(store)
    store.sweep(lambda blob: blob == needed, ORPHAN_S / 2)
    assert len(store) == 2
    store.sweep(lambda blob: blob == needed, ORPHAN_S + 1)
    assert (BLOB in store, needed in store) == (False, True)


def test_what_nobody_names_after_a_restart_is_an_orphan(store: BlobStore, tmp_path: Path) -> None:
    put(store)
    again = reopened(tmp_path, [], now_s=100.0)
    again.sweep(lambda _: False, 100.0 + ORPHAN_S + 1)
    assert len(again) == 0
    again.close()


def test_a_blob_named_by_what_was_refused_is_found_by_the_review(store: BlobStore) -> None:
    store.name([put(store)])
    store.sweep(lambda _: False, ORPHAN_S + 1)
    assert BLOB in store
    store.sweep(lambda _: False, 2 * ORPHAN_S + 2)
    assert BLOB not in store


def test_an_empty_blob_is_a_blob(store: BlobStore) -> None:
    assert put(store, b"") in store
    assert store.total_bytes() == 0


@pytest.mark.parametrize("text", ["", "../../etc/passwd", "A" * 40, "a" * 39, "a" * 41, "a" * 39 + "\n"])
def test_what_is_not_a_blobs_name_never_becomes_a_path(text: str) -> None:
    assert not is_blob_id(text)


def test_work_runs_beside_the_loop(store: BlobStore, run: Run) -> None:
    async def go() -> None:
        gate = asyncio.Event()
        asyncio.get_running_loop().call_soon(gate.set)
        assert await store.run(lambda: 42) == 42
        assert gate.is_set()

    run(go())

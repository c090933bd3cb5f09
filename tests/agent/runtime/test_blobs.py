"""Blobs: whole or not at all, within a budget, never dropped while somebody needs them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from herder_agent.runtime.blobs import BlobStore, FunctionCache
from herder_shared.errors import DataLost
from herder_shared.ids import BlobId, blob_id


def store_in(folder: Path, budget_bytes: int = 1_000) -> BlobStore:
    folder.mkdir(exist_ok=True)
    return BlobStore(folder, budget_bytes)


def put(store: BlobStore, content: bytes) -> BlobId:
    blob = store.put(content)
    store.keep(blob, len(content))
    return blob


def read(store: BlobStore, blob: BlobId) -> bytes:
    fd = store.open(blob)
    try:
        return os.read(fd, 1 << 20)
    finally:
        os.close(fd)


def test_bytes_come_back_under_the_name_of_their_hash(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    blob = put(store, b"content")
    assert blob == blob_id(b"content")
    assert read(store, blob) == b"content"
    assert store.size_of(blob) == 7


def test_memory_file_is_stored_from_its_start(tmp_path: Path) -> None:
    store = store_in(tmp_path, 1 << 30)
    fd = os.memfd_create("result")
    content = os.urandom(3_000_000)
    os.write(fd, content)
    assert store.put_descriptor(fd, len(content)) == blob_id(content)
    os.close(fd)


def test_blob_that_came_damaged_is_not_kept(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    partial = store.receive(3)
    partial.write(b"bad")
    assert not store.complete(partial, blob_id(b"good"))
    assert list(tmp_path.iterdir()) == []


def test_least_recently_used_goes_first_and_pinned_ones_stay(tmp_path: Path) -> None:
    store = store_in(tmp_path, 250)
    first, second = (put(store, bytes([n]) * 100) for n in range(2))
    store.pin(first)
    third = put(store, b"c" * 100)
    assert (store.has(first), store.has(second), store.has(third)) == (True, False, True)
    store.unpin(first)
    put(store, b"d" * 100)
    assert not store.has(first)
    with pytest.raises(DataLost):
        store.open(first)


def test_next_life_finds_whole_blobs_and_drops_parts(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    blob = put(store, b"content")
    partial = store.receive(10)
    partial.write(b"half")
    partial.close()
    again = store_in(tmp_path)
    assert again.has(blob)
    assert [path.name for path in tmp_path.iterdir()] == [blob]


def test_functions_beyond_the_budget_become_blobs(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    cache = FunctionCache(store, 150)
    contents = [bytes([n]) * 100 for n in range(3)]
    for content in contents:
        cache.add(blob_id(content), content)
        cache.add(blob_id(content), content)
    assert cache.get(blob_id(contents[0])) is None
    assert read(store, blob_id(contents[0])) == contents[0]
    assert cache.get(blob_id(contents[2])) == contents[2]


def test_what_the_disk_does_not_take_stays_in_memory_until_nobody_needs_it(tmp_path: Path) -> None:
    folder = tmp_path / "blobs"
    store = store_in(folder)
    folder.rmdir()
    fd = os.memfd_create("result")
    os.write(fd, b"a result")
    blobs = [store.put_descriptor(fd, 8), store.put(b"another")]
    os.close(fd)
    assert blobs == [blob_id(b"a result"), blob_id(b"another")]
    for blob, size in zip(blobs, (8, 7), strict=True):
        store.pin(blob)
        store.keep(blob, size)
    assert [read(store, blob) for blob in blobs] == [b"a result", b"another"]
    assert "No such file" in store.trouble()
    for blob in blobs:
        store.unpin(blob)
    assert (store.trouble(), store.size_bytes) == ("", 0)
    with pytest.raises(DataLost):
        store.open(blobs[0])

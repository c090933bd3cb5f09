"""What is put on a shelf of files comes back, its room is given back, and a disk without room costs nobody anything."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from herder_coordinator.journal import shelf as module
from herder_coordinator.journal.shelf import FileShelf


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[FileShelf]:
    made = FileShelf(tmp_path, segment_bytes=1_000)
    yield made
    made.close()


def put(shelf: FileShelf, content: bytes) -> int:
    ticket = shelf.put(content)
    assert ticket is not None
    return ticket


def files_of(folder: Path) -> int:
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)]
    return sum(str(folder) in link for link in links)


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_what_was_put_comes_back_and_segments_end_with_what_they_hold(shelf: FileShelf, tmp_path: Path) -> None:
    contents = [os.urandom(300) for _ in range(20)]
    tickets = [put(shelf, content) for content in contents]
    assert [shelf.get(ticket) for ticket in tickets] == contents
    assert (files_of(tmp_path), list(tmp_path.iterdir())) == (5, []), "files without names"
    for ticket in tickets[:12]:
        shelf.drop(ticket)
    assert files_of(tmp_path) == 2
    assert shelf.get(tickets[12]) == contents[12]
    for ticket in tickets[12:]:
        shelf.drop(ticket)
    assert shelf.size_bytes == 0
    again = put(shelf, b"again")
    assert (shelf.get(again), files_of(tmp_path)) == (b"again", 1)


def test_a_shelf_that_is_not_used_has_no_file(tmp_path: Path) -> None:
    FileShelf(tmp_path / "absent").close()


def test_on_a_disk_with_little_room_nothing_is_put(shelf: FileShelf, monkeypatch: pytest.MonkeyPatch) -> None:
    first = put(shelf, b"first")
    with monkeypatch.context() as patched:
        patched.setattr(module, "LEFT_BYTES", 1 << 60)
        patched.setattr(module, "LEFT_PART", 1.0)
        assert shelf.put(b"second") is None
    assert shelf.get(first) == b"first"
    assert shelf.get(put(shelf, b"third")) == b"third"


def test_a_folder_that_is_gone_is_no_room(tmp_path: Path) -> None:
    assert FileShelf(tmp_path / "gone").put(b"content") is None

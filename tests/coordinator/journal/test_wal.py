"""Which damage of a write-ahead log can be a torn tail, and which cannot. On real logs: test_sqlite.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from herder_coordinator.journal.wal import Frame, WriteAheadLog

LETTERS = {"o": Frame.OURS, "C": Frame.COMMIT, "s": Frame.STALE, "t": Frame.TORN}


def log_of(frames: str, *, is_head_whole: bool = True) -> WriteAheadLog:
    found = WriteAheadLog(Path("journal.sqlite-wal"), 4096, is_head_whole=is_head_whole)
    found.frames = [LETTERS[letter] for letter in frames]
    return found


@pytest.mark.parametrize(
    ("frames", "taken", "is_damaged"),
    [
        ("oCoC", 4, False),
        ("oCoCsss", 4, False),
        # The last transaction is not whole.
        ("oCo", 2, False),
        ("oCot", 2, False),
        ("oCtC", 2, False),
        ("oCoC", 2, False),
        # Another one began behind it: it had been synced.
        ("oCoCo", 2, True),
        ("oCoCoC", 2, True),
        ("otoCoC", 0, True),
        ("oCtCC", 2, True),
    ],
)
def test_a_frame_behind_a_later_transaction_tells_damage_from_a_torn_tail(
    frames: str, taken: int, is_damaged: bool
) -> None:
    assert bool(log_of(frames).damage(taken)) == is_damaged


def test_a_damaged_head_is_damage_as_soon_as_a_frame_follows() -> None:
    assert "head" in log_of("o", is_head_whole=False).damage(0)
    assert log_of("tt", is_head_whole=False).damage(0) == ""


def test_no_log_and_an_empty_one_are_none(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite-wal"
    assert WriteAheadLog.read(path) is None
    path.write_bytes(b"")
    assert WriteAheadLog.read(path) is None

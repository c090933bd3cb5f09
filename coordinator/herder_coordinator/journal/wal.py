"""SQLite's write-ahead log, looked at before SQLite does: was anything in it that SQLite would drop in silence?

When it recovers, SQLite ends the log at the first frame whose checksum is wrong, and whatever follows is gone. For a
torn tail that is right: a crash leaves any part of the last transaction, which nobody was told is durable. But each
transaction is synced before the next one begins; so a frame that belongs to this round of the log and stands behind a
whole later transaction says that the damaged one had been acknowledged.

(File format: sqlite.org/fileformat2.html, section 4. A frame left from an earlier round has an older salt: the first
half of the salt grows by one with each round, the second is random.)
"""

from __future__ import annotations

import struct
from enum import Enum
from pathlib import Path

from herder_shared.limits import KIB

_HEAD_BYTES = 32
_FRAME_HEAD = struct.Struct(">IIII")
_FRAME_HEAD_BYTES = 24
_MAGIC = 0x377F0682
#: Rounds back to which an older salt is believed to be one; a random number is further away.
_ROUNDS_MAX = 1 << 20


class Frame(Enum):
    """What the head of a frame says."""

    OURS = "of this round"
    COMMIT = "of this round, and the last of its transaction"
    STALE = "left from an earlier round"
    TORN = "none that SQLite wrote"


class WriteAheadLog:
    """The heads of its frames as they were found. `frames[n]` is the one at `offset(n)`."""

    def __init__(self, path: Path, page_bytes: int, *, is_head_whole: bool) -> None:
        self.path = path
        self.frames: list[Frame] = []
        self.is_head_whole = is_head_whole
        self.rest_bytes = 0
        self._frame_bytes = _FRAME_HEAD_BYTES + page_bytes

    def offset(self, frame: int) -> int:
        """Where it begins in the file."""
        return _HEAD_BYTES + frame * self._frame_bytes

    @classmethod
    def read(cls, path: Path) -> WriteAheadLog | None:
        """None: there is no log, or nothing in it."""
        try:
            with path.open("rb") as stream:
                head = stream.read(_HEAD_BYTES)
                if len(head) < _HEAD_BYTES:
                    return None
                page_bytes = int.from_bytes(head[8:12], "big")
                is_whole = _is_whole(head)
                found = cls(path, page_bytes if is_whole else 4 * KIB, is_head_whole=is_whole)
                salt = struct.unpack(">II", head[16:24])
                size_bytes = path.stat().st_size
                while found.offset(len(found.frames) + 1) <= size_bytes:
                    stream.seek(found.offset(len(found.frames)))
                    found.frames.append(_kind(stream.read(_FRAME_HEAD.size), salt, is_head_whole=is_whole))
                found.rest_bytes = size_bytes - found.offset(len(found.frames))
                return found
        except FileNotFoundError:
            return None

    def damage(self, taken: int) -> str:
        """SQLite took the first `taken` frames. Why that is not all that was acknowledged; "" when it may be."""
        behind = self.frames[taken:]
        if not self.is_head_whole:
            if Frame.OURS not in behind and Frame.COMMIT not in behind:
                return ""
            return f"the head of the write-ahead log {self.path} is damaged, and {len(behind)} frames follow it"
        ours = [n for n, kind in enumerate(behind) if kind in {Frame.OURS, Frame.COMMIT}]
        ends = [n for n in ours if behind[n] is Frame.COMMIT]
        if not ends or ends[0] == ours[-1]:
            return ""
        lost = len([n for n in ours if n > ends[0]])
        return (
            f"the write-ahead log {self.path} is damaged at offset {self.offset(taken)}, and {lost} frames of later "
            "transactions follow"
        )

    def keep_tail(self, taken: int) -> tuple[Path, int]:
        """Copy what SQLite will cut to a file of its own: where it is, and how many bytes. 0: nothing is cut."""
        count = len(self.frames)
        while count > taken and self.frames[count - 1] is Frame.STALE:
            count -= 1
        end = self.offset(count) + (self.rest_bytes if count == len(self.frames) else 0)
        size_bytes = end - self.offset(taken)
        kept = self.path.with_name("journal.cut-log")
        if size_bytes > 0:
            with self.path.open("rb") as stream:
                stream.seek(self.offset(taken))
                kept.write_bytes(stream.read(size_bytes))
        return kept, max(0, size_bytes)


def _kind(head: bytes, salt: tuple[int, int], *, is_head_whole: bool) -> Frame:
    page, size_pages, first, second = _FRAME_HEAD.unpack(head)
    if not is_head_whole:
        return Frame.OURS if page else Frame.TORN
    if (first, second) == salt:
        return Frame.COMMIT if size_pages else Frame.OURS
    return Frame.STALE if page and 0 < (salt[0] - first) % (1 << 32) < _ROUNDS_MAX else Frame.TORN


def _is_whole(head: bytes) -> bool:
    """By the checksum of the log's own head, whose words are in the byte order that its magic number names."""
    magic = int.from_bytes(head[:4], "big")
    if magic & ~1 != _MAGIC:
        return False
    words = struct.unpack(">6I" if magic & 1 else "<6I", head[:24])
    first = second = 0
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return (first, second) == struct.unpack(">II", head[24:32])

"""Files beside the journal for what the state has no memory for (core/room.py): no part of the journal, and nothing of
it is durable. They have no names, so that the system deletes them with the process, however it ends.

Contents are appended to segments, each a file; a segment of which nothing is needed any more is closed, and with it its
room is free. What waits is mostly asked for in the order in which it came, so that segments empty one after the other.
"""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from herder_shared.limits import MIB

log = logging.getLogger(__name__)

SEGMENT_BYTES = 64 * MIB
#: A shelf leaves the journal, which is on the same disk, this much room, or this part of the disk if that is less.
LEFT_BYTES = 1024 * MIB
LEFT_PART = 0.1


@dataclass(slots=True, eq=False)
class _Segment:
    file: IO[bytes]
    size_bytes: int = 0
    #: Contents that are still needed.
    uses: int = 0


class FileShelf:
    """See `room.Shelf`. For one thread at a time; files are made in `folder` when they are needed."""

    def __init__(self, folder: Path, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._last: _Segment | None = None
        #: Ticket -> segment, offset, length.
        self._places: dict[int, tuple[_Segment, int, int]] = {}
        self._next = 0
        self._is_full = False
        self.size_bytes = 0

    def put(self, content: bytes) -> int | None:
        """Keep these bytes. None: the disk is (nearly) full, or has an error."""
        try:
            segment = self._segment()
            if segment is None:
                self._say_full(f"the disk of {self._folder} has little room")
                return None
            offset = segment.size_bytes
            view = memoryview(content)
            while view:
                written = os.pwrite(segment.file.fileno(), view, segment.size_bytes)
                segment.size_bytes += written
                view = view[written:]
        except OSError as error:
            self._say_full(str(error))
            return None
        self._is_full = False
        segment.uses += 1
        self._next += 1
        self._places[self._next] = (segment, offset, len(content))
        self.size_bytes += len(content)
        return self._next

    def _say_full(self, reason: str) -> None:
        if not self._is_full:
            log.warning("%s: what waits stays in memory, however much it is", reason)
        self._is_full = True

    def _segment(self) -> _Segment | None:
        segment = self._last
        if segment is None or segment.size_bytes >= self._segment_bytes:
            file = tempfile.TemporaryFile(buffering=0, dir=self._folder)  # noqa: SIM115  it lives as long as the segment
            if segment is not None and not segment.uses:
                segment.file.close()
            segment = self._last = _Segment(file)
        disk = os.fstatvfs(segment.file.fileno())
        left_bytes = disk.f_bavail * disk.f_frsize
        return segment if left_bytes >= min(LEFT_BYTES, LEFT_PART * disk.f_blocks * disk.f_frsize) else None

    def get(self, ticket: int) -> bytes:
        """What was put under this ticket.

        Raises:
            OSError: the disk does not give it back.
        """
        segment, offset, length = self._places[ticket]
        content = os.pread(segment.file.fileno(), length, offset)
        if len(content) < length:
            raise OSError(f"a file of {self._folder} has lost {length - len(content)} of {length} bytes")
        return content

    def drop(self, ticket: int) -> None:
        """Nobody will ask for this again."""
        segment, _, length = self._places.pop(ticket)
        self.size_bytes -= length
        segment.uses -= 1
        if segment.uses:
            return
        if segment is self._last:
            segment.size_bytes = 0
            os.ftruncate(segment.file.fileno(), 0)
        else:
            segment.file.close()

    def close(self) -> None:
        """Give all room back. Nothing may be asked for any more."""
        segments = {id(segment): segment for segment, _, _ in self._places.values()}
        self._places.clear()
        for segment in segments.values():
            segment.file.close()
        if self._last is not None:
            self._last.file.close()

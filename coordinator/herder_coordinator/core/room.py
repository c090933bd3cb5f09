"""How much memory what waits may take, and where the rest of it lies.

Two things wait in numbers that nobody can foresee: tasks that were submitted and have not been started, and terminal
records which nobody has acknowledged (of a slow client, of a detached job). Beyond a budget their contents are put on
a *shelf*: bytes under a ticket. To the core a shelf is memory which is slower, as an address is to a program whose
pages may lie in swap: what was put is what is got, so that the same events have the same effects whatever lies where.
Nothing on a shelf is durable, nor needs to be: the journal has it all.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import msgspec

from herder_shared import limits
from herder_shared.ids import BlobId, JobId
from herder_shared.states import Outcome
from herder_shared.wire.messages import TaskEnd, TaskItem

#: What a queued task, and a terminal record, cost in memory beside their bytes.
QUEUED_OVERHEAD_BYTES = 170
END_OVERHEAD_BYTES = 600
#: ... and an encoded one, with its key.
RECENT_OVERHEAD_BYTES = 320

_encoder = msgspec.msgpack.Encoder()
_items: msgspec.msgpack.Decoder[list[TaskItem | None]] = msgspec.msgpack.Decoder(list[TaskItem | None])
_end: msgspec.msgpack.Decoder[TaskEnd] = msgspec.msgpack.Decoder(TaskEnd)
_ends: msgspec.msgpack.Decoder[list[TaskEnd]] = msgspec.msgpack.Decoder(list[TaskEnd])


class Shelf(Protocol):
    """Bytes under tickets. An error of `get` is the end of this life: what was put cannot be had again otherwise."""

    def put(self, content: bytes) -> int | None:
        """Keep these bytes. None: there is no room, so they stay where they are."""

    def get(self, ticket: int) -> bytes:
        """What was put under this ticket."""

    def drop(self, ticket: int) -> None:
        """Nobody will ask for this again."""


@dataclass(slots=True, eq=False)
class Room:
    """Of one state: what it holds in memory of the two, and how much it may. Without a shelf all stays in memory."""

    shelf: Shelf | None = None
    queued_bytes_max: int = limits.QUEUED_BYTES_MAX
    ends_bytes_max: int = limits.KEPT_ENDS_BYTES_MAX
    queued_bytes: int = 0
    ends_bytes: int = 0
    #: Terminal records are put away so many together, and of each job so much stays in memory in any case: a job whose
    #: client is quick pays nothing.
    block_ends: int = 256
    job_ends_bytes: int = limits.MIB


# --- tasks that were not started -------------------------------------------------------------------------------------


def items_size_bytes(items: list[TaskItem | None]) -> int:
    """About what these cost in memory."""
    return sum(QUEUED_OVERHEAD_BYTES + len(item.args.inline) for item in items if item is not None)


def shelve_items(room: Room, items: list[TaskItem | None], size_bytes: int) -> int | None:
    """Put tasks away, if there is no memory for them. None: they stay. (So do those with blobs: blobs are counted by
    the tasks that name them.)"""
    if room.shelf is None or room.queued_bytes + size_bytes <= room.queued_bytes_max:
        return None
    if any(item is not None and item.args.blob is not None for item in items):
        return None
    return room.shelf.put(_encoder.encode(items))


def shelved_items(room: Room, ticket: int) -> list[TaskItem | None]:
    """Tasks that were put away. They stay there, too."""
    assert room.shelf is not None
    return _items.decode(room.shelf.get(ticket))


def drop(room: Room, ticket: int) -> None:
    assert room.shelf is not None
    room.shelf.drop(ticket)


# --- terminal records ------------------------------------------------------------------------------------------------


def end_size_bytes(end: TaskEnd) -> int:
    """About what a terminal record costs in memory and on the wire."""
    size_bytes = END_OVERHEAD_BYTES
    if end.result is not None:
        size_bytes += len(end.result.inline)
    if end.logs is not None:
        size_bytes += len(end.logs.stdout) + len(end.logs.stderr)
    if end.failure is not None:
        size_bytes += len(end.failure.traceback) + len(end.failure.pickled or b"")
    return size_bytes


#: In the place of a record that is not kept any more.
_GONE = TaskEnd(0, Outcome.LOST)


@dataclass(slots=True, eq=False)
class _Block:
    """`Room.block_ends` records, or the last ones: here, or on the shelf."""

    ends: list[TaskEnd]
    size_bytes: int = 0
    ticket: int | None = None
    has_blobs: bool = False


class Ends:
    """The kept terminal records of one job, by cursor (`first` is that of the oldest), and the one that counts of each
    task by its index: the newest, unless the task has begun anew since."""

    __slots__ = ("_blocks", "_open", "_open_ticket", "_origin", "_place", "_room", "_size_bytes", "_upto", "first")

    def __init__(self, room: Room, first: int = 0) -> None:
        self.first = first
        self._room = room
        self._upto = first
        #: The first block begins with the cursor `_origin`.
        self._blocks: list[_Block] = []
        self._origin = first
        #: By index: 1 + the cursor of its record, 0 = none.
        self._place = array("I")
        #: Of the records that are here, in memory.
        self._size_bytes = 0
        #: The shelved block that was read last.
        self._open: list[TaskEnd] = []
        self._open_ticket = -1

    def __len__(self) -> int:
        return self._upto - self.first

    def __iter__(self) -> Iterator[TaskEnd]:
        return self.between(self.first, self._upto)

    def add(self, end: TaskEnd) -> None:
        """The next record; from now on it counts for its task."""
        if (
            not self._blocks
            or len(self._blocks[-1].ends) == self._room.block_ends
            or self._blocks[-1].ticket is not None
        ):
            self._blocks.append(_Block([]))
        block = self._blocks[-1]
        block.ends.append(end)
        self._upto += 1
        if end.index >= len(self._place):
            self._place.frombytes(bytes((end.index + 1 - len(self._place)) * self._place.itemsize))
        self._place[end.index] = self._upto
        self._count(block, end_size_bytes(end))
        if len(block.ends) == self._room.block_ends:
            self._shelve(block)

    def has(self, index: int) -> bool:
        """Whether a record counts for this task and is kept."""
        return index < len(self._place) and self._place[index] > self.first

    def get(self, index: int) -> TaskEnd | None:
        """The record that counts for this task, if it is kept."""
        return next(self.between(self._place[index] - 1, self._place[index])) if self.has(index) else None

    def forget(self, index: int) -> None:
        """The task has begun anew: no record counts for it."""
        if index < len(self._place):
            self._place[index] = 0

    def between(self, first: int, upto: int) -> Iterator[TaskEnd]:
        """The records from one cursor up to another, as far as they are here."""
        cursor, upto = max(first, self.first), min(upto, self._upto)
        while cursor < upto:
            number, offset = divmod(cursor - self._origin, self._room.block_ends)
            part = self._contents(self._blocks[number])[offset : offset + upto - cursor]
            yield from part
            cursor += len(part)

    def drop(self, upto: int) -> list[tuple[TaskEnd, bool]]:
        """Keep none before this cursor: those, and whether each counted for its task."""
        dropped = [
            (end, self._place[end.index] == cursor)
            for cursor, end in enumerate(self.between(self.first, upto), self.first + 1)
        ]
        self._leave(self.first + len(dropped))
        return dropped

    def clear(self) -> list[TaskEnd]:
        """Keep none. Returns those that name blobs."""
        with_blobs: list[TaskEnd] = []
        for number, block in enumerate(self._blocks):
            if block.ticket is None or block.has_blobs:
                first = self._origin + number * self._room.block_ends
                with_blobs += filter(_has_blob, self.between(first, first + self._room.block_ends))
        self._leave(self._upto)
        return with_blobs

    def _leave(self, first: int) -> None:
        """Nothing before this cursor is needed."""
        while self._blocks and (first == self._upto or first - self._origin >= self._room.block_ends):
            block = self._blocks.pop(0)
            self._origin += self._room.block_ends
            self._count(block, -block.size_bytes)
            if block.ticket is not None:
                drop(self._room, block.ticket)
        if self._blocks and self._blocks[0].ticket is None:
            ends = self._blocks[0].ends
            start, end = max(0, self.first - self._origin), first - self._origin
            self._count(self._blocks[0], -sum(map(end_size_bytes, ends[start:end])))
            ends[start:end] = [_GONE] * (end - start)
        elif not self._blocks:
            self._origin = first
            self._open, self._open_ticket = [], -1
        self.first = first

    def _shelve(self, block: _Block) -> None:
        room = self._room
        if room.shelf is None or room.ends_bytes <= room.ends_bytes_max or self._size_bytes <= room.job_ends_bytes:
            return
        block.ticket = room.shelf.put(_encoder.encode(block.ends))
        if block.ticket is not None:
            block.has_blobs = any(map(_has_blob, block.ends))
            block.ends = []
            self._count(block, -block.size_bytes)

    def _count(self, block: _Block, size_bytes: int) -> None:
        block.size_bytes += size_bytes
        self._size_bytes += size_bytes
        self._room.ends_bytes += size_bytes

    def _contents(self, block: _Block) -> list[TaskEnd]:
        if block.ticket is None:
            return block.ends
        if block.ticket != self._open_ticket:
            assert self._room.shelf is not None
            self._open = _ends.decode(self._room.shelf.get(block.ticket))
            self._open_ticket = block.ticket
        return self._open


class Recent:
    """Acknowledged terminal records, for logs, for explanations and for dependants that come late: the newest, as far
    as `bytes_max` and `ends_max` go. Kept encoded, which takes a third of the room."""

    __slots__ = ("_kept", "bytes_max", "ends_max", "size_bytes")

    def __init__(self, bytes_max: int = limits.RECENT_BYTES_MAX, ends_max: int = limits.RECENT_ENDS_MAX) -> None:
        #: Record, its blob, what it counts for. (In a plain dict the first key would soon be behind thousands that are
        #: gone.)
        self._kept: OrderedDict[tuple[JobId, int], tuple[bytes, BlobId | None, int]] = OrderedDict()
        self.bytes_max = bytes_max
        self.ends_max = ends_max
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: tuple[JobId, int]) -> bool:
        return key in self._kept

    def __iter__(self) -> Iterator[tuple[JobId, int]]:
        return iter(self._kept)

    def get(self, key: tuple[JobId, int]) -> TaskEnd | None:
        """The record, if it is kept."""
        kept = self._kept.get(key)
        return _end.decode(kept[0]) if kept is not None else None

    def items(self) -> Iterator[tuple[tuple[JobId, int], TaskEnd]]:
        """All of them, oldest first."""
        for key, (content, _, _) in self._kept.items():
            yield key, _end.decode(content)

    def add(self, key: tuple[JobId, int], end: TaskEnd) -> list[BlobId]:
        """Keep one more; its blob counts with its bytes. Returns the blobs of those that went for it, or its own, if it
        is too large to be kept."""
        blob = end.result.blob if end.result is not None else None
        content = _encoder.encode(end)
        size_bytes = len(content) + RECENT_OVERHEAD_BYTES
        if blob is not None and end.result is not None:
            size_bytes += end.result.size_bytes
        if size_bytes > self.bytes_max:
            return [blob] if blob is not None else []
        self._kept[key] = (content, blob, size_bytes)
        self.size_bytes += size_bytes
        gone: list[BlobId] = []
        while self.size_bytes > self.bytes_max or len(self._kept) > self.ends_max:
            _, (_, old, old_bytes) = self._kept.popitem(last=False)
            self.size_bytes -= old_bytes
            if old is not None:
                gone.append(old)
        return gone

    def pop(self, key: tuple[JobId, int]) -> BlobId | None:
        """Keep it no more. Returns its blob."""
        _, blob, size_bytes = self._kept.pop(key)
        self.size_bytes -= size_bytes
        return blob


def _has_blob(end: TaskEnd) -> bool:
    return end.result is not None and end.result.blob is not None

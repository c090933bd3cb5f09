"""What a journal is kept in: numbered rows of bytes, in SQLite or in PostgreSQL. What they mean is not known here.

A store has two kinds of rows. *Batches* are numbered from 1 without a gap and are only ever inserted. A *snapshot* is
a list of parts; the newest that is complete is the store's `base`, which says up to which batch it holds everything.
So a journal is: the parts of the base, then the batches after it. Everything else in a store is a remainder: the parts
of a snapshot that was never finished, or what an adopted one made superfluous.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from herder_shared.ids import ClusterId
from herder_shared.limits import MIB

#: A row's number and its content.
Row = tuple[int, bytes]

#: Rows that are read, written or deleted between two commits: what these wait for it, at most.
SLICE_BYTES = MIB
SLICE_ROWS = 64

_PART_BITS = 32


@dataclass(frozen=True, slots=True)
class Base:
    """The snapshot on which the batches stand. Generation 0: there is none, and the batches are all there is."""

    generation: int = 0
    parts: int = 0
    #: The last batch whose records are in the snapshot.
    upto: int = 0


def part_number(generation: int, part: int) -> int:
    """The number of a snapshot's row: parts of two snapshots never have the same."""
    return generation << _PART_BITS | part


class Store(Protocol):
    """Held by one coordinator at a time. All calls come from one thread at a time; an error is a `JournalError`, after
    which nothing may be written any more, or a `JournalFull`, after which nothing has changed and the same may be
    tried again."""

    #: For messages: "the journal /path".
    label: str
    cluster: ClusterId
    #: This life's. Durable when `replace` has returned.
    epoch: int
    base: Base
    last_seq: int
    #: Seconds within which something must be written, for others to know that the holder lives. None: nobody watches.
    beat_s: float | None

    def batches(self, after: int, upto: int | None = None) -> list[Row]:
        """The next slice of batches after number `after`, in order; empty at the end."""

    def parts(self, after: int) -> list[Row]:
        """The next slice of the base's parts after row number `after`."""

    def insert(self, rows: Sequence[Row]) -> None:
        """Add batches, all or none; durable on return."""

    def add_parts(self, rows: Sequence[Row]) -> None:
        """Add parts of a snapshot that is no base yet."""

    def adopt(self, base: Base) -> None:
        """From now on this snapshot, all of whose parts are there, is the base. Durable on return."""

    def drop_remainder(self) -> bool:
        """Delete a slice of what is neither in the base nor after it. False when nothing is left."""

    def replace(self, rows: Iterable[Row], base: Base) -> None:
        """In one transaction: the new epoch, a new base with these parts, and no batch."""

    def beat(self) -> None:
        """Show that we live. Only where `beat_s` is set."""

    def shortage(self) -> str:
        """Little room is left: said in words. "" while there is enough. Called after every commit."""

    def spare(self) -> bool:
        """No space: free what was set aside for that. False when nothing was."""

    def restore_spare(self) -> bool:
        """Set it aside again, if it was used. False when there is still little room."""

    def close(self, *, has_failed: bool) -> None:
        """Let go of it. After a failure nothing may be written any more."""

    @property
    def size_bytes(self) -> int: ...


def all_batches(store: Store, after: int) -> Iterator[Row]:
    """Every batch after number `after`."""
    while rows := store.batches(after):
        yield from rows
        after = rows[-1][0]


def all_parts(store: Store) -> Iterator[Row]:
    """Every part of the base."""
    after = part_number(store.base.generation, 0) - 1
    while store.base.generation and (rows := store.parts(after)):
        yield from rows
        after = rows[-1][0]

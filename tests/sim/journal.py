"""A journal on a simulated disk: rows as the real codec writes them, of which a crash keeps any prefix of what was not
synced, and perhaps a torn piece of the next.

`Storage` is the disk: it outlives the programs. `SimJournal` is the interface which the shipped loop appends to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from herder_coordinator.core.records import Record
from herder_coordinator.journal.codec import DamagedBatch, decode_batch, encode_batch
from herder_coordinator.journal.interface import JournalError
from herder_shared.ids import ClusterId
from sim.world import Program, World

#: How often a journal that nobody writes to looks whether another coordinator has taken it over.
FENCE_S = 2.0


class Storage:
    """Rows that are on disk, and rows that were written and may be lost."""

    def __init__(self) -> None:
        self.epoch = 0
        self.rows: list[bytes] = []
        self.unsynced: list[bytes] = []
        #: It is full until then.
        self.full_until_s = 0.0

    def crash(self, world: World, *, tears: bool = True) -> None:
        """The machine stops: the system had written some of it."""
        kept = world.random.randint(0, len(self.unsynced))
        torn = self.unsynced[kept : kept + 1]
        self.rows += self.unsynced[:kept]
        self.unsynced.clear()
        if torn and tears and world.chance(0.5):
            self.rows.append(torn[0][: world.random.randrange(len(torn[0]))])

    def records(self, first: int = 0, upto: int | None = None) -> list[Record]:
        """All that was written so far, synced or not; or what is in some of the rows."""
        rows = list(enumerate(self.rows + self.unsynced))[first:upto]
        return [record for seq, row in rows for record in decode_batch(seq, row)]


class SimJournal:
    """See `interface.Journal`. Its writer commits whatever has been queued, in one sync that takes its time."""

    def __init__(
        self, storage: Storage, program: Program, cluster: ClusterId, sync_s: Callable[[], float], fails: float
    ) -> None:
        self.cluster = cluster
        self.epoch = storage.epoch + 1
        self._storage = storage
        self._program = program
        self._sync_s = sync_s
        self._fails = fails
        self._failed: Callable[[JournalError], None] = lambda _error: None
        self._queue: deque[tuple[int, Callable[[float], None]]] = deque()
        self._is_writing = False
        self._is_over = False

    def replay(self) -> Iterator[Record]:
        """Every record, oldest first; a torn row at the end is cut off."""
        rows = self._storage.rows
        for seq, row in enumerate(list(rows)):
            try:
                records = decode_batch(seq, row)
            except DamagedBatch as error:
                if seq != len(rows) - 1:
                    raise JournalError(f"row {seq} of {len(rows)} is damaged: {error}") from error
                del rows[seq:]
                return
            yield from records

    def begin(self, snapshot: Iterable[Record]) -> None:
        """The snapshot and the epoch, in one transaction."""
        self._storage.epoch = self.epoch
        self._storage.rows = [encode_batch(0, list(snapshot))] if snapshot else []
        self._storage.unsynced.clear()
        self._program.call_later(FENCE_S, self._look)

    def _look(self) -> None:
        """Whether it is still ours, as a journal does that others can reach."""
        if self.epoch != self._storage.epoch:
            self._fail("another coordinator has begun a later epoch")
        elif not self._is_over:
            self._program.call_later(FENCE_S, self._look)

    def append(self, records: Sequence[Record], durable: Callable[[float], None]) -> None:
        """Write a row, to be synced with whatever else is there by then."""
        storage = self._storage
        if self.epoch == storage.epoch and records:
            storage.unsynced.append(encode_batch(len(storage.rows) + len(storage.unsynced), records))
        self._queue.append((len(storage.rows) + len(storage.unsynced), durable))
        self._write()

    def on_failure(self, callback: Callable[[JournalError], None]) -> None:
        self._failed = callback

    def close(self) -> None:
        self._is_over = True

    @property
    def shortage(self) -> str:
        return "the disk is full" if self._is_full else ""

    @property
    def _is_full(self) -> bool:
        return self._program.world.now_s < self._storage.full_until_s

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self._storage.rows))

    def _write(self) -> None:
        if self._queue and not self._is_writing and not self._is_over:
            self._is_writing = True
            self._program.call_later(self._sync_s(), self._written, self._queue[-1][0])

    def _written(self, upto: int) -> None:
        storage = self._storage
        self._is_writing = self._is_full
        if self.epoch != storage.epoch:
            self._fail("another coordinator has begun a later epoch")
        elif self._is_full:
            self._program.call_later(0.5, self._retry)
        elif self._program.world.chance(self._fails):
            self._fail("the disk says that it could not")
        elif not self._is_over:
            count = upto - len(storage.rows)
            storage.rows += storage.unsynced[:count]
            del storage.unsynced[:count]
            while self._queue and self._queue[0][0] <= upto:
                self._queue.popleft()[1](0.001)
            self._write()

    def _retry(self) -> None:
        self._is_writing = False
        self._write()

    def _fail(self, why: str) -> None:
        if not self._is_over:
            self._is_over = True
            self._failed(JournalError(why))

"""A journal's disk: batches as the real codec writes them, of which a crash keeps any prefix of what was not synced."""

from __future__ import annotations

from collections.abc import Sequence

from herder_coordinator.core.records import Record
from herder_coordinator.journal.codec import decode_batch, encode_batch


class Disk:
    def __init__(self) -> None:
        self.epoch = 0
        self.rows: list[bytes] = []
        self.unsynced: list[bytes] = []

    def write(self, records: Sequence[Record]) -> None:
        """Each record is a row of its own, so that a crash can cut between any two."""
        for record in records:
            self.unsynced.append(encode_batch(len(self.rows) + len(self.unsynced), [record]))

    def sync(self, count: int) -> None:
        self.rows += self.unsynced[:count]
        del self.unsynced[:count]

    def crash(self, kept: int) -> None:
        self.sync(kept)
        self.unsynced.clear()

    def read(self) -> list[Record]:
        return [record for seq, row in enumerate(self.rows) for record in decode_batch(seq, row)]

    def read_all(self) -> list[Record]:
        return [record for seq, row in enumerate(self.rows + self.unsynced) for record in decode_batch(seq, row)]

    def replace(self, epoch: int, records: Sequence[Record]) -> None:
        """The snapshot and the epoch, in one transaction."""
        self.epoch = epoch
        self.rows = [encode_batch(seq, [record]) for seq, record in enumerate(records)]

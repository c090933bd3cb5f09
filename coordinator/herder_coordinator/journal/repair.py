"""What `herder coordinator --repair` leaves out of a damaged journal, in words: nobody loses a job in silence."""

from __future__ import annotations

from collections import Counter

from herder_coordinator.core import records
from herder_coordinator.core.records import Record
from herder_coordinator.journal.codec import DamagedBatch, decode_batch
from herder_shared.ids import JobId

#: Jobs that are named one by one.
JOBS_NAMED_MAX = 200


class Dropped:
    """Rows after the first damage: how many, and what those of them say that can still be read."""

    def __init__(self) -> None:
        self.where = ""
        self.row_count = 0
        self.size_bytes = 0
        self.unreadable_count = 0
        self._kinds: Counter[str] = Counter()
        self._submitted: Counter[JobId] = Counter()
        self._ended: Counter[JobId] = Counter()

    def __bool__(self) -> bool:
        return bool(self.where)

    def begin(self, where: str) -> None:
        """The first damage, or another."""
        self.where = f"{self.where}; {where}" if self.where else where

    def add(self, number: int, content: bytes) -> None:
        """A row that is left out."""
        self.row_count += 1
        self.size_bytes += len(content)
        try:
            for record in decode_batch(number, content):
                self._note(record)
        except DamagedBatch:
            self.unreadable_count += 1

    def _note(self, record: Record) -> None:
        self._kinds[type(record).__name__] += 1
        match record:
            case records.TasksSubmitted() | records.TasksRestored():
                self._submitted[record.job] += len(record.tasks)
            case records.TasksEnded() | records.EndsRestored():
                self._ended[record.job] += len(record.ends)
            case _:
                pass

    def report(self) -> list[str]:
        """Lines for a user."""
        if not self:
            return ["nothing is damaged, and nothing was dropped"]
        rows = f"{self.row_count} rows ({self.unreadable_count} of them unreadable), {self.size_bytes} bytes"
        lines = [f"damaged: {self.where}", f"dropped from there on: {rows}"]
        lines += [f"dropped records: {count} {kind}" for kind, count in sorted(self._kinds.items())]
        jobs = sorted(self._submitted.keys() | self._ended.keys())
        for job in jobs[:JOBS_NAMED_MAX]:
            lines.append(
                f"job {job}: {self._submitted[job]} tasks as submitted, {self._ended[job]} ends: submit these again"
                if self._submitted[job]
                else f"job {job}: {self._ended[job]} ends: these tasks run again"
            )
        if len(jobs) > JOBS_NAMED_MAX:
            lines.append(f"and {len(jobs) - JOBS_NAMED_MAX} jobs more")
        return lines

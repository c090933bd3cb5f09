"""Feeding an array job: calls become batches, as fast as the coordinator takes them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from herder_shared.limits import ARRAY_TASKS_MAX, BATCH_BYTES_MAX, BATCH_TASKS_MAX

if TYPE_CHECKING:
    from herder.calls import Call
    from herder.connection import Connection
    from herder.jobs import Record
    from herder.outbox import Batch
    from herder.tracks import Track

#: A feeder sends what it has after this long, so that the first tasks run while the rest is pickled.
_FEED_INTERVAL_S = 0.002


class Feeder:
    """Turns calls into batches of one job."""

    def __init__(self, connection: Connection, track: Track, record: Record) -> None:
        self._connection = connection
        self._track = track
        self._record = record
        self._batch: Batch | None = None
        self._ended: list[tuple[int, BaseException | None]] = []
        self.is_finished = False
        self._sent_s = 0.0

    def add(self, call: Call) -> None:
        """Add a task; sent with its neighbours.

        Raises:
            ValueError: more tasks than a job may have.
            HerderError: the connection or the job is over.
        """
        if self._record.submitted_count + (len(self._batch.items) if self._batch else 0) >= ARRAY_TASKS_MAX:
            raise ValueError(f"an array job may have {ARRAY_TASKS_MAX:,} tasks; split this one")
        batch = self._batch
        if batch is not None and (batch.blobs or call.blobs or batch.python != call.python):
            self.flush()
            batch = None
        if batch is None:
            batch = self._batch = call.batch(self._track.job)
        else:
            batch.items.append(call.item)
            batch.size_bytes += call.size_bytes
            batch.claims.extend(call.claims)
        if call.ended is not None:
            self._ended.append((len(batch.items) - 1, call.ended.outcome))
        if (
            len(batch.items) >= BATCH_TASKS_MAX
            or batch.size_bytes >= BATCH_BYTES_MAX
            or time.monotonic() - self._sent_s > _FEED_INTERVAL_S
        ):
            self.flush()

    def flush(self) -> None:
        """Send what was added."""
        batch, self._batch = self._batch, None
        if batch is None:
            return
        ended, self._ended = self._ended, []

        def admit(first: int) -> None:
            with self._record.changed:
                self._record.submitted_count = first + len(batch.items)
            # Before the coordinator can say that they failed: their arguments are not usable.
            for offset, outcome in ended:
                self._record.end_locally(first + offset, outcome)

        self._connection.submit(self._track, batch, admit)
        if ended:
            indices = tuple(batch.first + offset for offset, _ in ended)
            self._connection.cancel(self._track.job, indices, running=True)
        self._sent_s = time.monotonic()

    def finish(self, error: BaseException | None) -> None:
        """No more tasks come; what was added is sent, unless `error` says that feeding failed."""
        self.is_finished = True
        if error is None:
            self.flush()
        self._connection.close_job(self._track)
        if self._record.is_stopped:
            # Said again behind the last task: what was fed after the first time is meant too.
            self._connection.cancel(self._track.job, None, running=self._record.stops_running)
        self._record.fed(error)

    @property
    def is_stopped(self) -> bool:
        """Whoever reads the results does not want more tasks."""
        return self._record.is_stopped


def feed(feeder: Feeder, calls: Iterable[Call]) -> None:
    """Submit all calls of an array; what goes wrong on the way is told by the job."""
    error: BaseException | None = None
    try:
        for call in calls:
            if feeder.is_stopped:
                break
            feeder.add(call)
        feeder.flush()
    except BaseException as raised:  # noqa: BLE001 - of the user's iterables: handed to whoever reads the results
        error = raised
    feeder.finish(error)

"""What a connection knows of one job: how much was submitted and ended, and which events may be acknowledged.

Theory of operation. A task's end must stay with the coordinator as long as somebody may still need it from there:
while its result is fetched as a blob, and while a submission that depends on it is not acknowledged. So each end has a
cursor, some cursors are *held*, and `AckEvents` never passes a held one. User threads claim a dependency before they
look whether it is done; the loop's thread ends a future before it looks for claims. Either sees the other, whichever
comes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from herder_shared.errors import HerderError
from herder_shared.ids import JobId, NodeName
from herder_shared.wire.messages import JobSpec, TaskEnd


class Sink(Protocol):
    """Who gets a job's events. Called in the connection's thread; must not block."""

    @property
    def is_wanted(self) -> bool:
        """Whether anybody could still look at what is told here."""

    def started(self, tasks: Sequence[tuple[int, NodeName]]) -> None:
        """These tasks' code runs now, on these nodes."""

    def ended(self, ends: Sequence[TaskEnd]) -> None:
        """These tasks have ended; large results are here already."""

    def reset(self, indices: Sequence[int]) -> None:
        """These tasks had ended and are run again: a new end of each follows."""

    def lost(self, first: int, error: HerderError | None) -> None:
        """Tasks from `first` on that have not ended will get no end: `error` says why, None that they are cancelled."""

    def ended_among(self, count: int) -> set[int]:
        """Those of the first `count` tasks that have ended, as far as was told here."""

    def miss(self, indices: Iterable[int]) -> None:
        """These tasks ended before this sink came, and how was told to another alone."""


class Shared:
    """The sink of a job of our own that others of this process have asked for: `first`, whose job it is, and theirs.

    `first` may be shared already: then those of the others are left out whom nobody wants any more.
    """

    def __init__(self, first: Sink, another: Sink) -> None:
        others: tuple[Sink, ...] = first._sinks if isinstance(first, Shared) else (first,)
        self._sinks: tuple[Sink, ...] = (others[0], *(sink for sink in others[1:] if sink.is_wanted), another)

    def __len__(self) -> int:
        return len(self._sinks)

    @property
    def others(self) -> tuple[Sink, ...]:
        """Those that came after `first`."""
        return self._sinks[1:]

    @property
    def is_wanted(self) -> bool:
        """Sink."""
        return True

    def started(self, tasks: Sequence[tuple[int, NodeName]]) -> None:
        """Sink."""
        for sink in self._sinks:
            sink.started(tasks)

    def ended(self, ends: Sequence[TaskEnd]) -> None:
        """Sink."""
        for sink in self._sinks:
            sink.ended(ends)

    def reset(self, indices: Sequence[int]) -> None:
        """Sink."""
        for sink in self._sinks:
            sink.reset(indices)

    def lost(self, first: int, error: HerderError | None) -> None:
        """Sink."""
        for sink in self._sinks:
            sink.lost(first, error)

    def ended_among(self, count: int) -> set[int]:
        """Sink."""
        return self._sinks[0].ended_among(count)

    def miss(self, indices: Iterable[int]) -> None:
        """Sink."""
        raise AssertionError(f"nothing of {indices} was told to anybody else")


class Track:
    """One job as the connection follows it.

    What both user threads and the connection's thread change (`submitted_count`, `unresolved_count`, `has_ended`,
    `claims`) is changed under the connection's lock only; all else belongs to the connection's thread.
    """

    __slots__ = (
        "__weakref__",
        "acked",
        "claims",
        "closed_count",
        "cursor",
        "error",
        "fetching",
        "has_ended",
        "held",
        "is_detached",
        "is_observer",
        "is_settled",
        "job",
        "refused_from",
        "sink",
        "spec",
        "submitted_count",
        "unresolved_count",
    )

    def __init__(self, job: JobId, sink: Sink, spec: JobSpec | None) -> None:
        self.job = job
        self.sink = sink
        self.spec = spec
        #: Follows a job that this connection did not submit: nobody waits for its end when the client is shut down.
        self.is_observer = spec is None
        self.is_detached = spec is not None and spec.detached
        #: Everything about it was once said and acknowledged: the coordinator knows it, if anybody asks for more.
        self.is_settled = False
        self.submitted_count = 0
        self.unresolved_count = 0
        #: By index, of those that this connection submitted. That a task is run again may be heard twice, or not before
        #: it has ended again.
        self.has_ended = bytearray()
        self.closed_count: int | None = None
        #: Set when the coordinator takes no more tasks of this job.
        self.error: HerderError | None = None
        #: Tasks from here on are to be submitted again in a moment.
        self.refused_from: int | None = None
        #: The next event expected, and the one acknowledged last.
        self.cursor = 0
        self.acked = 0
        #: index -> how many unacknowledged submissions depend on it.
        self.claims: dict[int, int] = {}
        #: index -> cursor of its end, for ends that must not be acknowledged yet.
        self.held: dict[int, int] = {}
        #: Those whose result is on its way: they are held whether anybody claims them or not.
        self.fetching: set[int] = set()

    @property
    def ackable(self) -> int:
        """The cursor up to which events may be acknowledged."""
        # What was acknowledged once is gone there: a claim that comes later cannot bring it back.
        return max(self.acked, min(self.held.values(), default=self.cursor))

    @property
    def wanted_from(self) -> int:
        """The cursor from which events are asked for."""
        return min(self.cursor, self.ackable)

    @property
    def is_over(self) -> bool:
        """Nothing more will be heard of this job or said about it."""
        return (
            self.closed_count is not None and not self.unresolved_count and not self.held and self.acked == self.cursor
        )

    def resolve(self, indices: Iterable[int], *, ended: bool) -> None:
        """These tasks have ended, or are run again; which of them are news is found out here."""
        if self.is_observer:
            return
        has_ended = self.has_ended
        for index in indices:
            if has_ended[index] != ended:
                has_ended[index] = ended
                self.unresolved_count += -1 if ended else 1

    def claim(self, index: int) -> None:
        """An unacknowledged submission depends on this task."""
        self.claims[index] = self.claims.get(index, 0) + 1

    def unclaim(self, index: int) -> bool:
        """One submission less depends on it. Whether that was the last."""
        left = self.claims.get(index, 0) - 1
        if left > 0:
            self.claims[index] = left
            return False
        self.claims.pop(index, None)
        return True

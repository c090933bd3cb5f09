"""What the server needs of a journal. Any storage error is fail-stop: the program ends without another acknowledgement.
The one exception is a full disk, before anything was written: then acknowledgements wait until there is room.

A journal is opened by one process at a time, replayed, given a fresh snapshot, and appended to by one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from herder_coordinator.core.records import Record
from herder_shared.ids import ClusterId


class JournalError(Exception):
    """The storage failed or is damaged. Fail-stop: nothing may be acknowledged after it."""


class JournalFull(JournalError):
    """No space. Not damage: nothing was written, and what was acknowledged is kept."""


class JournalDamaged(JournalError):
    """What was acknowledged cannot all be read; the message says where. `--repair` goes on, and says what it drops."""


class JournalLocked(JournalError):
    """Another coordinator holds this folder; the message names its pid and host."""


class JournalFenced(JournalError):
    """Another coordinator has taken over: this one must end."""


class StandbyEnded(Exception):
    """Told to end while another coordinator held the journal."""


#: How a standby waits: it is called with the reason and the seconds to wait for, and gives False when it must end.
StandBy = Callable[[str, float], bool]


class Journal(Protocol):
    """Order: `open`, `replay`, `begin`, then any number of `append`, then `close`."""

    cluster: ClusterId
    #: This life of the coordinator; durable before `begin` returns.
    epoch: int

    def replay(self) -> Iterator[Record]:
        """Every record, oldest first, the snapshot's first of all. Raises JournalDamaged on damage before the tail."""

    def begin(self, snapshot: Iterable[Record]) -> None:
        """Write a fresh snapshot (records that rebuild the state), make the new epoch durable, start the writer."""

    def append(self, records: Sequence[Record], durable: Callable[[float], None]) -> None:
        """Queue records for the next group commit. `durable(seconds it took)` is called in the writer's thread when
        they, and all before them, are on disk. Returns at once; an empty batch is durable when those before it are."""

    def on_failure(self, callback: Callable[[JournalError], None]) -> None:
        """Called once, in the writer's thread, when a write failed. No `durable` is called after it."""

    def close(self) -> None:
        """Commit what is queued and release the lock."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def shortage(self) -> str:
        """Why nothing new should be taken in for now, in words for a user (no space); "" when all is well."""

"""Large results on their way from the coordinator. No I/O, no clock."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from herder_shared.ids import BlobId
from herder_shared.limits import BLOB_BYTES_MAX
from herder_shared.wire.messages import BlobStored, ClientToCoordinator, PutBlob, WantBlob

#: Blobs on their way down at a time.
FETCHES_MAX = 4

#: Called with the bytes, or None when the coordinator does not have them any more.
Fetched = Callable[[bytes | None], None]


@dataclass(slots=True)
class _Fetch:
    #: Gives its bytes without another copy of them, which for gigabytes would stop the loop for seconds.
    content: io.BytesIO = field(default_factory=io.BytesIO)
    received_bytes: int = 0
    waiting: list[Fetched] = field(default_factory=list)
    is_asked: bool = False


class Fetches:
    """Blobs wanted, a few at a time, each continued after a lost connection where it stopped."""

    def __init__(self) -> None:
        #: In the order in which they were wanted, which is that in which most of them end.
        self._fetches: OrderedDict[BlobId, _Fetch] = OrderedDict()

    def want(self, name: BlobId, fetched: Fetched) -> None:
        """Ask for a blob; `fetched` is called once."""
        self._fetches.setdefault(name, _Fetch()).waiting.append(fetched)

    def pump(self) -> list[ClientToCoordinator]:
        """What is to be asked now."""
        out: list[ClientToCoordinator] = []
        for name, fetch in islice(self._fetches.items(), FETCHES_MAX):
            if not fetch.is_asked:
                fetch.is_asked = True
                out.append(WantBlob(name, fetch.received_bytes))
        return out

    def rewind(self) -> None:
        """The connection was lost: ask again."""
        for fetch in self._fetches.values():
            fetch.is_asked = False

    def received(self, chunk: PutBlob) -> list[ClientToCoordinator]:
        """A chunk came: what to answer. Chunks that do not follow on (from an earlier connection) are passed over."""
        fetch = self._fetches.get(chunk.id)
        if fetch is None or chunk.offset != fetch.received_bytes or not 0 <= chunk.total <= BLOB_BYTES_MAX:
            return []
        fetch.content.write(chunk.data)
        fetch.received_bytes += len(chunk.data)
        if fetch.received_bytes >= chunk.total:
            del self._fetches[chunk.id]
            content = fetch.content.getvalue()
            for fetched in fetch.waiting:
                fetched(content)
        return [BlobStored(chunk.id, fetch.received_bytes)]

    def missing(self, name: BlobId) -> None:
        """The coordinator does not have this blob."""
        fetch = self._fetches.pop(name, None)
        for fetched in fetch.waiting if fetch is not None else ():
            fetched(None)

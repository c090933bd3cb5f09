"""Immutable bytes: blobs on disk within a budget, and the functions that children are sent, in memory.

A blob is a file named by its hash; it is there wholly or not at all (written aside, checked, renamed). What an attempt
needs, and results that the coordinator does not have yet, are pinned; the rest goes when the budget is exceeded, the
least recently used first. A result for which the disk has no room stays in a memory file until it is not pinned any
more: work that is done is not lost for want of a disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path

from herder_shared.errors import DataLost
from herder_shared.ids import BlobId, blob_id
from herder_shared.limits import GIB, MIB

#: Blobs on a node's disk that nobody needs now are kept up to this.
BUDGET_BYTES = 8 * GIB
FUNCTION_BUDGET_BYTES = 64 * MIB
_COPY_BYTES = 1 * MIB


class Partial:
    """A blob that is being received."""

    def __init__(self, path: Path, total: int) -> None:
        self.path = path
        self.total = total
        self.size = 0
        self._hash = hashlib.blake2b(digest_size=20)
        self._file = path.open("wb")

    def write(self, data: bytes) -> None:
        """Append.

        Raises:
            OSError: the disk is full, or broken.
        """
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def close(self) -> BlobId:
        """End writing; returns the hash of what was written."""
        self._file.close()
        return BlobId(self._hash.hexdigest())

    def abandon(self) -> None:
        """Throw it away."""
        with contextlib.suppress(OSError):  # what is buffered has no room either
            self._file.close()
        self.path.unlink(missing_ok=True)


class BlobStore:
    """The node's blobs. Invariant: `_sizes` lists the files in `folder`, least recently used first."""

    def __init__(self, folder: Path, budget_bytes: int = BUDGET_BYTES) -> None:
        self._folder = folder
        self._budget_bytes = budget_bytes
        self._sizes: OrderedDict[BlobId, int] = OrderedDict()
        self._pins: dict[BlobId, int] = {}
        self._bytes = 0
        self._partials = 0
        #: Blobs which the disk would not take, and what it said last ("": it takes them).
        self._in_memory: dict[BlobId, int] = {}
        self._trouble = ""
        for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime):
            if len(path.name) == 40:
                self._add(BlobId(path.name), path.stat().st_size)
            else:
                path.unlink()

    @property
    def size_bytes(self) -> int:
        """All blobs together."""
        return self._bytes

    def trouble(self) -> str:
        """Why results have to be kept in memory, as long as some are; "" = they have not."""
        return self._trouble if self._in_memory else ""

    def has(self, blob: BlobId) -> bool:
        """Whether it is here wholly."""
        return blob in self._sizes

    def size_of(self, blob: BlobId) -> int:
        """Its size in bytes."""
        return self._sizes[blob]

    def open(self, blob: BlobId) -> int:
        """A read-only descriptor of it, the caller's to close.

        Raises:
            DataLost: it is not here.
        """
        self._sizes.move_to_end(blob) if blob in self._sizes else None
        kept = self._in_memory.get(blob)
        path = self._folder / blob if kept is None else f"/proc/self/fd/{kept}"
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataLost(f"blob {blob} is not on this node: {error}") from error

    def put(self, content: bytes) -> BlobId:
        """Store bytes. May be called in a thread, but for `keep` with the result afterwards in the loop's.

        Raises:
            OSError: neither disk nor memory take it.
        """
        try:
            return self._put([content])
        except OSError as error:
            fd = os.memfd_create("herder-result")
            try:
                with open(fd, "wb", closefd=False) as file:
                    file.write(content)
            except OSError:
                os.close(fd)
                raise
            return self._keep_in_memory(fd, blob_id(content), error)

    def put_descriptor(self, fd: int, size: int) -> BlobId:
        """Store what a memfd holds, from its start. As `put`."""
        try:
            return self._put(_pieces(fd, size))
        except OSError as error:
            content_hash = hashlib.blake2b(digest_size=20)
            for piece in _pieces(fd, size):
                content_hash.update(piece)
            return self._keep_in_memory(os.dup(fd), BlobId(content_hash.hexdigest()), error)

    def _put(self, pieces: Iterable[bytes]) -> BlobId:
        partial = self.receive(0)
        try:
            for piece in pieces:
                partial.write(piece)
            return self._settle(partial)
        except OSError:
            partial.abandon()
            raise

    def _keep_in_memory(self, fd: int, blob: BlobId, error: OSError) -> BlobId:
        self._trouble = f"results do not fit on its disk: {error}"
        if self._in_memory.setdefault(blob, fd) != fd:
            os.close(fd)
        return blob

    def keep(self, blob: BlobId, size: int) -> None:
        """Enter what `put` stored into the list."""
        self._add(blob, size)

    def receive(self, total: int) -> Partial:
        """Begin a blob."""
        self._partials += 1
        return Partial(self._folder / f"part-{os.getpid()}-{self._partials}", total)

    def complete(self, partial: Partial, blob: BlobId) -> bool:
        """A received blob is whole. False, and it is gone, if its hash is another."""
        if partial.close() != blob:
            partial.path.unlink(missing_ok=True)
            return False
        partial.path.rename(self._folder / blob)
        self._add(blob, partial.size)
        return True

    def pin(self, blob: BlobId) -> None:
        """Do not drop it. Counted."""
        self._pins[blob] = self._pins.get(blob, 0) + 1

    def unpin(self, blob: BlobId) -> None:
        """Take back one `pin`."""
        left = self._pins.get(blob, 0) - 1
        if left > 0:
            self._pins[blob] = left
        else:
            self._pins.pop(blob, None)
            kept = self._in_memory.pop(blob, None)
            if kept is not None:
                os.close(kept)
                self._bytes -= self._sizes.pop(blob, 0)
            self._make_room()

    def _settle(self, partial: Partial) -> BlobId:
        blob = partial.close()
        partial.path.rename(self._folder / blob)
        return blob

    def _add(self, blob: BlobId, size: int) -> None:
        self._bytes += size - self._sizes.pop(blob, 0)
        self._sizes[blob] = size
        self._make_room()

    def _make_room(self) -> None:
        if self._bytes <= self._budget_bytes:
            return
        for blob in list(self._sizes):
            if self._bytes <= self._budget_bytes:
                return
            if blob not in self._pins and blob not in self._in_memory and blob != next(reversed(self._sizes)):
                self._bytes -= self._sizes.pop(blob)
                (self._folder / blob).unlink(missing_ok=True)


def _pieces(fd: int, size: int) -> Iterator[bytes]:
    offset = 0
    while offset < size and (data := os.pread(fd, min(_COPY_BYTES, size - offset), offset)):
        yield data
        offset += len(data)


class FunctionCache:
    """Pickled functions by hash, in memory up to a budget; what is beyond it goes to the blob store, pinned."""

    def __init__(self, store: BlobStore, budget_bytes: int = FUNCTION_BUDGET_BYTES) -> None:
        self._store = store
        self._budget_bytes = budget_bytes
        self._contents: OrderedDict[BlobId, bytes] = OrderedDict()
        self._bytes = 0

    def add(self, function: BlobId, content: bytes) -> None:
        """Keep it. Doing so twice is harmless."""
        if function in self._contents:
            return
        self._contents[function] = content
        self._bytes += len(content)
        while self._bytes > self._budget_bytes and len(self._contents) > 1:
            oldest, dropped = self._contents.popitem(last=False)
            self._bytes -= len(dropped)
            assert blob_id(dropped) == oldest
            self._store.keep(self._store.put(dropped), len(dropped))
            self._store.pin(oldest)

    def get(self, function: BlobId) -> bytes | None:
        """Its bytes, or None: it is a blob."""
        content = self._contents.get(function)
        if content is not None:
            self._contents.move_to_end(function)
        return content

"""Blobs on the coordinator's disk: immutable files named by the hash of their bytes.

`<state_dir>/blobs/<two digits>/<id>`, mode 0600 in 0700 folders. A blob exists when its file has its final name: it
was written under another (`.part`), its hash compared with its name, synced, renamed, and the folder synced.
Everything that touches the disk runs in the store's own threads, a chunk at a time; no blob is ever in memory as a
whole.

Who needs a blob is the core's business (`State.blobs`). A blob that nobody has named yet, because it has just been
uploaded or the coordinator has just started, is an *orphan* until an event names it, and is dropped when its time is
over."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from herder_shared.errors import ConfigError
from herder_shared.ids import BlobId
from herder_shared.limits import BLOB_CHUNK_BYTES

log = logging.getLogger(__name__)

#: Threads for reading, writing and syncing: enough to have several syncs under way.
THREADS_MAX = 4
#: How long an uploaded blob may wait for the submission or result that names it. A client sends that right afterwards;
#: after a restart agents and clients need some time to be back.
ORPHAN_S = 600.0

_ID = re.compile(r"[0-9a-f]{40}")
_T = TypeVar("_T")


def is_blob_id(text: str) -> bool:
    """Whether a peer's text can be a blob's name, and so part of a path."""
    return _ID.fullmatch(text) is not None


class WrongHash(Exception):
    """The bytes are not those that the name promises."""


class BlobStore:
    """The blobs that are durable here. All methods are called in the event loop's thread.

    Invariant: a blob is in `_sizes` only while its file is complete, synced and under its final name.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sizes: dict[BlobId, int] = {}
        #: Orphans, with the time at which they are dropped; oldest first.
        self._orphans: dict[BlobId, float] = {}
        self._review_s = 0.0
        self._threads = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="blobs")

    def open(self, named: Iterable[BlobId], now_s: float) -> None:
        """Look at what is there. What `named` does not contain is an orphan; what was half written is deleted.

        Raises:
            ConfigError: the folder cannot be used.
        """
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for entry in sorted(self._folder.glob("*/*")):
                if is_blob_id(entry.name):
                    self._sizes[BlobId(entry.name)] = entry.stat().st_size
                elif entry.suffix == ".part":
                    entry.unlink()
        except OSError as error:
            raise ConfigError(f"the blob folder {self._folder} cannot be used: {error}") from error
        wanted = set(named)
        lost = wanted - self._sizes.keys()
        if lost:
            log.error("%d blobs that tasks need are missing from %s; the first: %s", len(lost), self._folder, min(lost))
        self._review_s = now_s + ORPHAN_S
        self._orphans = {blob: now_s + ORPHAN_S for blob in self._sizes if blob not in wanted}

    def __contains__(self, blob: BlobId) -> bool:
        return blob in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def size_bytes(self, blob: BlobId) -> int:
        """Raises KeyError when it is not here."""
        return self._sizes[blob]

    def total_bytes(self) -> int:
        """Of all blobs."""
        return sum(self._sizes.values())

    def promise(self, blob: BlobId, now_s: float) -> None:
        """A peer was told that the blob is here: keep it for a while, whoever stops needing it meanwhile."""
        self._orphans.pop(blob, None)
        self._orphans[blob] = now_s + ORPHAN_S

    def name(self, blobs: Iterable[BlobId]) -> None:
        """The core has taken in an event that names these blobs: it counts its references from now on. Until then their
        promise stands, as an order to drop them that was decided earlier may still be on its way."""
        for blob in blobs:
            self._orphans.pop(blob, None)

    def drop(self, blobs: Iterable[BlobId]) -> None:
        """The core needs these no more. What was promised since to somebody else stays for now."""
        gone = [blob for blob in blobs if blob not in self._orphans and self._sizes.pop(blob, None) is not None]
        if gone:
            self._threads.submit(_unlink, [self._path(blob) for blob in gone])

    def sweep(self, is_needed: Callable[[BlobId], bool], now_s: float) -> None:
        """Drop orphans whose time is over. To be called now and then; cheap but for every `ORPHAN_S`, when all blobs
        are looked at: one may have been named by what the core then refused."""
        due: list[BlobId] = []
        for blob, due_s in self._orphans.items():
            if due_s > now_s:
                break
            due.append(blob)
        self.name(due)
        self.drop(blob for blob in due if not is_needed(blob))
        if now_s >= self._review_s:
            self._review_s = now_s + ORPHAN_S
            for blob in self._sizes:
                if blob not in self._orphans and not is_needed(blob):
                    self._orphans[blob] = now_s + ORPHAN_S

    def run(self, work: Callable[[], _T]) -> asyncio.Future[_T]:
        """Do something that blocks in one of the store's threads."""
        return asyncio.get_running_loop().run_in_executor(self._threads, work)

    def read(self, blob: BlobId, offset: int) -> asyncio.Future[bytes]:
        """One chunk. The future's exception is an OSError when the file cannot be read."""
        path = self._path(blob)
        return self.run(lambda: _read_chunk(path, offset))

    def incoming(self, blob: BlobId, tag: str) -> IncomingBlob:
        """Begin to write a blob. `tag` tells several that are under way at once."""
        return IncomingBlob(self._path(blob), blob, tag)

    def stored(self, blob: BlobId, size_bytes: int, now_s: float) -> None:
        """An incoming blob is durable."""
        self._sizes[blob] = size_bytes
        self.promise(blob, now_s)

    def close(self) -> None:
        """Finish what is under way in the threads and end them."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _path(self, blob: BlobId) -> Path:
        return self._folder / blob[:2] / blob


class IncomingBlob:
    """A blob that is being written. Its methods block; one thread at a time calls them.

    It owns the descriptor of the `.part` file, which `finish` and `abandon` close.
    """

    def __init__(self, path: Path, blob: BlobId, tag: str) -> None:
        self._path = path
        self._part = path.with_name(f"{path.name}.{tag}.part")
        self._blob = blob
        self._hash = hashlib.blake2b(digest_size=20)
        self._fd: int | None = None

    def write(self, data: bytes) -> None:
        """Append. Raises OSError."""
        if self._fd is None:
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            self._fd = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._hash.update(data)
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def finish(self) -> None:
        """Make it durable under its name.

        Raises:
            WrongHash: the bytes do not fit the name; nothing is kept.
            OSError: the disk; nothing is kept.
        """
        try:
            if self._hash.hexdigest() != self._blob:
                raise WrongHash(f"the bytes sent as blob {self._blob} have the hash {self._hash.hexdigest()}")
            if self._fd is not None:
                os.fsync(self._fd)
            os.rename(self._part, self._path)
            _sync_folder(self._path.parent)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close and delete what is there under the preliminary name. Idempotent."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            self._part.unlink(missing_ok=True)


def _read_chunk(path: Path, offset: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, BLOB_CHUNK_BYTES, offset)
    finally:
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unlink(paths: list[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.error("a blob that is not needed any more stays: %s", error)

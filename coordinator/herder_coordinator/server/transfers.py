"""Blobs on their way over links: chunks in (`PutBlob` → `BlobStored`) and out (`WantBlob` → `PutBlob`), bounded.

In: a link's chunks are written in order by the store's threads, each confirmed when it is written and the last when
the blob is durable. A sender has `BLOB_CHUNKS_IN_FLIGHT` chunks of a blob under way and not more; a link which has
much waiting for the disk is not read for a while.

Out: per link `BLOBS_OUT_PER_LINK` blobs are under way at once, each with `BLOB_CHUNKS_IN_FLIGHT` unconfirmed chunks;
the others wait in order. So neither a large blob nor a slow receiver takes more than a few MiB of memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from herder_coordinator.server.blobs import BlobStore, IncomingBlob, WrongHash, is_blob_id
from herder_shared.errors import PayloadTooLarge, RemoteProtocolError
from herder_shared.ids import BlobId
from herder_shared.limits import BLOB_BYTES_MAX, BLOB_CHUNK_BYTES, BLOB_CHUNKS_IN_FLIGHT, MIB
from herder_shared.wire.messages import BlobStored, NoBlob, Notice, PutBlob, Refused, WantBlob
from herder_shared.wire.stream import Link

log = logging.getLogger(__name__)

WINDOW_BYTES = BLOB_CHUNKS_IN_FLIGHT * BLOB_CHUNK_BYTES
#: Chunks of one link that wait for the disk: above the first it is not read, below the second it is again.
WAITING_BYTES_MAX = 16 * MIB
WAITING_BYTES_RESUME = 4 * MIB
#: Blobs that one link may have half sent, or wait for. More is a peer gone wrong.
BLOBS_IN_PER_LINK = 4_096
WANTED_PER_LINK = 100_000
BLOBS_OUT_PER_LINK = 4


@dataclass(slots=True, eq=False)
class _Upload:
    """One blob on its way in. Bytes: `received_bytes` ≥ `stored_bytes`; the difference waits in `chunks` or is being
    written."""

    blob: BlobId
    total_bytes: int
    incoming: IncomingBlob
    chunks: deque[bytes] = field(default_factory=deque)
    received_bytes: int = 0
    stored_bytes: int = 0
    is_writing: bool = False
    is_dropped: bool = False


@dataclass(slots=True, eq=False)
class _Download:
    """One blob on its way out."""

    blob: BlobId
    total_bytes: int
    sent_bytes: int
    confirmed_bytes: int
    is_reading: bool = False


@dataclass(slots=True, eq=False)
class _LinkTransfers:
    uploads: dict[BlobId, _Upload] = field(default_factory=dict)
    waiting_bytes: int = 0
    is_paused: bool = False
    downloads: dict[BlobId, _Download] = field(default_factory=dict)
    wanted: dict[BlobId, int] = field(default_factory=dict)


class Transfers:
    """All blobs under way. `arrived` is called when a blob has become durable here."""

    def __init__(self, store: BlobStore, arrived: Callable[[BlobId], None]) -> None:
        self._store = store
        self._arrived = arrived
        self._links: dict[Link, _LinkTransfers] = {}
        #: For the metrics: payload bytes by direction since the start.
        self.in_bytes = 0
        self.out_bytes = 0

    def is_arriving(self, link: Link, blob: BlobId) -> bool:
        """Whether this link has begun to send the blob and has not finished."""
        transfers = self._links.get(link)
        return transfers is not None and blob in transfers.uploads

    def closed(self, link: Link) -> None:
        """The link is gone: so is what was under way on it."""
        transfers = self._links.pop(link, None)
        if transfers is None:
            return
        for upload in transfers.uploads.values():
            upload.is_dropped = True
            if not upload.is_writing:
                self._store.run(upload.incoming.abandon)

    # --- in ----------------------------------------------------------------------------------------------------------

    def put(self, link: Link, message: PutBlob) -> None:
        """A chunk came."""
        if not is_blob_id(message.id):
            _break_off(link, f"{message.id[:80]!r} is not the name of a blob")
            return
        if message.id in self._store:
            self._store.promise(message.id, asyncio.get_running_loop().time())
            link.send(BlobStored(message.id, message.total))
            return
        transfers = self._links.setdefault(link, _LinkTransfers())
        upload = transfers.uploads.get(message.id)
        if upload is None:
            if message.offset:
                log.debug("a chunk from the middle of blob %s, which was here and was dropped", message.id)
                return
            upload = self._begin(link, transfers, message)
        if upload is not None and self._check(link, upload, message):
            upload.received_bytes += len(message.data)
            upload.chunks.append(message.data)
            self.in_bytes += len(message.data)
            transfers.waiting_bytes += len(message.data)
            if transfers.waiting_bytes > WAITING_BYTES_MAX and not transfers.is_paused:
                transfers.is_paused = True
                link.pause_reading()
            self._write(link, transfers, upload)

    def _begin(self, link: Link, transfers: _LinkTransfers, message: PutBlob) -> _Upload | None:
        if not 0 <= message.total <= BLOB_BYTES_MAX:
            text = f"blob {message.id} has {message.total} bytes; at most {BLOB_BYTES_MAX} are allowed"
            link.refuse(Refused(PayloadTooLarge.__name__, text))
            return None
        if len(transfers.uploads) >= BLOBS_IN_PER_LINK:
            _break_off(link, f"more than {BLOBS_IN_PER_LINK} blobs are half sent")
            return None
        upload = _Upload(message.id, message.total, self._store.incoming(message.id, str(link.session)))
        transfers.uploads[message.id] = upload
        return upload

    def _check(self, link: Link, upload: _Upload, message: PutBlob) -> bool:
        in_flight_bytes = upload.received_bytes - upload.stored_bytes
        end = message.offset + len(message.data)
        if message.offset != upload.received_bytes or message.total != upload.total_bytes or end > message.total:
            _break_off(link, f"blob {upload.blob}: a chunk at {message.offset}, expected at {upload.received_bytes}")
        elif len(message.data) > BLOB_CHUNK_BYTES or (not message.data and message.total):
            _break_off(link, f"blob {upload.blob}: a chunk of {len(message.data)} bytes")
        elif in_flight_bytes + len(message.data) > WINDOW_BYTES:
            _break_off(link, f"blob {upload.blob}: more than {BLOB_CHUNKS_IN_FLIGHT} chunks are not confirmed")
        else:
            return True
        return False

    def _write(self, link: Link, transfers: _LinkTransfers, upload: _Upload) -> None:
        if upload.is_writing or not upload.chunks:
            return
        upload.is_writing = True
        chunks = list(upload.chunks)
        upload.chunks.clear()
        is_last = upload.received_bytes == upload.total_bytes

        def work() -> int:
            for chunk in chunks:
                upload.incoming.write(chunk)
            if is_last:
                upload.incoming.finish()
            return sum(map(len, chunks))

        done = self._store.run(work)
        done.add_done_callback(lambda future: self._written(link, transfers, upload, future))

    def _written(self, link: Link, transfers: _LinkTransfers, upload: _Upload, future: asyncio.Future[int]) -> None:
        upload.is_writing = False
        if future.cancelled():
            return
        error = future.exception()
        if isinstance(error, WrongHash | OSError):
            self._failed(link, transfers, upload, error)
            return
        if error is not None:
            raise error
        written_bytes = future.result()
        upload.stored_bytes += written_bytes
        transfers.waiting_bytes -= written_bytes
        is_whole = upload.stored_bytes == upload.total_bytes
        if is_whole:
            transfers.uploads.pop(upload.blob, None)
            self._store.stored(upload.blob, upload.total_bytes, asyncio.get_running_loop().time())
        elif upload.is_dropped:
            self._store.run(upload.incoming.abandon)
        link.send(BlobStored(upload.blob, upload.stored_bytes))
        if is_whole:
            self._arrived(upload.blob)
        self._resume(link, transfers)
        if not upload.is_dropped:
            self._write(link, transfers, upload)

    def _failed(self, link: Link, transfers: _LinkTransfers, upload: _Upload, error: Exception) -> None:
        transfers.uploads.pop(upload.blob, None)
        self._store.run(upload.incoming.abandon)
        if isinstance(error, WrongHash):
            _break_off(link, str(error))
            return
        # Nothing is acknowledged, so nothing is lost: the peer connects again, with its backoff, and sends it again.
        text = f"the coordinator cannot store a blob: {error}. It is sent again until there is room"
        log.error("%s (%s %r)", text, link.peer.role, link.peer.name)
        if link.peer.role != "agent":
            link.send(Notice("warning", text))
        link.close(text)

    def _resume(self, link: Link, transfers: _LinkTransfers) -> None:
        if transfers.is_paused and transfers.waiting_bytes < WAITING_BYTES_RESUME:
            transfers.is_paused = False
            link.resume_reading()

    # --- out ---------------------------------------------------------------------------------------------------------

    def want(self, link: Link, message: WantBlob) -> None:
        """A peer wants a blob."""
        if message.id not in self._store or not 0 <= message.offset <= self._store.size_bytes(message.id):
            link.send(NoBlob(message.id))
            return
        transfers = self._links.setdefault(link, _LinkTransfers())
        if message.id in transfers.downloads:
            return
        if len(transfers.wanted) >= WANTED_PER_LINK:
            _break_off(link, f"more than {WANTED_PER_LINK} blobs are wanted at once")
            return
        transfers.wanted[message.id] = message.offset
        self._serve(link, transfers)

    def confirmed(self, link: Link, message: BlobStored) -> None:
        """The receiver has all bytes up to there."""
        transfers = self._links.get(link)
        download = transfers.downloads.get(message.id) if transfers is not None else None
        if transfers is None or download is None:
            return
        download.confirmed_bytes = max(download.confirmed_bytes, min(message.upto, download.sent_bytes))
        if download.confirmed_bytes == download.total_bytes:
            del transfers.downloads[message.id]
            self._serve(link, transfers)
        else:
            self._read(link, transfers, download)

    def _serve(self, link: Link, transfers: _LinkTransfers) -> None:
        while transfers.wanted and len(transfers.downloads) < BLOBS_OUT_PER_LINK:
            blob = next(iter(transfers.wanted))
            offset = transfers.wanted.pop(blob)
            if blob not in self._store:
                link.send(NoBlob(blob))
                continue
            total_bytes = self._store.size_bytes(blob)
            if offset == total_bytes:
                link.send(PutBlob(blob, offset, total_bytes, b""))
                continue
            download = _Download(blob, total_bytes, offset, offset)
            transfers.downloads[blob] = download
            self._read(link, transfers, download)

    def _read(self, link: Link, transfers: _LinkTransfers, download: _Download) -> None:
        if download.is_reading or download.sent_bytes == download.total_bytes:
            return
        if download.sent_bytes - download.confirmed_bytes + BLOB_CHUNK_BYTES > WINDOW_BYTES:
            return
        download.is_reading = True
        done = self._store.read(download.blob, download.sent_bytes)
        done.add_done_callback(lambda future: self._was_read(link, transfers, download, future))

    def _was_read(
        self, link: Link, transfers: _LinkTransfers, download: _Download, future: asyncio.Future[bytes]
    ) -> None:
        download.is_reading = False
        if future.cancelled() or self._links.get(link) is not transfers:
            return
        error = future.exception()
        if isinstance(error, OSError):
            log.error("blob %s cannot be read: %s", download.blob, error)
        elif error is not None:
            raise error
        chunk = b"" if error else future.result()
        if not chunk:
            transfers.downloads.pop(download.blob, None)
            link.send(NoBlob(download.blob))
            self._serve(link, transfers)
            return
        link.send(PutBlob(download.blob, download.sent_bytes, download.total_bytes, chunk))
        download.sent_bytes += len(chunk)
        self.out_bytes += len(chunk)
        self._read(link, transfers, download)


def _break_off(link: Link, text: str) -> None:
    log.warning("%s %r broke the protocol: %s", link.peer.role, link.peer.name, text)
    link.refuse(Refused(RemoteProtocolError.__name__, text))

"""Blobs over real links: in, out, windows, cuts, wrong bytes."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from coordinator.server.conftest import Run
from herder_coordinator.server.blobs import IncomingBlob
from herder_shared.errors import PayloadTooLarge, RemoteProtocolError
from herder_shared.ids import BlobId, blob_id
from herder_shared.limits import BLOB_CHUNK_BYTES, BLOB_CHUNKS_IN_FLIGHT
from herder_shared.wire import messages as m
from support import links
from support.coordinators import Peer, chunks, client_of, coordinating
from support.links import Authority, Client

CONTENT = bytes(range(256)) * 1024 * 13 + b"tail"
BLOB = blob_id(CONTENT)


async def upload(peer: Peer, content: bytes) -> None:
    """Keep at most the window under way."""
    stored_bytes, sent_bytes = 0, 0
    for chunk in chunks(content, BLOB_CHUNK_BYTES):
        while sent_bytes - stored_bytes > (BLOB_CHUNKS_IN_FLIGHT - 1) * BLOB_CHUNK_BYTES:
            stored_bytes = (await peer.next(m.BlobStored)).upto
        peer.send(chunk)
        sent_bytes += len(chunk.data)
    while (await peer.next(m.BlobStored)).upto < len(content):
        pass


async def download(peer: Peer, blob: BlobId, offset: int = 0) -> bytes:
    peer.send(m.WantBlob(blob, offset))
    content = b""
    while True:
        chunk = await peer.next(m.PutBlob)
        assert (chunk.id, chunk.offset) == (blob, offset + len(content))
        content += chunk.data
        peer.send(m.BlobStored(blob, offset + len(content)))
        if offset + len(content) == chunk.total:
            return content


def test_a_blob_comes_in_and_goes_out_in_chunks(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with coordinating(authority, tmp_path) as running, client_of(authority, running.address) as client:
            await upload(client, CONTENT)
            assert await download(client, BLOB) == CONTENT
            assert await download(client, BLOB, 300_000) == CONTENT[300_000:]
            moved = running.server._transfers
            assert (moved.in_bytes, moved.out_bytes) == (len(CONTENT), 2 * len(CONTENT) - 300_000)

    run(go())


def test_a_receiver_that_confirms_nothing_gets_a_window_and_no_more(
    authority: Authority, tmp_path: Path, run: Run
) -> None:
    async def go() -> None:
        async with coordinating(authority, tmp_path) as running, client_of(authority, running.address) as client:
            await upload(client, CONTENT)
            client.send(m.WantBlob(BLOB))
            for _ in range(BLOB_CHUNKS_IN_FLIGHT):
                await client.next(m.PutBlob)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await client.next(m.PutBlob)

    run(go())


def test_many_blobs_wanted_at_once_all_arrive(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with coordinating(authority, tmp_path) as running, client_of(authority, running.address) as client:
            contents = {blob_id(content): content for content in (bytes([n]) * 100_000 for n in range(12))}
            for content in contents.values():
                client.send(*chunks(content, BLOB_CHUNK_BYTES))
            stored = [await client.next(m.BlobStored) for _ in contents]
            assert {one.id for one in stored} == set(contents)
            client.send(*(m.WantBlob(blob) for blob in contents))
            for _ in contents:
                chunk = await client.next(m.PutBlob)
                assert contents[chunk.id] == chunk.data
                client.send(m.BlobStored(chunk.id, chunk.total))

    run(go())


def test_a_blob_that_is_here_already_is_confirmed_at_once(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with coordinating(authority, tmp_path) as running, client_of(authority, running.address) as client:
            await upload(client, CONTENT)
            client.send(chunks(CONTENT, BLOB_CHUNK_BYTES)[0])
            assert await client.next(m.BlobStored) == m.BlobStored(BLOB, len(CONTENT))

    run(go())


def test_an_empty_blob_comes_and_goes(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with coordinating(authority, tmp_path) as running, client_of(authority, running.address) as client:
            await upload(client, b"")
            assert await download(client, blob_id(b"")) == b""

    run(go())


def test_what_is_not_here_is_said(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with coordinating(authority, tmp_path) as running, client_of(authority, running.address) as client:
            for blob in (BLOB, BlobId("../../../etc/passwd")):
                client.send(m.WantBlob(blob))
                assert await client.next(m.NoBlob) == m.NoBlob(blob)

    run(go())


@pytest.mark.parametrize(
    "bad",
    [
        m.PutBlob(BlobId("../../x"), 0, 1, b"x"),
        m.PutBlob(blob_id(b"x"), 0, 1, b"y"),
        m.PutBlob(blob_id(b"x"), 0, 1, b"xx"),
        m.PutBlob(blob_id(b"x"), 0, 5, b""),
        m.PutBlob(blob_id(b"x"), 0, 1 << 60, b"x"),
        m.PutBlob(blob_id(b"x"), 0, -1, b""),
        m.PutBlob(blob_id(b"x"), 0, 1 << 20, bytes(BLOB_CHUNK_BYTES + 1)),
    ],
)
def test_a_sender_that_breaks_the_rules_is_refused(
    authority: Authority, tmp_path: Path, run: Run, bad: m.PutBlob
) -> None:
    async def go() -> None:
        async with coordinating(authority, tmp_path) as running:
            client = Client(authority.identity("client", "ann"), running.address)
            ends = client.observer.ends
            with contextlib.suppress(ExceptionGroup):  # after some refusals it does not try again
                async with links.running(client):
                    (await client.observer.link()).send(bad)
                    await client.observer.until(lambda: ends)
            assert isinstance(ends[0], RemoteProtocolError | PayloadTooLarge)
            assert len(running.server._store) == 0

    run(go())
    assert not list((tmp_path / "state" / "blobs").glob("*/*"))


def test_an_upload_cut_off_in_the_middle_leaves_nothing_and_can_be_repeated(
    authority: Authority, tmp_path: Path, run: Run
) -> None:
    async def go() -> None:
        async with coordinating(authority, tmp_path) as running:
            async with client_of(authority, running.address) as client:
                client.send(*chunks(CONTENT, BLOB_CHUNK_BYTES)[:3])
                await client.next(m.BlobStored)
            async with client_of(authority, running.address) as client:
                await upload(client, CONTENT)
                assert BLOB in running.server._store

    run(go())
    assert [path.name for path in (tmp_path / "state" / "blobs").glob("*/*")] == [BLOB]


def test_a_full_disk_ends_the_link_and_not_the_coordinator(
    authority: Authority, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(self: object, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    async def go() -> None:
        async with coordinating(authority, tmp_path) as running, client_of(authority, running.address) as client:
            with monkeypatch.context() as patch:
                patch.setattr(IncomingBlob, "write", no_room)
                client.send(chunks(CONTENT, BLOB_CHUNK_BYTES)[0])
                notice = await client.next(m.Notice)
                assert "No space left" in notice.text
                await client.client.observer.until(lambda: client.client.observer.ends)
            again = Peer(client.client, await client.client.observer.link(2))
            await upload(again, b"small")

    run(go())

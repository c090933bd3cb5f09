"""Frames between agent and template: whole, cut anywhere, with descriptors, broken."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import Callable

import pytest

from herder_agent.launch import control
from herder_agent.launch.control import Channel, FromTemplate
from herder_agent.launch.poller import Poller
from herder_shared.errors import RemoteProtocolError


def frame(head: dict[str, object], body: bytes = b"") -> bytes:
    text = json.dumps(head).encode()
    return struct.pack(">IQ", len(text), len(body)) + text + body


class Pair:
    """A channel, and the raw socket at its other end."""

    def __init__(self) -> None:
        ours, self.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.heads: list[FromTemplate] = []
        self.bodies: list[bytes] = []
        self.descriptors: list[int] = []
        self.closed: list[RemoteProtocolError | None] = []
        loop = asyncio.get_running_loop()
        self.poller = Poller(loop)
        self.channel = Channel(loop, ours, control.from_template, self._received, self.closed.append, self.poller)

    def _received(self, head: FromTemplate, body: bytes, descriptors: list[int]) -> None:
        self.heads.append(head)
        self.bodies.append(body)
        self.descriptors += descriptors

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():  # noqa: ASYNC110 - what is waited for happens in callbacks
                await asyncio.sleep(0.001)

    def close(self) -> None:
        self.channel.close()
        self.poller.close()
        self.peer.close()
        for fd in self.descriptors:
            os.close(fd)


def test_frames_cut_at_every_byte_arrive_whole() -> None:
    async def main() -> None:
        data = frame({"t": "log", "text": "one"}) + frame({"t": "fork_failed", "child": 7, "unknown": 1}, b"body")
        for cut in range(1, len(data)):
            pair = Pair()
            pair.peer.send(data[:cut])
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            pair.peer.send(data[cut:])
            await pair.until(lambda pair=pair: len(pair.heads) == 2)  # type: ignore[misc]
            assert pair.heads == [control.Log("info", "one"), control.ForkFailed(7)]
            assert pair.bodies == [b"", b"body"]
            pair.close()

    asyncio.run(main())


def test_each_frame_takes_its_own_descriptors() -> None:
    async def main() -> None:
        pair = Pair()
        files = [os.memfd_create(str(number)) for number in range(5)]
        pair.peer.send(frame({"t": "log", "text": "before"}))
        socket.send_fds(pair.peer, [frame({"t": "forked", "child": 1, "pid": 2, "fds": 2})], files[:2])
        socket.send_fds(pair.peer, [frame({"t": "forked", "child": 2, "pid": 3, "fds": 3})], files[2:])
        await pair.until(lambda: len(pair.heads) == 3)
        names = [os.readlink(f"/proc/self/fd/{fd}") for fd in pair.descriptors]
        assert [name.partition(":")[2].split()[0] for name in names] == ["0", "1", "2", "3", "4"]
        for fd in files:
            os.close(fd)
        pair.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">IQ", 1 << 21, 0),
        struct.pack(">IQ", 2, 1 << 40),
        frame({"t": "nonsense"}),
        frame({"t": "forked", "child": "x", "pid": 1}),
        frame({"t": "forked", "child": 1, "pid": 1, "fds": 4}),
        struct.pack(">IQ", 2, 0) + b"{]",
    ],
)
def test_what_is_no_frame_closes_the_channel_with_an_error(data: bytes) -> None:
    async def main() -> None:
        pair = Pair()
        pair.peer.send(data)
        await pair.until(lambda: bool(pair.closed))
        assert isinstance(pair.closed[0], RemoteProtocolError)
        assert pair.heads == []
        pair.close()

    asyncio.run(main())


def test_end_of_stream_closes_the_channel_after_what_came_before() -> None:
    async def main() -> None:
        pair = Pair()
        pair.peer.send(frame({"t": "log", "text": "last"}))
        pair.peer.close()
        await pair.until(lambda: bool(pair.closed))
        assert pair.heads == [control.Log("info", "last")]
        assert pair.closed == [None]
        pair.channel.send({"t": "late"})
        pair.close()

    asyncio.run(main())


def test_what_the_socket_does_not_take_waits_with_its_descriptors() -> None:
    async def main() -> None:
        pair = Pair()
        fd = os.memfd_create("argument")
        for number in range(20):
            pair.channel.send({"t": "task", "n": number}, [bytes(100_000)], [fd])
        os.close(fd)
        pair.peer.setblocking(False)
        received = bytearray()
        descriptors: list[int] = []
        expected = 20 * len(frame({"t": "task", "n": 10}, bytes(100_000)))
        async with asyncio.timeout(30):
            while len(received) < expected - 200:
                try:
                    data, fds, _, _ = socket.recv_fds(pair.peer, 1 << 20, 100)
                except BlockingIOError:
                    await asyncio.sleep(0.001)
                    continue
                received += data
                descriptors += fds
        assert len(descriptors) == 20
        for each in descriptors:
            os.close(each)
        pair.close()

    asyncio.run(main())

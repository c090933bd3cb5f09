"""Connections over loopback, under both event loops: what arrives, how they end, what hostile peers get."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from herder_shared.errors import (
    RemoteProtocolError,
    Unreachable,
)
from herder_shared.ids import BlobId, Incarnation, NodeName
from herder_shared.limits import GIB, HANDSHAKES_MAX, KIB, MIB
from herder_shared.wire import stream
from herder_shared.wire.frame import encode_frame
from herder_shared.wire.messages import (
    BlobStored,
    DrainNode,
    Goodbye,
    Hello,
    Notice,
    Refused,
)
from support.links import (
    CLUSTER,
    Authority,
    Client,
    blob,
    connect_raw,
    linked,
    read_to_end,
    running,
    serving,
)

Run = Callable[[Coroutine[Any, Any, None]], None]


# --- the ordinary way ------------------------------------------------------------------------------------------------


def test_a_link_knows_both_ends_and_carries_messages_both_ways(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with linked(authority) as (server, there, client, here):
            assert (there.peer.role, there.peer.name, there.peer.cluster) == ("admin", "me", CLUSTER)
            assert (here.peer.role, here.session, here.epoch) == ("coordinator", 1, 3)
            assert client.dialler.link is here
            here.send(DrainNode(1, NodeName("n1")))
            await server.observer.until(lambda: server.observer.messages)
            there.send(Notice("info", "hello"))
            await client.observer.until(lambda: client.observer.messages)
            assert server.observer.messages == [DrainNode(1, NodeName("n1"))]
            assert client.observer.messages == [Notice("info", "hello")]
        assert client.observer.ends == [None]
        assert client.dialler.link is None

    run(scenario())


def test_messages_of_one_turn_travel_together_and_stay_in_order(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with linked(authority) as (server, _, _, here):
            for n in range(2000):
                here.send(blob(n))
            await server.observer.until(lambda: len(server.observer.messages) == 2000)
            assert server.observer.messages == [blob(n) for n in range(2000)]
            assert server.observer.batches < 100

    run(scenario())


def test_large_messages_pass_in_both_directions_at_once(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with linked(authority) as (server, there, client, here):
            for n in range(8):
                here.send(blob(n, 256 * KIB))
                there.send(blob(n, 256 * KIB))
            await server.observer.until(lambda: len(server.observer.messages) == 8)
            await client.observer.until(lambda: len(client.observer.messages) == 8)
            assert here.buffered_bytes == there.buffered_bytes == 0

    run(scenario())


def test_what_was_sent_before_close_arrives(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with serving(authority) as (server, address):
            async with running(Client(authority.identity("client", "me"), address)) as client:
                here = await client.observer.link()
                for n in range(20):
                    here.send(blob(n, 64 * KIB))
                here.send(Goodbye("done"))
                # Unread bytes at the closing side must not cost the other side what was sent (RST).
                for n in range(20):
                    (await server.observer.link()).send(blob(n, 64 * KIB))
            await server.observer.until(lambda: server.observer.ends)
            assert server.observer.messages[-1] == Goodbye("done")
            assert len(server.observer.messages) == 21
            assert server.observer.ends == [None]

    run(scenario())


def test_nothing_is_heard_or_said_after_close(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with linked(authority) as (server, there, _, here):
            here.send(blob(1))
            there.close()
            there.close()
            there.send(Notice("info", "late"))
            there.refuse(Refused("Unauthorized", "late"))
            assert there.is_closed
            assert server.observer.ends == []
            await server.observer.until(lambda: server.observer.ends)
            assert server.observer.ends == [None]
            assert server.observer.messages == []

    run(scenario())


def test_the_acceptor_ends_all_links_and_gives_its_port_back(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with linked(authority) as (server, _, client, _):
            await server.acceptor.close()
            assert len(server.observer.ends) == 1
            async with serving(authority, server.port) as (again, _):
                await again.observer.link()
                await client.observer.link(2)

    run(scenario())


def test_a_paused_link_is_not_read_until_resumed(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with linked(authority) as (server, there, client, here):
            there.pause_reading()
            here.send(blob(1))
            there.send(Notice("info", "a"))
            await client.observer.until(lambda: client.observer.messages)
            assert server.observer.messages == []
            there.resume_reading()
            await server.observer.until(lambda: server.observer.messages)

    run(scenario())


# --- hostile and broken peers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "junk",
    [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", os.urandom(64), b"\x16\x03\x01\xff\xff" + bytes(70_000), b"\x00" * 200_000],
    ids=["http", "random", "false hello", "zeros"],
)
def test_bytes_that_are_no_handshake_close_the_connection(run: Run, authority: Authority, junk: bytes) -> None:
    async def scenario() -> None:
        async with serving(authority, handshake_timeout_s=0.5) as (server, address):
            with socket.create_connection(address, timeout=30) as peer:
                with contextlib.suppress(ConnectionError):
                    await asyncio.to_thread(peer.sendall, junk)
                await read_to_end(peer)
            assert sum(server.acceptor.refusals.values()) == 1
            assert server.observer.links == []

    run(scenario())


def test_a_slow_handshake_is_closed_within_its_time(run: Run, authority: Authority) -> None:
    """Slowloris: in TCP, within TLS, and after TLS without a hello."""

    async def scenario() -> None:
        async with serving(authority, handshake_timeout_s=0.5) as (server, address):
            with (
                socket.create_connection(address, timeout=30) as silent,
                socket.create_connection(address, timeout=30) as slow,
                connect_raw(authority.identity("client", "me"), address) as quiet,
            ):
                slow.sendall(b"\x16\x03\x01\x02\x00\x01")
                await asyncio.to_thread(quiet.do_handshake)
                quiet.sendall(encode_frame(Hello(1, CLUSTER, Incarnation("i")))[:10])
                for peer in (silent, slow, quiet):
                    assert await read_to_end(peer) == b""
            assert server.acceptor.refusals == {"slow handshake": 3}

    run(scenario())


@pytest.mark.slow
def test_idle_handshakes_beyond_the_bound_make_room_for_a_real_peer(
    run: Run, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with serving(authority, handshake_timeout_s=80.0) as (server, address):
            with contextlib.ExitStack() as stack:
                # While all are young it is the newest that are turned away.
                monkeypatch.setattr(stream, "_YOUNG_S", 80.0)
                idlers = [
                    stack.enter_context(socket.create_connection(address, timeout=30))
                    for _ in range(HANDSHAKES_MAX + 9)
                ]
                assert await read_to_end(idlers[-1]) == b""
                assert server.acceptor.refusals == {"crowded out": 9}
                monkeypatch.setattr(stream, "_YOUNG_S", 0.0)
                async with running(Client(authority.identity("client", "me"), address)) as client:
                    await client.observer.link()
                assert await read_to_end(idlers[0]) == b""

    run(scenario())


@pytest.mark.parametrize("before_hello", [True, False], ids=["before the hello", "on a live link"])
def test_a_gibibyte_announced_is_refused(run: Run, authority: Authority, before_hello: bool) -> None:
    async def scenario() -> None:
        async with serving(authority) as (server, address):
            with connect_raw(authority.identity("client", "me"), address) as peer:

                def speak() -> None:
                    peer.do_handshake()
                    if not before_hello:
                        peer.sendall(encode_frame(Hello(1, CLUSTER, Incarnation("i"))))
                        peer.recv(65536)
                    peer.sendall(GIB.to_bytes(4, "big") + bytes(1000))

                await asyncio.to_thread(speak)
                assert b"1073741824" in await read_to_end(peer)
            assert server.acceptor.refusals["RemoteProtocolError"] == 1
            if not before_hello:
                await server.observer.until(lambda: server.observer.ends)
                assert isinstance(server.observer.ends[0], RemoteProtocolError)

    run(scenario())


def test_a_million_messages_before_the_hello_is_answered_are_not_listened_to(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with serving(authority) as (server, address):
            with connect_raw(authority.identity("client", "me"), address) as peer:

                def flood() -> None:
                    peer.do_handshake()
                    with contextlib.suppress(ConnectionError, ssl.SSLError):
                        peer.sendall(encode_frame(Goodbye()) * 100_000)

                await asyncio.to_thread(flood)
                with contextlib.suppress(ssl.SSLError):
                    await read_to_end(peer)
            assert server.acceptor.refusals == {"RemoteProtocolError": 1}

    run(scenario())


def test_a_peer_that_does_not_read_is_dropped_at_the_bound(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with linked(authority, send_buffer_bytes_max=4 * MIB) as (server, there, client, here):
            here.pause_reading()
            highest_bytes = 0
            for n in range(400):
                there.send(blob(n, 256 * KIB))
                highest_bytes = max(highest_bytes, there.buffered_bytes)
                if there.is_closed:
                    break
                await asyncio.sleep(0)
            await server.observer.until(lambda: server.observer.ends)
            assert "does not read" in str(server.observer.ends[0])
            assert highest_bytes < 6 * MIB
            here.resume_reading()
            await client.observer.link(2)

    run(scenario())


def test_a_connection_cut_in_a_frame_is_unreachable_for_the_other_side(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with serving(authority) as (server, address):
            with connect_raw(authority.identity("client", "me"), address) as peer:

                def speak() -> None:
                    peer.do_handshake()
                    peer.sendall(encode_frame(Hello(1, CLUSTER, Incarnation("i"))))
                    peer.recv(65536)
                    peer.sendall(encode_frame(BlobStored(BlobId("b"), 1)) + encode_frame(Goodbye())[:5])

                await asyncio.to_thread(speak)
                await server.observer.until(lambda: server.observer.messages)
                peer.shutdown(socket.SHUT_RDWR)
                await server.observer.until(lambda: server.observer.ends)
            assert server.observer.messages == [BlobStored(BlobId("b"), 1)]
            assert isinstance(server.observer.ends[0], Unreachable)

    run(scenario())

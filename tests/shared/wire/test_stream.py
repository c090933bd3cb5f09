"""Links over loopback with real certificates, under both event loops."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from herder_shared import tls
from herder_shared.errors import (
    ConfigError,
    HerderError,
    JobNotFound,
    ProtocolMismatch,
    RemoteProtocolError,
    Unauthorized,
    Unreachable,
)
from herder_shared.ids import BlobId, ClusterId, Incarnation, JobId, NodeName, WorkloadKey
from herder_shared.limits import GIB, HANDSHAKES_MAX, KIB, MIB, PROTOCOL_VERSION
from herder_shared.wire.frame import encode_frame
from herder_shared.wire.messages import (
    BlobStored,
    DrainNode,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Hello,
    JobSpec,
    Message,
    NodeFacts,
    Notice,
    OpenJob,
    PutBlob,
    Refused,
    Role,
    Welcome,
    WorkloadSpec,
)
from herder_shared.wire.stream import Acceptor, Dialler, Link

Run = Callable[[Any], None]
Authority = Any
CLUSTER = ClusterId("c1" * 16)


class Observer:
    """Keeps what it is told, and lets a test wait for it."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.messages: list[Message] = []
        self.ends: list[HerderError | None] = []
        self.batches = 0
        self.answers_heartbeats = True
        self._changed = asyncio.Event()

    def opened(self, link: Link) -> None:
        self.links.append(link)
        self._changed.set()

    def received(self, link: Link, messages: list[Message]) -> None:
        assert len(self.ends) < len(self.links)
        self.batches += 1
        for message in messages:
            if not isinstance(message, Heartbeat):
                self.messages.append(message)
            elif self.answers_heartbeats:
                link.send(HeartbeatAck(message.n))
        self._changed.set()

    def closed(self, link: Link, error: HerderError | None) -> None:
        assert link in self.links
        self.ends.append(error)
        self._changed.set()

    async def until(self, condition: Callable[[], object], seconds: float = 8.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def link(self, n: int = 1) -> Link:
        await self.until(lambda: len(self.links) >= n)
        return self.links[n - 1]


class Server:
    """An acceptor, and what a coordinator would answer."""

    def __init__(self, identity: Path, **options: Any) -> None:
        self.observer = Observer()
        self.welcome: Welcome | Refused = Welcome(CLUSTER, epoch=3, session=1)
        self.hellos: list[Hello] = []
        self.port = 0
        self.acceptor = Acceptor(
            context=tls.server_context(identity),
            cluster=CLUSTER,
            welcome=self._welcome,
            observer=self.observer,
            **options,
        )

    def _welcome(self, hello: Hello, _: object) -> Welcome | Refused:
        self.hellos.append(hello)
        return self.welcome


@contextlib.asynccontextmanager
async def serving(authority: Authority, port: int = 0, **options: Any) -> AsyncIterator[tuple[Server, tuple[str, int]]]:
    server = Server(authority.identity("coordinator", "coordinator"), **options)
    address = await server.acceptor.listen("127.0.0.1", port)
    server.port = address[1]
    try:
        yield server, address
    finally:
        await server.acceptor.close()


class Client:
    """A dialler with its observer."""

    def __init__(
        self,
        identity: Path,
        *addresses: tuple[str, int],
        hello: Hello | None = None,
        server_name: str = "",
        **options: Any,
    ) -> None:
        self.observer = Observer()
        self.failures: list[HerderError] = []
        self.away_s: list[float] = []
        self.failed = asyncio.Event()
        self.dialler = Dialler(
            addresses=addresses,
            context=tls.client_context(identity),
            server_name=server_name or tls.server_name(CLUSTER),
            hello=lambda: hello or Hello(PROTOCOL_VERSION, CLUSTER, Incarnation("i" * 16)),
            observer=self.observer,
            failing=self._failing,
            backoff_s_min=0.01,
            backoff_s_max=0.05,
            **options,
        )

    def _failing(self, error: HerderError, away_s: float) -> None:
        self.failures.append(error)
        self.away_s.append(away_s)
        self.failed.set()


@contextlib.asynccontextmanager
async def running(client: Client) -> AsyncIterator[Client]:
    async with asyncio.TaskGroup() as group:
        group.create_task(client.dialler.run())
        try:
            yield client
        finally:
            await client.dialler.close()


@contextlib.asynccontextmanager
async def linked(authority: Authority, **options: Any) -> AsyncIterator[tuple[Server, Link, Client, Link]]:
    async with (
        serving(authority, **options) as (server, address),
        running(Client(authority.identity("admin", "me"), address)) as client,
    ):
        yield server, await server.observer.link(), client, await client.observer.link()


def agent_hello(node: str) -> Hello:
    return Hello(PROTOCOL_VERSION, CLUSTER, Incarnation("i" * 16), node=NodeFacts(NodeName(node), 2, GIB))


def blob(n: int, size_bytes: int = 0) -> PutBlob:
    return PutBlob(BlobId("b" * 40), n, 0, bytes(size_bytes))


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


# --- reconnection and heartbeats -------------------------------------------------------------------------------------


def test_a_dialler_waits_for_a_coordinator_that_is_not_there_yet(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as reserved:
            address = reserved.getsockname()
        async with running(Client(authority.identity("client", "me"), address)) as client:
            await client.failed.wait()
            assert isinstance(client.failures[0], Unreachable)
            assert str(address[1]) in str(client.failures[0])
            async with serving(authority, address[1]):
                await client.observer.link()
            assert client.away_s[0] >= 0.0

    run(scenario())


def test_a_dialler_links_again_after_the_coordinator_restarts(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with serving(authority) as (first, address):
            client = Client(authority.identity("client", "me"), address)
            async with running(client):
                client.dialler.unsettled.keep("a", blob(1))
                await client.observer.link()
                await first.acceptor.close()
                async with serving(authority, address[1]) as (second, _):
                    link = await client.observer.link(2)
                    for message in client.dialler.unsettled.resend():
                        link.send(message)
                    await second.observer.until(lambda: second.observer.messages == [blob(1)])

    run(scenario())


def test_a_second_address_is_tried_when_the_first_is_away(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as reserved:
            away = reserved.getsockname()
        async with serving(authority) as (_, address):
            async with running(Client(authority.identity("client", "me"), away, address)) as client:
                await client.observer.link()
            assert client.failures == []

    run(scenario())


def test_heartbeats_keep_a_quiet_link_alive_beyond_its_lease(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with serving(authority) as (server, address):
            server.welcome = Welcome(CLUSTER, epoch=1, session=1, heartbeat_s=0.05, lease_s=0.3)
            async with running(Client(authority.identity("client", "me"), address)) as client:
                await client.observer.until(lambda: HeartbeatAck(10) in client.observer.messages)
                assert client.observer.ends == []

    run(scenario())


def test_a_dialler_leaves_a_coordinator_that_is_silent_for_a_lease(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with serving(authority) as (server, address):
            server.welcome = Welcome(CLUSTER, epoch=1, session=1, heartbeat_s=0.05, lease_s=0.2)
            server.observer.answers_heartbeats = False
            async with running(Client(authority.identity("client", "me"), address)) as client:
                await client.observer.link(2)
                assert isinstance(client.observer.ends[0], Unreachable)
                assert "silent" in str(client.observer.ends[0])

    run(scenario())


@pytest.mark.slow
def test_an_acceptor_drops_a_peer_that_is_silent_for_longer_than_its_lease(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with serving(authority) as (server, address):
            server.welcome = Welcome(CLUSTER, epoch=1, session=1, heartbeat_s=0.1, lease_s=0.2)
            with connect_raw(authority.identity("client", "me"), address) as peer:
                await asyncio.to_thread(peer.sendall, encode_frame(Hello(1, CLUSTER, Incarnation("i"))))
                await server.observer.until(lambda: server.observer.ends)
                assert "silent" in str(server.observer.ends[0])

    run(scenario())


def test_close_while_dialling_ends_run_at_once(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            client = Client(authority.identity("client", "me"), silent.getsockname())
            async with running(client):
                await asyncio.sleep(0)
            assert client.dialler.link is None
            async with asyncio.timeout(1):
                await client.dialler.run()

    run(scenario())


def test_cancelling_run_closes_the_socket(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with serving(authority) as (server, address):
            client = Client(authority.identity("client", "me"), address)
            async with asyncio.TaskGroup() as group:
                task = group.create_task(client.dialler.run())
                await client.observer.link()
                task.cancel()
            await server.observer.until(lambda: server.observer.ends)
            await client.observer.until(lambda: client.observer.ends)

    run(scenario())


# --- who may not ----------------------------------------------------------------------------------------------------


async def end_of(client: Client, act: Callable[[Link], None]) -> BaseException:
    """What `run` raises when a linked client did `act` and lost its link for that."""
    try:
        async with running(client):
            act(await client.observer.link())
            await client.observer.until(lambda: client.observer.ends)
    except ExceptionGroup as group:
        (error,) = group.exceptions
        return error
    raise AssertionError("the dialler went on")


async def refusal_of(client: Client) -> HerderError:
    with pytest.raises(HerderError) as caught:
        async with asyncio.timeout(5):
            await client.dialler.run()
    assert client.observer.links == []
    return caught.value


def test_a_coordinator_of_another_authority_is_unauthorized(
    run: Run, authority: Authority, other_authority: Authority
) -> None:
    async def scenario() -> None:
        async with serving(authority) as (server, address):
            error = await refusal_of(
                Client(other_authority.identity("client", "me"), address, server_name=tls.server_name(CLUSTER))
            )
            assert isinstance(error, Unauthorized)
            assert "another cluster" in str(error)
            assert server.observer.links == []

    run(scenario())


def mixed_identity(own: Path, ca: Path, folder: Path) -> Path:
    """An identity whose owner believes `ca`, while its own certificate is of another authority."""
    folder.mkdir(mode=0o700)
    for name, source in (("cert.pem", own), ("key.pem", own), ("ca.pem", ca)):
        (folder / name).write_bytes((source / name).read_bytes())
    (folder / "key.pem").chmod(0o600)
    return folder


def test_a_client_certificate_of_another_authority_is_unauthorized_and_not_tried_for_ever(
    run: Run, authority: Authority, other_authority: Authority, tmp_path: Path
) -> None:
    """Under TLS 1.3 the client's handshake is over before the coordinator looks at its certificate."""
    ours, theirs = authority.identity("client", "me"), other_authority.identity("client", "me")

    async def scenario() -> None:
        async with serving(authority) as (server, address):
            error = await refusal_of(Client(mixed_identity(theirs, ours, tmp_path / "mixed"), address))
            assert isinstance(error, Unauthorized)
            assert "does not accept our certificate" in str(error)
            assert server.acceptor.refusals["Unauthorized"] == 1

    run(scenario())


def test_an_expired_client_certificate_is_unauthorized(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with serving(authority) as (_, address):
            error = await refusal_of(Client(authority.identity("client", "old", days=-1), address))
            assert isinstance(error, Unauthorized)
            assert "has expired" in str(error)
            assert "keys issue" in str(error)

    run(scenario())


def test_an_expired_coordinator_certificate_is_unauthorized(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        server = Server(authority.identity("coordinator", "coordinator", days=-1))
        address = await server.acceptor.listen("127.0.0.1", 0)
        error = await refusal_of(Client(authority.identity("client", "me"), address))
        assert isinstance(error, Unauthorized)
        assert "certificate of the coordinator" in str(error)
        assert "expired" in str(error)
        await server.acceptor.close()

    run(scenario())


@pytest.mark.parametrize("role", ["agent", "client", "admin"])
def test_only_a_coordinator_certificate_can_be_a_coordinator(run: Run, authority: Authority, role: Role) -> None:
    async def scenario() -> None:
        server = Server(authority.identity(role, "impostor"))
        address = await server.acceptor.listen("127.0.0.1", 0)
        assert isinstance(await refusal_of(Client(authority.identity("client", "me"), address)), Unauthorized)
        await server.acceptor.close()

    run(scenario())


def test_a_coordinator_certificate_may_not_dial(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with serving(authority) as (_, address):
            error = await refusal_of(Client(authority.identity("coordinator", "coordinator"), address))
            assert isinstance(error, Unauthorized)

    run(scenario())


def test_an_agent_under_another_name_is_unauthorized(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with serving(authority) as (_, address):
            error = await refusal_of(Client(authority.identity("agent", "n1"), address, hello=agent_hello("n2")))
            assert isinstance(error, Unauthorized)
            assert "n2" in str(error)

    run(scenario())


@pytest.mark.parametrize(
    ("hello", "kind"),
    [
        (Hello(PROTOCOL_VERSION + 1, CLUSTER, Incarnation("i")), ProtocolMismatch),
        (Hello(PROTOCOL_VERSION, ClusterId("ee" * 16), Incarnation("i")), Unauthorized),
    ],
)
def test_a_wrong_version_or_cluster_ends_run(
    run: Run, authority: Authority, hello: Hello, kind: type[HerderError]
) -> None:
    async def scenario() -> None:
        async with serving(authority) as (server, address):
            assert isinstance(await refusal_of(Client(authority.identity("client", "me"), address, hello=hello)), kind)
            assert server.hellos == []

    run(scenario())


def test_the_error_that_the_coordinator_names_is_raised(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with serving(authority) as (server, address):
            server.welcome = Refused("JobNotFound", "no such thing")
            error = await refusal_of(Client(authority.identity("client", "me"), address))
            assert (type(error), str(error)) == (JobNotFound, "no such thing")

    run(scenario())


def test_an_earlier_life_of_the_coordinator_is_left_and_the_current_one_found(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        hello = Hello(PROTOCOL_VERSION, CLUSTER, Incarnation("i"), epoch_seen=4)
        async with (
            serving(authority) as (server, address),
            running(Client(authority.identity("client", "me"), address, hello=hello)) as client,
        ):
            await client.failed.wait()
            assert "life 3" in str(client.failures[0])
            server.welcome = Welcome(CLUSTER, epoch=4, session=1)
            await client.observer.link()

    run(scenario())


def test_an_agent_that_says_what_only_clients_say_is_refused_and_closed(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with serving(authority) as (server, address):
            client = Client(authority.identity("agent", "n1"), address, hello=agent_hello("n1"))
            job = JobSpec(JobId("j" * 16), "x", WorkloadSpec(WorkloadKey("k" * 16)))
            error = await end_of(client, lambda link: link.send(OpenJob(job)))
            assert isinstance(error, Unauthorized)
            assert "may not send OpenJob" in str(error)
            await server.observer.until(lambda: server.observer.ends)
            assert server.observer.messages == []
            assert isinstance(server.observer.ends[0], Unauthorized)

    run(scenario())


def test_a_client_may_not_drain(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with serving(authority) as (server, address):
            client = Client(authority.identity("client", "user"), address)
            error = await end_of(client, lambda link: link.send(DrainNode(1, NodeName("n1"))))
            assert isinstance(error, Unauthorized)
            assert server.observer.messages == []

    run(scenario())


def test_a_live_link_can_be_refused_with_the_reason(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with serving(authority) as (server, address):
            client = Client(authority.identity("agent", "n1"), address, hello=agent_hello("n1"))
            refused = Refused("Unauthorized", "this certificate was revoked")
            error = await end_of(client, lambda _: server.observer.links[0].refuse(refused))
            assert (type(error), str(error)) == (Unauthorized, "this certificate was revoked")

    run(scenario())


def test_a_listener_that_is_no_coordinator_is_unreachable(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async def speak_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            writer.close()
            await reader.read()

        http = await asyncio.start_server(speak_http, "127.0.0.1", 0)
        async with http, running(Client(authority.identity("client", "me"), http.sockets[0].getsockname())) as client:
            await client.failed.wait()
            assert isinstance(client.failures[0], Unreachable)
            assert "no Herder coordinator" in str(client.failures[0])

    run(scenario())


# --- hostile and broken peers ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def connect_raw(identity: Path, address: tuple[str, int]) -> Iterator[ssl.SSLSocket]:
    """A peer with a good certificate and no manners."""
    with socket.create_connection(address, timeout=5) as plain:
        context = tls.client_context(identity)
        with context.wrap_socket(
            plain, server_hostname=tls.server_name(CLUSTER), do_handshake_on_connect=False
        ) as peer:
            yield peer


async def read_to_end(peer: socket.socket) -> bytes:
    def read() -> bytes:
        received = b""
        try:
            while piece := peer.recv(65536):
                received += piece
        except ConnectionResetError:
            pass
        return received

    return await asyncio.to_thread(read)


@pytest.mark.parametrize(
    "junk",
    [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", os.urandom(64), b"\x16\x03\x01\xff\xff" + bytes(70_000), b"\x00" * 200_000],
    ids=["http", "random", "false hello", "zeros"],
)
def test_bytes_that_are_no_handshake_close_the_connection(run: Run, authority: Authority, junk: bytes) -> None:
    async def scenario() -> None:
        async with serving(authority, handshake_timeout_s=0.5) as (server, address):
            with socket.create_connection(address, timeout=5) as peer:
                with contextlib.suppress(ConnectionError):
                    await asyncio.to_thread(peer.sendall, junk)
                await read_to_end(peer)
            assert sum(server.acceptor.refusals.values()) == 1
            assert server.observer.links == []

    run(scenario())


def test_a_slow_handshake_is_closed_within_its_time(run: Run, authority: Authority) -> None:
    """Slowloris: in TCP, within TLS, and after TLS without a hello."""

    async def scenario() -> None:
        async with serving(authority, handshake_timeout_s=0.2) as (server, address):
            with (
                socket.create_connection(address, timeout=5) as silent,
                socket.create_connection(address, timeout=5) as slow,
                connect_raw(authority.identity("client", "me"), address) as quiet,
            ):
                slow.sendall(b"\x16\x03\x01\x02\x00\x01")
                await asyncio.to_thread(quiet.do_handshake)
                quiet.sendall(encode_frame(Hello(1, CLUSTER, Incarnation("i")))[:10])
                for peer in (silent, slow, quiet):
                    assert await read_to_end(peer) == b""
            assert server.acceptor.refusals == {"slow handshake": 3}

    run(scenario())


def test_handshakes_beyond_the_bound_crowd_out_the_oldest_and_a_real_peer_gets_in(
    run: Run, authority: Authority
) -> None:
    async def scenario() -> None:
        async with serving(authority) as (server, address):
            with contextlib.ExitStack() as stack:
                idlers = [
                    stack.enter_context(socket.create_connection(address, timeout=5)) for _ in range(HANDSHAKES_MAX + 9)
                ]
                async with running(Client(authority.identity("client", "me"), address)) as client:
                    await client.observer.link()
                assert await read_to_end(idlers[0]) == b""
                assert server.acceptor.refusals["crowded out"] >= 9

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


# --- listening -------------------------------------------------------------------------------------------------------


def test_a_busy_port_is_a_config_error_that_names_port_and_cure(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with serving(authority) as (_, (host, port)):
            other = Server(authority.identity("coordinator", "coordinator"))
            with pytest.raises(ConfigError, match=f"{port}.*stop it or listen on another"):
                await other.acceptor.listen(host, port)
            await other.acceptor.close()

    run(scenario())


def test_an_address_of_another_machine_is_a_config_error(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        other = Server(authority.identity("coordinator", "coordinator"))
        with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
            await other.acceptor.listen("192.0.2.1", 0)
        await other.acceptor.close()

    run(scenario())


def test_a_dialler_without_an_address_is_a_config_error(authority: Authority) -> None:
    with pytest.raises(ConfigError, match="herder up"):
        Dialler(
            addresses=[],
            context=tls.client_context(authority.identity("client", "me")),
            server_name="",
            hello=lambda: msgspec.structs.replace(agent_hello("n1")),
            observer=Observer(),
        )

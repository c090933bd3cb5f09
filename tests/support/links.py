"""Both ends of links over loopback, with real certificates, for tests: acceptor, dialler, and what they observed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from herder_shared import tls
from herder_shared.errors import HerderError
from herder_shared.ids import BlobId, ClusterId, Incarnation, NodeName
from herder_shared.limits import GIB, PROTOCOL_VERSION
from herder_shared.wire.messages import (
    Heartbeat,
    HeartbeatAck,
    Hello,
    Message,
    NodeFacts,
    PutBlob,
    Refused,
    Role,
    Welcome,
)
from herder_shared.wire.stream import Acceptor, Dialler, Link

CLUSTER = ClusterId("c1" * 16)
OTHER_CLUSTER = ClusterId("0d" * 16)


class Authority:
    """A cluster's authority, which makes each identity once."""

    def __init__(self, folder: Path, cluster: ClusterId) -> None:
        self.folder = folder
        self.cluster = cluster
        tls.create_authority(folder / "authority", cluster)

    def identity(self, role: Role, name: str, days: int | None = None) -> Path:
        folder = self.folder / f"{role}-{name}-{days}"
        if not folder.exists():
            tls.issue(self.folder / "authority", folder, role, name, days)
        return folder


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

    async def until(self, condition: Callable[[], object], seconds: float = 30.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def link(self, n: int = 1) -> Link:
        await self.until(lambda: len(self.links) >= n)
        return self.links[n - 1]


def free_address() -> str:
    """Where nobody listens just now."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"127.0.0.1:{taken.getsockname()[1]}"


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
            **{"backoff_s_min": 0.01, "backoff_s_max": 0.05, **options},
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


@contextlib.contextmanager
def connect_raw(identity: Path, address: tuple[str, int]) -> Iterator[ssl.SSLSocket]:
    """A peer with a good certificate and no manners."""
    with socket.create_connection(address, timeout=30) as plain:
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

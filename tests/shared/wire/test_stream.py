"""Who dials and who listens, with real certificates, under both event loops."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine
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
    Unauthorized,
    Unreachable,
)
from herder_shared.ids import ClusterId, Incarnation, JobId, NodeName, WorkloadKey
from herder_shared.limits import PROTOCOL_VERSION
from herder_shared.wire import stream
from herder_shared.wire.frame import encode_frame
from herder_shared.wire.messages import (
    DrainNode,
    Heartbeat,
    HeartbeatAck,
    Hello,
    JobSpec,
    Message,
    OpenJob,
    Refused,
    Role,
    Welcome,
    WorkloadSpec,
)
from herder_shared.wire.stream import Dialler, Link
from support.links import (
    CLUSTER,
    Authority,
    Client,
    Observer,
    Server,
    agent_hello,
    blob,
    connect_raw,
    end_of,
    running,
    serving,
)

Run = Callable[[Coroutine[Any, Any, None]], None]


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
            server.welcome = Welcome(CLUSTER, epoch=1, session=1, heartbeat_s=0.05, lease_s=1.0)
            async with running(Client(authority.identity("client", "me"), address)) as client:
                await client.observer.until(lambda: HeartbeatAck(22) in client.observer.messages)
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


async def refusal_of(client: Client) -> HerderError:
    with pytest.raises(HerderError) as caught:
        async with asyncio.timeout(30):
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
            assert "issue it again" in str(error)

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


def test_what_answers_a_message_that_came_with_a_refusal_is_dropped(run: Run, authority: Authority) -> None:
    async def scenario() -> None:
        async with serving(authority) as (server, address):
            client = Client(authority.identity("agent", "n1"), address, hello=agent_hello("n1"))
            take = client.observer.received

            def answer(link: Link, messages: list[Message]) -> None:
                take(link, messages)
                link.send(Heartbeat(7))

            client.observer.received = answer  # type: ignore[method-assign]

            def tell_and_refuse(_: Link) -> None:
                server.observer.links[0].put(HeartbeatAck(1))
                server.observer.links[0].refuse(Refused("Unauthorized", "revoked"))

            error = await end_of(client, tell_and_refuse)
            assert (type(error), str(error)) == (Unauthorized, "revoked")
            assert client.observer.messages == [HeartbeatAck(1)]

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


@pytest.mark.slow
@pytest.mark.parametrize("run", ["uvloop"], indirect=True)
def test_a_link_that_never_lasts_is_dialled_ever_more_rarely(run: Run, authority: Authority) -> None:
    """Up for a moment, down for a moment, for ever: without the back-off there would be hundreds of links."""

    async def scenario() -> None:
        async with serving(authority) as (server, address):
            links = server.observer.links
            client = Client(authority.identity("admin", "me"), address, backoff_s_max=0.4)
            async with running(client):
                loop = asyncio.get_running_loop()
                until_s = loop.time() + 2.0
                while loop.time() < until_s:
                    (await server.observer.link(len(links) + 1)).close("down")
        # The first few waits are short; then one link each 0.2 s in the mean.
        assert 3 <= len(links) <= 40

    run(scenario())


@pytest.mark.slow
@pytest.mark.parametrize("run", ["uvloop"], indirect=True)
def test_a_crowd_that_lost_the_coordinator_is_back_soon(
    run: Run, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several times as many as may be greeting at a time, all at once: who is turned away comes again."""
    count, at_a_time = 60, 16
    monkeypatch.setattr(stream, "HANDSHAKES_MAX", at_a_time)

    async def scenario() -> None:
        identity = authority.identity("admin", "me")
        async with contextlib.AsyncExitStack() as stack:
            async with serving(authority) as (first, address):
                for _ in range(count):
                    await stack.enter_async_context(running(Client(identity, address)))
                await first.observer.link(count)
            async with serving(authority, port=address[1]) as (second, _):
                back = second.observer
                await back.until(lambda: len(back.links) - len(back.ends) == count, seconds=60.0)

    run(scenario())

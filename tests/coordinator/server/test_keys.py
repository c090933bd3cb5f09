"""Revoked certificates at the door and on live connections, with real links; and through kill -9."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from coordinator.server.conftest import Run
from herder_shared import tls
from herder_shared.errors import HerderError, Unauthorized
from herder_shared.ids import Incarnation
from herder_shared.states import Outcome
from herder_shared.wire import messages as m
from support.coordinators import (
    JOB,
    MemoryJournal,
    Peer,
    agent_of,
    client_of,
    collect_ends,
    config_for,
    coordinating,
    coordinator_process,
    job_spec,
    run_all,
    submission,
)
from support.links import CLUSTER, Authority, Client, agent_hello
from support.links import running as linked_to


def key_of(identity: Path) -> m.Key:
    peer = tls.own_peer(identity)
    return m.Key(peer.serial, peer.role, peer.name)


async def ended(client: Client) -> HerderError:
    """Dial until there is no hope: why."""
    with pytest.raises(HerderError) as failed:
        await asyncio.wait_for(client.dialler.run(), 10)
    return failed.value


@asynccontextmanager
async def doomed(client: Client) -> AsyncIterator[asyncio.Task[HerderError]]:
    """A linked dialler of which the end is awaited."""
    ending = asyncio.ensure_future(ended(client))
    await client.observer.link()
    yield ending
    await asyncio.wait_for(ending, 10)


@asynccontextmanager
async def linked_as(client: Client) -> AsyncIterator[Peer]:
    async with linked_to(client):
        yield Peer(client, await client.observer.link())


async def revoke(admin: Peer, *keys: m.Key) -> m.Answer:
    admin.send(m.RevokeKeys(5, keys))
    return await admin.next(m.Answer)


def test_a_client_that_is_revoked_is_out_at_once_and_not_let_in_again(
    authority: Authority, tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    identity = authority.identity("client", "eve")

    async def go() -> None:
        journal = MemoryJournal()
        async with (
            coordinating(authority, tmp_path, journal) as running,
            client_of(authority, running.address, role="admin") as admin,
        ):
            eve = Client(identity, running.address)
            async with doomed(eve) as ending:
                admin.send(m.ListKeys(1))
                listed = {info.key.name: info for info in (await admin.next(m.Answer)).keys or ()}
                assert listed["eve"] == m.KeyInfo(key_of(identity), connections=1)
                journal.hold = True
                admin.send(m.RevokeKeys(2, (key_of(identity),)))
                error = await ending  # whether or not the disk answers
                assert isinstance(error, Unauthorized)
                assert "revoked" in str(error)
                assert eve.failures == []  # it did not dial again
            assert [one.id for one in admin.messages if isinstance(one, m.Answer)] == [1]
            journal.hold = False
            journal.commit()
            assert (await admin.next(m.Answer)).keys == (m.KeyInfo(key_of(identity), revoked=True),)
            for _ in range(3):
                again = Client(identity, running.address)
                assert isinstance(await ended(again), Unauthorized)
                assert again.observer.links == []
            async with httpx.AsyncClient() as http:
                metrics = (await http.get(f"{running.url}/metrics")).text
            assert 'herder_connections_refused_total{reason="revoked"} 4.0' in metrics

    run(go())
    told = [record.getMessage() for record in caplog.records if "revoked" in record.getMessage()]
    assert sum("refused" in text and "later ones are only counted" in text for text in told) == 1
    assert sum("of client 'eve' is revoked; connections closed: 1" in text for text in told) == 1


def test_what_a_revoked_agent_ran_runs_elsewhere(authority: Authority, tmp_path: Path, run: Run) -> None:
    identity = authority.identity("agent", "n1")

    async def go() -> None:
        async with (
            coordinating(authority, tmp_path, reconnect_grace_s=60.0) as running,
            client_of(authority, running.address, role="admin") as admin,
        ):
            agent = Client(identity, running.address, hello=agent_hello("n1"))
            async with doomed(agent) as ending:
                one = Peer(agent, agent.observer.links[0])
                one.send(m.Sync())
                admin.send(m.OpenJob(job_spec()), submission(2))
                order = await one.next(m.StartAttempts)
                one.send(m.AttemptsStarted(tuple(start.attempt for start in order.attempts)))
                await admin.next(m.TasksStarted)
                answer = await revoke(admin, key_of(identity))
                assert answer.error == ""
                assert "revoked" in str(await ending)
            async with agent_of(authority, running.address, node="n2") as other:
                await run_all(other, 2)
                ends = await collect_ends(admin, 2)
                assert [end.outcome for end in ends] == [Outcome.SUCCEEDED] * 2

    run(go())


def test_one_that_greets_while_it_is_revoked_is_not_welcomed(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            client_of(authority, running.address, role="admin") as admin,
        ):
            peer = tls.own_peer(authority.identity("client", "eve"))
            hello = m.Hello(1, CLUSTER, admin.link.hello.incarnation)
            assert isinstance(running.server._welcome(hello, peer), m.Welcome)
            await revoke(admin, m.Key(peer.serial))
            refused = running.server._welcome(hello, peer)
            assert isinstance(refused, m.Refused)
            assert refused.error == "Unauthorized"

    run(go())


def test_only_admins_revoke_and_not_themselves(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            client_of(authority, running.address, role="admin") as admin,
        ):
            own = key_of(authority.identity("admin", "ann"))
            answer = await revoke(admin, own)
            assert (answer.error, answer.keys) == ("ConfigError", None)
            assert "--role admin" in answer.message
            for verb in (m.RevokeKeys(1, (own,)), m.ListKeys(1)):
                mallory = Client(authority.identity("client", "mallory"), running.address)
                async with doomed(mallory) as ending:
                    mallory.observer.links[0].send(verb)
                    assert isinstance(await ending, Unauthorized)
            admin.send(m.ListKeys(3))
            assert not any(info.revoked for info in (await admin.next(m.Answer)).keys or ())

    run(go())


def test_who_has_a_users_certificate_is_that_user_whatever_he_says(
    authority: Authority, tmp_path: Path, run: Run
) -> None:
    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            client_of(authority, running.address, role="admin") as ann,
        ):
            ann.send(m.OpenJob(job_spec()), submission(1))
            identity = authority.identity("client", "mallory")
            hello = m.Hello(1, CLUSTER, Incarnation("m" * 16), owner="ann")
            async with linked_as(Client(identity, running.address, hello=hello)) as mallory:
                mallory.send(m.CancelTasks(JOB))
                refused = await mallory.next(m.SubmitRefused)
                assert (refused.error, "belongs to 'ann'" in refused.message) == ("Unauthorized", True)

    run(go())


def test_a_revocation_that_was_acknowledged_survives_kill_9(authority: Authority, tmp_path: Path, run: Run) -> None:
    config = config_for(authority, tmp_path)
    identity = authority.identity("client", "eve")

    async def revoke_it(address: tuple[str, int]) -> None:
        async with client_of(authority, address, role="admin") as admin:
            assert (await revoke(admin, key_of(identity))).error == ""

    async def try_it(address: tuple[str, int]) -> None:
        error = await ended(Client(identity, address))
        assert isinstance(error, Unauthorized)
        assert "revoked" in str(error)

    with coordinator_process(config) as process:
        run(revoke_it(process.address))
        process.kill()
    for _ in range(2):  # from the journal, and from the snapshot with which each life begins
        with coordinator_process(config) as process:
            run(try_it(process.address))
            process.kill()

"""Two real coordinators on one PostgreSQL: one serves, one stands by, and never both."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psycopg
import pytest

from coordinator.server.conftest import Run
from herder_coordinator.journal import postgres
from herder_coordinator.journal.interface import JournalError, JournalFenced, StandbyEnded
from herder_coordinator.journal.store import Base
from herder_shared.config import CoordinatorConfig
from herder_shared.errors import ConfigError
from herder_shared.ids import Incarnation
from herder_shared.wire import messages as m
from support.coordinators import (
    JOB,
    Peer,
    agent_of,
    collect_ends,
    config_for,
    coordinator_process,
    coordinator_starting,
    job_spec,
    run_all,
    submission,
)
from support.leaks import wait_until
from support.links import CLUSTER, Authority, Client, free_address, running

LEASE_S = 4.0


def configure(authority: Authority, folder: Path, database: str) -> CoordinatorConfig:
    folder.mkdir()
    listen, http = free_address(), free_address()
    return config_for(
        authority, folder, listen=listen, http_listen=http, store=database, blob_dir=folder.parent / "blobs"
    )


def split(config: CoordinatorConfig) -> tuple[str, int]:
    host, _, port = config.listen.rpartition(":")
    return host, int(port)


def answers(config: CoordinatorConfig, path: str, text: str, status: int) -> Callable[[], bool]:
    def ask() -> bool:
        try:
            answer = httpx.get(f"http://{config.http_listen}{path}", timeout=5)
        except httpx.TransportError:
            return False
        return answer.status_code == status and text in answer.text

    return ask


@pytest.mark.slow
def test_a_standby_takes_over_from_a_killed_holder_with_all_that_was_acknowledged(
    authority: Authority, tmp_path: Path, run: Run, database: str
) -> None:
    one, two = (configure(authority, tmp_path / name, database) for name in ("one", "two"))

    async def submit_then_kill(kill: Callable[[], None]) -> None:
        hello = m.Hello(1, CLUSTER, Incarnation("c" * 16), owner="ann")
        both = Client(authority.identity("admin", "ann"), split(one), split(two), hello=hello)
        async with running(both):
            client = Peer(both, await both.observer.link())
            client.send(m.OpenJob(job_spec()), submission(20))
            while (await client.next(m.SubmitOk)).upto < 20:
                pass
            client.send(m.RevokeKeys(1, (m.Key("e7e", "client", "eve"),)))
            assert (await client.next(m.Answer)).error == ""
            kill()
            # The same client finds the other one by itself, and goes on at its cursor.
            await both.observer.until(lambda: len(both.observer.links) == 2, 30)
            client.link = both.observer.links[-1]
            assert client.link.epoch == 2
            client.send(m.Attach(JOB, 0), m.ListKeys(2))
            keys = (await client.next(m.Answer)).keys or ()
            assert [info.key.name for info in keys if info.revoked] == ["eve"]
            async with agent_of(authority, split(two)) as agent:
                await run_all(agent, 20)
                assert len(await collect_ends(client, 20)) == 20

    lease = ("--lease-s", str(LEASE_S))
    with coordinator_process(one, *lease) as first, coordinator_starting(two, *lease) as second:
        assert wait_until(answers(two, "/readyz", "standing by", 503), 30)
        assert answers(two, "/healthz", f"pid {first.process.pid}", 200)()
        assert "standing by" in second.log.read_text()
        run(submit_then_kill(first.kill))
        second.await_hello()
        assert second.hello["epoch"] == 2
        assert second.end() == 0


@pytest.mark.slow
def test_a_stopped_holder_is_fenced_and_ends_when_it_goes_on(
    authority: Authority, tmp_path: Path, database: str
) -> None:
    one, two = (configure(authority, tmp_path / name, database) for name in ("one", "two"))
    lease = ("--lease-s", str(LEASE_S))
    with coordinator_process(one, *lease) as first, coordinator_starting(two, *lease) as second:
        assert wait_until(answers(two, "/readyz", "standing by", 503), 30)
        first.process.send_signal(signal.SIGSTOP)
        start_s = time.monotonic()
        second.await_hello()
        assert second.hello["epoch"] == 2
        assert time.monotonic() - start_s < LEASE_S + 5  # it has to start, on whatever machine this is
        first.process.send_signal(signal.SIGCONT)
        assert first.process.wait(20) == 4
        text = first.log.read_text()
        assert "perhaps another coordinator has taken over" in text
        assert "Traceback" not in text
        assert wait_until(answers(two, "/readyz", "ready", 200), 10)


@pytest.mark.slow
def test_a_standby_that_is_told_to_end_ends(authority: Authority, tmp_path: Path, database: str) -> None:
    one = configure(authority, tmp_path / "one", database)
    held = postgres.open_journal(database, tmp_path, CLUSTER)
    try:
        with coordinator_starting(one) as standby:
            assert wait_until(answers(one, "/readyz", "standing by", 503), 30)
            assert standby.end() == 0
            assert "ended while standing by" in standby.log.read_text()
    finally:
        held.close()


def test_a_holder_of_an_older_epoch_writes_nothing_even_with_a_session(database: str, tmp_path: Path) -> None:
    """The fence is the row, not the lock."""
    old = postgres.PostgresStore.open(database, CLUSTER)
    other = psycopg.connect(database, autocommit=True)
    with other:
        other.execute("UPDATE herder.leader SET epoch = epoch + 1")
    writes: list[Callable[[], None]] = [
        lambda: old.insert([(1, b"late")]),
        lambda: old.add_parts([(1, b"late")]),
        lambda: old.adopt(Base(1, 1, 1)),
    ]
    for write in writes:
        with pytest.raises(JournalFenced, match="another coordinator has taken over"):
            write()
    old.close(has_failed=True)
    new = postgres.PostgresStore.open(database, CLUSTER)
    assert (new.epoch, new.batches(0), new.base) == (3, [], Base())
    new.close(has_failed=False)


def test_a_database_that_restarts_ends_the_holder_and_not_the_standby(database: str, tmp_path: Path) -> None:
    holder = postgres.PostgresStore.open(database, CLUSTER)
    waited: list[str] = []
    over = threading.Event()

    def stand_by(reason: str, seconds: float) -> bool:
        waited.append(reason)
        if len(waited) == 1:
            holder.close(has_failed=False)
            end_sessions(database)
        return not over.wait(seconds) and len(waited) < 100

    taken = postgres.PostgresStore.open(database, CLUSTER, stand_by=stand_by)
    assert taken.epoch == 2
    assert "pid" in waited[0]
    taken.close(has_failed=False)


def end_sessions(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as other:
        other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


def test_a_standby_that_may_not_wait_any_longer_says_so(database: str) -> None:
    holder = postgres.PostgresStore.open(database, CLUSTER)
    with pytest.raises(StandbyEnded):
        postgres.PostgresStore.open(database, CLUSTER, stand_by=lambda _reason, _seconds: False)
    holder.close(has_failed=False)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("mysql://x/y", "is not a store"),
        ("postgresql://me:secret@host/db", "holds a password.*pgpass"),
        ("postgresql://host/db?password=secret", "holds a password"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_with_the_cure(url: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        postgres.check_url(url)
    assert "secret" not in str(refused.value)


def test_a_database_that_is_not_there_is_said(database: str, tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"cannot be used.*does not exist"):
        postgres.open_journal(database.replace("/db", "/nowhere"), tmp_path, CLUSTER)

"""The whole coordinator in this loop, with real links: a task's way, order of acknowledgements, fail-stop, ending."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import pytest

from coordinator.server.conftest import Run
from herder_coordinator.core import records
from herder_coordinator.core.lease import JUDGE_RESTART_S
from herder_coordinator.journal.interface import JournalError
from herder_coordinator.server.server import Server
from herder_shared.ids import AttemptId, JobId
from herder_shared.states import Outcome
from herder_shared.wire import messages as m
from support.coordinators import (
    JOB,
    MemoryJournal,
    agent_of,
    client_of,
    collect_ends,
    config_for,
    coordinating,
    job_spec,
    run_all,
    submission,
)
from support.links import Authority


def test_tasks_go_from_client_to_agent_and_their_ends_come_back(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            agent_of(authority, running.address) as agent,
            client_of(authority, running.address) as client,
        ):
            client.send(m.OpenJob(job_spec()), submission(50))
            attempts = await run_all(agent, 50)
            ends = await collect_ends(client, 50)
            assert sorted(end.index for end in ends) == list(range(50))
            assert all(end.outcome is Outcome.SUCCEEDED for end in ends)
            assert {end.index: end.result.inline for end in ends if end.result}[7] == b"result of args 7"
            acked: list[AttemptId] = []
            while len(acked) < 50:
                acked += (await agent.next(m.AckAttempts)).attempts
            assert sorted(acked) == sorted(attempts)

    run(go())


def test_nothing_is_acknowledged_before_the_journal_has_it(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        journal = MemoryJournal()
        async with (
            coordinating(authority, tmp_path, journal) as running,
            agent_of(authority, running.address) as agent,
            client_of(authority, running.address) as client,
        ):
            journal.hold = True
            client.send(m.OpenJob(job_spec()), submission(1))
            order = await agent.next(m.StartAttempts)  # idempotent: need not wait
            assert len(order.attempts) == 1
            await client.ask(1, "status")
            assert not [one for one in client.messages if isinstance(one, m.SubmitOk)]
            journal.hold = False
            journal.commit()
            assert (await client.next(m.SubmitOk)).job == JOB
            assert any(isinstance(record, records.TasksSubmitted) for record in journal.records)

    run(go())


def test_a_failed_journal_ends_the_coordinator_without_another_acknowledgement(
    authority: Authority, tmp_path: Path, run: Run
) -> None:
    async def fail(journal: MemoryJournal) -> None:
        async with (
            coordinating(authority, tmp_path, journal) as running,
            client_of(authority, running.address) as client,
        ):
            journal.hold = True
            client.send(m.OpenJob(job_spec()), submission(1))
            await client.ask(1, "status")
            journal.fail(JournalError("the disk is gone"))
            await client.client.observer.until(lambda: client.client.observer.ends)
            journal.commit()
            await asyncio.wait([running.ending])
            assert not [one for one in client.messages if isinstance(one, m.SubmitOk)]

    async def go() -> None:
        journal = MemoryJournal()
        with pytest.raises(JournalError, match="disk"):
            await fail(journal)
        assert journal.is_closed

    run(go())


def test_a_restarted_coordinator_knows_what_was_acknowledged(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        first = MemoryJournal()
        async with (
            coordinating(authority, tmp_path, first) as running,
            client_of(authority, running.address) as client,
        ):
            client.send(m.OpenJob(job_spec(detached=True)), submission(3))
            while (await client.next(m.SubmitOk)).upto < 3:
                pass
        second = MemoryJournal(records=first.records, epoch=2)
        async with (
            coordinating(authority, tmp_path, second) as running,
            agent_of(authority, running.address) as agent,
            client_of(authority, running.address) as client,
        ):
            assert client.link.epoch == 2
            client.send(m.Attach(JOB, 0))
            await run_all(agent, 3)
            assert len(await collect_ends(client, 3)) == 3

    run(go())


def test_time_begins_when_the_journal_is_held_and_not_when_the_waiting_for_it_began(
    authority: Authority, tmp_path: Path, run: Run
) -> None:
    """Else nobody would have his grace to be back after a long time of standing by."""

    async def go() -> None:
        first = MemoryJournal()
        async with coordinating(authority, tmp_path, first) as running, client_of(authority, running.address) as client:
            client.send(m.OpenJob(job_spec(detached=True)), submission(3))
            while (await client.next(m.SubmitOk)).upto < 3:
                pass
        held_s: list[float] = []

        def open_late(*_: object) -> MemoryJournal:
            assert server.stand_by("pid 1 on host other", 0.2)
            held_s.append(time.monotonic())
            return MemoryJournal(records=first.records, epoch=2)

        server = Server(config_for(authority, tmp_path), open_late)
        ready = asyncio.Event()
        ending = asyncio.ensure_future(server.run(lambda _: ready.set()))
        await ready.wait()
        state = server._state()
        assert state is not None
        assert state.judge_s >= held_s[0] + JUDGE_RESTART_S - 0.1
        server.end("the test is over")
        await ending

    run(go())


def test_ending_makes_durable_what_was_queued(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        journal = MemoryJournal()
        async with (
            coordinating(authority, tmp_path, journal) as running,
            client_of(authority, running.address) as client,
        ):
            journal.hold = True
            client.send(m.OpenJob(job_spec()), submission(1))
            await client.ask(1, "status")
            running.server.end("now")
            asyncio.get_running_loop().call_later(0.05, journal.commit)
            await asyncio.wait([running.ending])
            assert [one.upto for one in client.messages if isinstance(one, m.SubmitOk)][-1] == 1

    run(go())


def test_shut_down_stops_the_agents_first(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            agent_of(authority, running.address) as agent,
            client_of(authority, running.address, role="admin") as admin,
        ):
            admin.send(m.ShutDown(9))
            assert (await admin.next(m.Answer)).id == 9
            await agent.next(m.Stop)
            assert not running.ending.done()
            await agent.client.dialler.close()
            await asyncio.wait([running.ending])

    run(go())


def test_readiness_says_why_not(
    authority: Authority, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def go() -> None:
        journal = MemoryJournal()
        async with (
            coordinating(authority, tmp_path, journal) as running,
            client_of(authority, running.address) as client,
            httpx.AsyncClient(base_url=running.url) as web,
        ):
            assert (await web.get("/readyz")).status_code == 200
            journal.hold = True
            client.send(m.OpenJob(job_spec(JobId("feedfeedfeedfeed"))))
            await client.ask(1, "status")
            health = await web.get("/healthz")
            assert health.status_code == 200
            assert health.text == "ok\n"
            monkeypatch.setattr("herder_coordinator.server.server.SYNC_SLOW_S", -1.0)
            assert (await web.get("/readyz")).status_code == 200
            monkeypatch.setattr("herder_coordinator.server.server.SYNC_HANGS_S", -1.0)
            answer = await web.get("/readyz")
            assert answer.status_code == 503
            assert "disk" in answer.text
            health = await web.get("/healthz")
            assert health.status_code == 200
            assert "the journal's disk has not answered for" in health.text
            journal.hold = False
            journal.commit()

    run(go())


def test_while_there_is_no_room_or_no_answer_submissions_are_asked_to_come_again(
    authority: Authority, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def go() -> None:
        journal = MemoryJournal()
        async with (
            coordinating(authority, tmp_path, journal) as running,
            client_of(authority, running.address) as client,
            httpx.AsyncClient(base_url=running.url) as web,
        ):
            client.send(m.OpenJob(job_spec()))
            assert (await client.next(m.SubmitOk)).upto == 0
            journal.shortage = "no space left on its disk"
            client.send(submission(3))
            refused = await client.next(m.SubmitRefused)
            assert (refused.first, refused.error, refused.again) == (0, "Unreachable", True)
            assert "no space" in refused.message
            assert "no space" in (await web.get("/healthz")).text
            assert (await web.get("/readyz")).status_code == 200
            journal.shortage = ""
            journal.hold = True
            client.send(submission(3))
            await client.ask(1, "status")
            monkeypatch.setattr("herder_coordinator.server.server.SYNC_PAUSES_S", -1.0)
            client.send(submission(3, first=3))
            assert (await client.next(m.SubmitRefused)).first == 3
            monkeypatch.undo()
            journal.hold = False
            journal.commit()
            client.send(submission(3, first=3))
            while (await client.next(m.SubmitOk)).upto < 6:
                pass

    run(go())

"""Links with agents: results that are blobs, syncs, orders that do not fit, sessions that are over."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.server.conftest import Run
from herder_shared.errors import Unreachable
from herder_shared.ids import NodeName, blob_id
from herder_shared.limits import BLOB_CHUNK_BYTES
from herder_shared.states import Cause, Outcome
from herder_shared.wire import messages as m
from support.coordinators import (
    FUNCTION,
    JOB,
    agent_of,
    chunks,
    client_of,
    collect_ends,
    coordinating,
    ended,
    job_spec,
    submission,
    tasks,
)
from support.links import Authority

RESULT = bytes(100_000)
PAYLOAD = m.Payload(blob=blob_id(RESULT), size_bytes=len(RESULT))


def test_an_uploaded_result_is_reported_and_can_be_fetched(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            agent_of(authority, running.address) as agent,
            client_of(authority, running.address) as client,
        ):
            client.send(m.OpenJob(job_spec()), submission(1))
            (start,) = (await agent.next(m.StartAttempts)).attempts
            agent.send(*chunks(RESULT, BLOB_CHUNK_BYTES), m.AttemptsEnded((ended(start, PAYLOAD),)))
            end = await client.next(m.TasksEnded)
            assert end.ends[0].result == PAYLOAD
            client.send(m.WantBlob(blob_id(RESULT)))
            assert (await client.next(m.PutBlob)).data == RESULT

    run(go())


def test_a_missing_result_is_asked_for_before_the_end_counts(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            agent_of(authority, running.address) as agent,
            client_of(authority, running.address) as client,
        ):
            client.send(m.OpenJob(job_spec()), submission(1))
            (start,) = (await agent.next(m.StartAttempts)).attempts
            agent.send(m.AttemptsEnded((ended(start, PAYLOAD),)))
            assert (await agent.next(m.WantBlob)).id == blob_id(RESULT)
            (job,) = (await client.ask(1, "job", JOB)).jobs or ()
            assert not job.outcomes
            agent.send(*chunks(RESULT, BLOB_CHUNK_BYTES))
            assert (await collect_ends(client, 1))[0].result == PAYLOAD

    run(go())


def test_a_result_that_nobody_has_is_a_lost_attempt(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            agent_of(authority, running.address) as agent,
            client_of(authority, running.address) as client,
        ):
            client.send(m.OpenJob(job_spec()), submission(1))
            (start,) = (await agent.next(m.StartAttempts)).attempts
            agent.send(m.AttemptsEnded((ended(start, PAYLOAD),)))
            agent.send(m.NoBlob((await agent.next(m.WantBlob)).id))
            (again,) = (await agent.next(m.StartAttempts)).attempts
            assert (again.index, again.ordinal) == (0, 2)
            agent.send(m.AttemptsEnded((ended(again),)))
            assert (await collect_ends(client, 1))[0].outcome is Outcome.SUCCEEDED

    run(go())


def test_an_end_in_a_sync_whose_result_is_missing_keeps_its_attempt(
    authority: Authority, tmp_path: Path, run: Run
) -> None:
    async def go() -> None:
        async with coordinating(authority, tmp_path) as running, client_of(authority, running.address) as client:
            async with agent_of(authority, running.address) as agent:
                client.send(m.OpenJob(job_spec()), submission(1))
                (start,) = (await agent.next(m.StartAttempts)).attempts
            sync = m.Sync(ended=(ended(start, PAYLOAD),))
            async with agent_of(authority, running.address, sync=sync) as agent:
                await agent.next(m.WantBlob)
                assert (await agent.next(m.SyncOk)).drop == ()
                agent.send(*chunks(RESULT, BLOB_CHUNK_BYTES))
                (end,) = await collect_ends(client, 1)
                assert (end.result, end.usage.attempt) == (PAYLOAD, 1)
                assert not [one for one in agent.messages if isinstance(one, m.StartAttempts)]

    run(go())


def test_orders_above_a_frame_are_cut(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            agent_of(authority, running.address, cores=64) as agent,
            client_of(authority, running.address) as client,
        ):
            client.send(m.OpenJob(job_spec()))
            large = tasks(*(bytes([n]) * 60_000 for n in range(60)))
            client.send(*(m.SubmitTasks(JOB, n, FUNCTION, large[n : n + 6]) for n in range(0, 60, 6)))
            seen = 0
            while seen < 60:
                seen += len((await agent.next(m.StartAttempts)).attempts)

    run(go())


def test_an_attempt_that_can_never_be_sent_fails_by_itself(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            agent_of(authority, running.address) as agent,
            client_of(authority, running.address) as client,
        ):
            client.send(m.OpenJob(job_spec()), submission(40))
            for _ in range(40):
                while not agent.messages or not any(isinstance(one, m.StartAttempts) for one in agent.messages):
                    await agent.next(m.StartAttempts)
                break
            done = 0
            while done < 40:
                order = await agent.next(m.StartAttempts) if done else agent.messages[_first_order(agent.messages)]
                assert isinstance(order, m.StartAttempts)
                results = tuple(ended(start, m.Payload(inline=bytes(60_000))) for start in order.attempts)
                agent.send(*(m.AttemptsEnded((one,)) for one in results))
                done += len(results)
            await collect_ends(client, 40)
            needs_all = m.TaskItem(m.Payload(inline=b"x"), deps=tuple((JOB, n) for n in range(40)))
            client.send(m.SubmitTasks(JOB, 40, FUNCTION, (needs_all,)))
            message = await client.next(m.TasksEnded)
            while message.cursor < 40:
                message = await client.next(m.TasksEnded)
            failure = message.ends[0].failure
            assert failure is not None
            assert failure.cause is Cause.PAYLOAD_TOO_LARGE

    run(go())


def _first_order(messages: list[m.Message]) -> int:
    return next(n for n, message in enumerate(messages) if isinstance(message, m.StartAttempts))


def test_orders_of_a_session_that_is_over_go_nowhere(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with coordinating(authority, tmp_path) as running, agent_of(authority, running.address) as agent:
            agents = running.server._agents
            assert agents is not None
            agents.send(NodeName("n1"), 99, m.Stop("wrong session"))
            agents.send(NodeName("n2"), agent.link.session, m.Stop("wrong node"))
            agents.send(NodeName("n1"), agent.link.session, m.Drain())
            agents.flush()
            await agent.next(m.Drain)
            assert not [one for one in agent.messages if isinstance(one, m.Stop)]

    run(go())


def test_an_agent_that_does_not_answer_a_pull_is_unreachable(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with coordinating(authority, tmp_path) as running, agent_of(authority, running.address):
            agents = running.server._agents
            assert agents is not None
            with pytest.raises(Unreachable, match="within"):
                await agents.pull_metrics(NodeName("n1"), openmetrics=False, timeout_s=0.01)
            with pytest.raises(Unreachable, match="not connected"):
                await agents.pull_metrics(NodeName("n2"), openmetrics=False, timeout_s=1)

    run(go())

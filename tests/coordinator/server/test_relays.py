"""Running tasks as clients, through an agent that is played by the test."""

from __future__ import annotations

from pathlib import Path

import msgspec

from coordinator.server.conftest import Run
from herder_shared.ids import AttemptId, Incarnation, JobId
from herder_shared.limits import BLOB_CHUNK_BYTES, PROTOCOL_VERSION
from herder_shared.states import Outcome
from herder_shared.wire import messages as m
from herder_shared.wire.relay import read_to_client
from support.coordinators import Peer, agent_of, chunks, client_of, coordinating, ended, job_spec, submission
from support.links import Authority

CHILD = JobId("c" * 16)
ME = Incarnation("9" * 16)
encode = msgspec.msgpack.Encoder().encode


class InTask:
    """The client inside a task, seen from its agent."""

    def __init__(self, agent: Peer, attempt: AttemptId) -> None:
        self.agent = agent
        self.attempt = attempt

    def open(self, protocol: int = PROTOCOL_VERSION) -> None:
        self.agent.send(m.TaskClientOpened(self.attempt, ME, protocol))

    def say(self, *messages: m.Message) -> None:
        self.agent.send(*(m.TaskClientSaid(self.attempt, encode(message)) for message in messages))

    async def hear(self) -> m.Message:
        told = await self.agent.next(m.TellTaskClient)
        assert told.attempt == self.attempt
        return read_to_client(told.body)


async def parent_of(client: Peer, agent: Peer) -> m.AttemptStart:
    """A task that runs on the agent's only core."""
    client.send(m.OpenJob(job_spec()), submission(1))
    (start,) = (await agent.next(m.StartAttempts)).attempts
    agent.send(m.AttemptsStarted((start.attempt,)))
    return start


def test_a_task_submits_waits_and_gets_the_value(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            agent_of(authority, running.address, cores=1) as agent,
            client_of(authority, running.address) as client,
        ):
            parent = await parent_of(client, agent)
            task = InTask(agent, parent.attempt)
            task.open()
            task.say(m.OpenJob(job_spec(CHILD)), submission(1, CHILD))
            while await task.hear() != m.SubmitOk(CHILD, 1):
                pass
            agent.send(m.SlotsChanged(lent=(parent.attempt,)))
            order = await agent.next(m.StartAttempts)
            assert [(brief.job, brief.owner) for brief in order.jobs] == [(CHILD, "ann")]
            agent.send(m.AttemptsEnded((ended(order.attempts[0]),)))
            told = await task.hear()
            while not isinstance(told, m.TasksEnded):
                told = await task.hear()
            assert told.ends[0].outcome is Outcome.SUCCEEDED
            task.say(m.AckEvents(CHILD, 1), m.CloseJob(CHILD, 1))
            agent.send(m.TaskClientClosed(parent.attempt))
            (info,) = (await client.ask(1, "job", CHILD)).jobs or ()
            assert info.state == "done"

    run(go())


def test_a_blob_of_a_task_comes_and_goes(authority: Authority, tmp_path: Path, run: Run) -> None:
    content = bytes(2 * BLOB_CHUNK_BYTES)
    (first, second) = chunks(content, BLOB_CHUNK_BYTES)

    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            agent_of(authority, running.address, cores=1) as agent,
            client_of(authority, running.address) as client,
        ):
            task = InTask(agent, (await parent_of(client, agent)).attempt)
            task.open()
            task.say(first, second)
            while await task.hear() != m.BlobStored(first.id, len(content)):
                pass
            task.say(m.WantBlob(first.id))
            assert await task.hear() == first

    run(go())


def test_what_is_for_admins_ends_it_and_not_its_agent(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            agent_of(authority, running.address, cores=1) as agent,
            client_of(authority, running.address) as client,
        ):
            parent = await parent_of(client, agent)
            task = InTask(agent, parent.attempt)
            task.open()
            task.say(m.ShutDown(1))
            dropped = await agent.next(m.DropTaskClient)
            assert (dropped.attempt, dropped.error) == (parent.attempt, "Unauthorized")
            agent.send(m.TaskClientSaid(parent.attempt, b"late"))
            agent.send(m.AttemptsEnded((ended(parent),)))
            assert (await client.next(m.TasksEnded)).ends[0].outcome is Outcome.SUCCEEDED

    run(go())


def test_another_version_and_another_attempt_are_refused(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            agent_of(authority, running.address, cores=1) as agent,
            client_of(authority, running.address) as client,
        ):
            parent = await parent_of(client, agent)
            InTask(agent, parent.attempt).open(PROTOCOL_VERSION + 1)
            assert (await agent.next(m.DropTaskClient)).error == "ProtocolMismatch"
            InTask(agent, AttemptId(7, 7)).open()
            assert (await agent.next(m.DropTaskClient)).error == "Unauthorized"

    run(go())

"""What clients may send and what they are answered."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from coordinator.server.conftest import Run
from herder_shared.ids import BlobId, JobId, NodeName, blob_id
from herder_shared.limits import BLOB_CHUNK_BYTES
from herder_shared.states import AgentState, Outcome, TaskState
from herder_shared.wire import messages as m
from support.coordinators import (
    FUNCTION,
    JOB,
    Peer,
    agent_of,
    chunks,
    client_of,
    collect_ends,
    coordinating,
    job_spec,
    run_all,
    submission,
)
from support.links import Authority

LARGE = bytes(100_000)


def large_submission(blob: BlobId) -> m.SubmitTasks:
    return m.SubmitTasks(JOB, 0, FUNCTION, (m.TaskItem(m.Payload(blob=blob, size_bytes=len(LARGE))),))


def test_a_submission_may_follow_its_blob_before_that_is_confirmed(
    authority: Authority, tmp_path: Path, run: Run
) -> None:
    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            agent_of(authority, running.address) as agent,
            client_of(authority, running.address) as client,
        ):
            client.send(m.OpenJob(job_spec()), *chunks(LARGE, BLOB_CHUNK_BYTES))
            client.send(large_submission(blob_id(LARGE)), m.CloseJob(JOB, 1))
            await run_all(agent, 1)
            await collect_ends(client, 1)
            (order,) = (one for one in agent.messages if isinstance(one, m.StartAttempts))
            assert order.attempts[0].args.blob == blob_id(LARGE)
            assert not [one for one in client.messages if isinstance(one, m.SubmitRefused)]

    run(go())


def test_an_older_order_to_drop_a_blob_does_not_overtake_the_submission_that_names_it_again(
    authority: Authority, tmp_path: Path, run: Run
) -> None:
    async def go() -> None:
        async with coordinating(authority, tmp_path) as running, client_of(authority, running.address) as client:
            server, blob = running.server, blob_id(LARGE)
            assert server._clients is not None
            client.send(m.OpenJob(job_spec()), *chunks(LARGE, BLOB_CHUNK_BYTES))
            await client.next(m.BlobStored)
            (link,) = server._clients._links
            # In one turn of the loop: the submission is heard, and then the disk has what the order waited for.
            server._clients.received(link, [large_submission(blob)])
            server.drop_blobs((blob,))
            while (await client.next(m.SubmitOk)).upto < 1:
                pass
            assert blob in server._store

    run(go())


def test_a_submission_without_its_blob_ends_the_link_so_that_nothing_overtakes_it(
    authority: Authority, tmp_path: Path, run: Run
) -> None:
    async def go() -> None:
        async with coordinating(authority, tmp_path) as running, client_of(authority, running.address) as client:
            all_of_it: list[m.Message] = [m.OpenJob(job_spec()), large_submission(blob_id(LARGE)), m.CloseJob(JOB, 1)]
            client.send(*all_of_it)
            again = await linked_again(client)
            again.send(*chunks(LARGE, BLOB_CHUNK_BYTES), *all_of_it)
            while (await again.next(m.SubmitOk)).upto < 1:
                pass
            assert not [one for one in client.messages if isinstance(one, m.SubmitRefused)]

    run(go())


def test_what_follows_on_a_submission_that_is_to_come_again_comes_with_it(
    authority: Authority, tmp_path: Path, run: Run
) -> None:
    async def go() -> None:
        async with coordinating(authority, tmp_path) as running, client_of(authority, running.address) as client:
            clients = running.server._clients
            assert clients is not None
            clients.why_no_submissions = lambda: "no space"
            client.send(m.OpenJob(job_spec()), submission(2), m.CancelTasks(JOB, (0,)), m.CloseJob(JOB, 2))
            refused = await client.next(m.SubmitRefused)
            assert (refused.first, refused.error, refused.again) == (0, "Unreachable", True)
            clients.why_no_submissions = str
            client.send(submission(2), m.CancelTasks(JOB, (0,)), m.CloseJob(JOB, 2))
            assert (await client.next(m.TasksEnded)).ends[0].outcome is Outcome.CANCELLED
            assert len([one for one in client.messages if isinstance(one, m.SubmitRefused)]) == 1
            assert len([one for one in client.messages if isinstance(one, m.CancelOk)]) == 1

    run(go())


def test_a_submission_of_which_a_part_is_there_is_still_to_come_again(
    authority: Authority, tmp_path: Path, run: Run
) -> None:
    """The first part came on an older connection; the client has put what came later to what it says again."""

    async def go() -> None:
        async with coordinating(authority, tmp_path) as running, client_of(authority, running.address) as client:
            clients = running.server._clients
            assert clients is not None
            client.send(m.OpenJob(job_spec()), submission(2))
            while (await client.next(m.SubmitOk)).upto < 2:
                pass
            clients.why_no_submissions = lambda: "no space"
            client.send(submission(4), submission(1, first=4), m.CloseJob(JOB, 5))
            assert (await client.next(m.SubmitRefused)).first == 0
            clients.why_no_submissions = str
            client.send(submission(4), submission(1, first=4), m.CloseJob(JOB, 5))
            while (await client.next(m.SubmitOk)).upto < 5:
                pass
            assert len([one for one in client.messages if isinstance(one, m.SubmitRefused)]) == 1

    run(go())


async def linked_again(client: Peer) -> Peer:
    """The same client on its next link."""
    link = await client.client.observer.link(2)
    return Peer(client.client, link)


def test_a_function_too_large_for_a_message_is_a_blob(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with coordinating(authority, tmp_path) as running, client_of(authority, running.address) as client:
            function = m.Function(blob_id(LARGE))
            client.send(m.OpenJob(job_spec()), msgspec.structs.replace(submission(1), function=function))
            again = await linked_again(client)
            again.send(*chunks(LARGE, BLOB_CHUNK_BYTES))
            again.send(msgspec.structs.replace(submission(1), function=function))
            while (await again.next(m.SubmitOk)).upto < 1:
                pass

    run(go())


def test_a_blob_is_dropped_when_its_task_has_ended(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            agent_of(authority, running.address) as agent,
            client_of(authority, running.address) as client,
        ):
            client.send(m.OpenJob(job_spec()), *chunks(LARGE, BLOB_CHUNK_BYTES))
            client.send(large_submission(blob_id(LARGE)))
            await run_all(agent, 1)
            await collect_ends(client, 1)
            await client.ask(1, "status")
            assert len(running.server._store) == 0

    run(go())


def test_questions_are_answered_after_what_came_before_them(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with coordinating(authority, tmp_path) as running, client_of(authority, running.address) as client:
            client.send(m.OpenJob(job_spec()), submission(3))
            (job,) = (await client.ask(1, "job", JOB)).jobs or ()
            assert (job.name, job.tasks, job.counts) == ("a job", 3, {TaskState.PENDING: 3})
            assert len((await client.ask(2, "tasks", JOB)).tasks or ()) == 3
            assert (await client.ask(3, "logs", JOB, 0)).logs == m.Logs()
            assert (await client.ask(4, "nodes")).nodes == ()
            assert len((await client.ask(5, "jobs")).jobs or ()) == 1
            assert len((await client.ask(6, "workloads")).workloads or ()) == 1
            status = (await client.ask(7, "status")).status
            assert status is not None
            assert (status.clients, status.epoch, status.http) == (1, 1, running.server.http.address)

    run(go())


@pytest.mark.parametrize("what", ["job", "tasks", "logs"])
def test_questions_about_an_unknown_job_name_it(authority: Authority, tmp_path: Path, run: Run, what: str) -> None:
    async def go() -> None:
        async with coordinating(authority, tmp_path) as running, client_of(authority, running.address) as client:
            answer = await client.ask(1, what, JobId("none"))
            assert answer.error == "JobNotFound"
            assert "none" in answer.message

    run(go())


def test_a_node_is_drained_and_used_again(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            agent_of(authority, running.address) as agent,
            client_of(authority, running.address, role="admin") as admin,
        ):
            agent.send(m.Heartbeat(1))
            await agent.next(m.HeartbeatAck)
            for on, state in ((True, AgentState.DRAINING), (False, AgentState.READY)):
                admin.send(m.DrainNode(1, NodeName("n1"), on))
                (node,) = (await admin.next(m.Answer)).nodes or ()
                assert node.state is state
                assert (await agent.next(m.Drain)).on is on
            admin.send(m.DrainNode(2, NodeName("n9")))
            answer = await admin.next(m.Answer)
            assert answer.error == "ConfigError"
            assert "n1" in answer.message

    run(go())


def test_of_two_links_of_one_client_the_older_is_ended(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            client_of(authority, running.address) as client,
            client_of(authority, running.address),
        ):
            await linked_again(client)

    run(go())


def test_a_goodbye_cancels_what_is_not_detached(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with coordinating(authority, tmp_path) as running, client_of(authority, running.address) as client:
            client.send(m.OpenJob(job_spec()), submission(2), m.Goodbye())
            (job,) = (await client.ask(1, "job", JOB)).jobs or ()
            assert job.outcomes == {"cancelled": 2}

    run(go())

"""HTTP: what it serves, whom it turns away."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import httpx
import pytest

from coordinator.server.conftest import Run
from herder_coordinator.server import http
from herder_coordinator.server.http import is_known_host
from herder_shared.ids import NodeName, WorkloadKey
from herder_shared.wire import messages as m
from support.coordinators import (
    JOB,
    Peer,
    agent_of,
    client_of,
    collect_ends,
    coordinating,
    job_spec,
    run_all,
    submission,
)
from support.links import Authority


def test_the_api_shows_nodes_jobs_tasks_workloads(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            agent_of(authority, running.address) as agent,
            client_of(authority, running.address) as client,
            httpx.AsyncClient(base_url=f"{running.url}/api/v1") as web,
        ):
            client.send(m.OpenJob(job_spec()), submission(2))
            await run_all(agent, 2)
            await collect_ends(client, 2)
            report = m.WorkloadReport(WorkloadKey("feedfeedfeedfeed"), "sums", start_method="fork")
            agent.send(m.WorkloadsReported((report,)))
            await client.ask(1, "nodes")
            (node,) = (await web.get("/nodes")).json()
            assert (node["facts"]["node"], node["state"]) == ("n1", "ready")
            (job,) = (await web.get("/jobs")).json()
            assert (job["job"], job["outcomes"]) == (JOB, {"succeeded": 2})
            assert (await web.get(f"/jobs/{JOB}")).json()["name"] == "a job"
            assert [task["index"] for task in (await web.get(f"/jobs/{JOB}/tasks")).json()] == [0, 1]
            (workload,) = (await web.get("/workloads")).json()
            assert workload["name"] == "sums"
            assert (await web.get("/status")).json()["cluster"] == authority.cluster
            for path in ("/jobs/nope", "/jobs/nope/tasks"):
                assert (await web.get(path)).status_code == 404

    run(go())


def test_service_discovery_lists_agents_by_our_own_address(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            agent_of(authority, running.address) as agent,
            httpx.AsyncClient(base_url=running.url) as web,
        ):
            await settled(agent, web)
            answer = await web.get("/sd")
            assert answer.headers["content-type"] == "application/json"
            host = running.url.removeprefix("http://")
            labels = {"node": "n1", "__metrics_path__": "/agents/n1/metrics"}
            assert answer.json() == [{"targets": [host], "labels": labels}]

    run(go())


async def until_disconnected(client: Peer) -> None:
    """Each answer comes a turn of the coordinator's loop later, so it is enough to keep asking."""
    async with asyncio.timeout(8):
        while all(node.state == "ready" for node in (await client.ask(1, "nodes")).nodes or ()):
            continue


async def settled(agent: Peer, web: httpx.AsyncClient) -> None:
    """The agent's sync is through."""
    agent.send(m.Heartbeat(1, m.NodeReport({"task": 2.0, "idle": 4.0})))
    await agent.next(m.HeartbeatAck)
    await web.get("/healthz")


def test_an_agents_metrics_are_pulled_once_and_kept_for_a_while(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            agent_of(authority, running.address) as agent,
            httpx.AsyncClient(base_url=running.url) as web,
        ):
            await settled(agent, web)
            gets = [asyncio.ensure_future(web.get("/agents/n1/metrics")) for _ in range(3)]
            pull = await agent.next(m.PullMetrics)
            agent.send(m.Metrics(pull.id, b"up 1\n", "text/plain; version=0.0.4"))
            answers = await asyncio.gather(*gets, web.get("/agents/n1/metrics"))
            assert {answer.text for answer in answers} == {"up 1\n"}
            assert [one for one in agent.messages if isinstance(one, m.PullMetrics)] == [pull]
            assert (await web.get("/agents/other/metrics")).status_code == 404
            assert running.server.http.address

    run(go())


def test_a_disconnected_agent_is_listed_and_its_metrics_are_not_there(
    authority: Authority, tmp_path: Path, run: Run
) -> None:
    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            client_of(authority, running.address) as client,
            httpx.AsyncClient(base_url=running.url) as web,
        ):
            async with agent_of(authority, running.address) as agent:
                await settled(agent, web)
            await until_disconnected(client)
            assert len((await web.get("/sd")).json()) == 1
            assert (await web.get("/agents/n1/metrics")).status_code == 503

    run(go())


def test_the_page_needs_nothing_from_elsewhere(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with coordinating(authority, tmp_path) as running, httpx.AsyncClient(base_url=running.url) as web:
            answer = await web.get("/")
            assert answer.headers["content-type"].startswith("text/html")
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            for text in ("http://", "https://", "innerHTML", "src=", "@import"):
                assert text not in answer.text

    run(go())


def test_only_get_and_head_are_known(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with coordinating(authority, tmp_path) as running, httpx.AsyncClient(base_url=running.url) as web:
            for path in ("/", "/metrics", "/sd", "/api/v1/jobs", "/agents/n1/metrics"):
                for method in ("POST", "PUT", "DELETE", "PATCH"):
                    assert (await web.request(method, path)).status_code == 405
            head = await web.head("/metrics")
            assert (head.status_code, head.text) == (200, "")
            assert (await web.get("/etc/passwd")).status_code == 404

    run(go())


def test_foreign_hosts_and_long_urls_are_refused(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with coordinating(authority, tmp_path) as running, httpx.AsyncClient(base_url=running.url) as web:
            assert (await web.get("/sd", headers={"host": "evil.example"})).status_code == 421
            assert (await web.get("/sd", headers={"host": "localhost:1"})).status_code == 200
            assert (await web.get("/sd?" + "x" * 3000)).status_code == 414
            assert (await web.get("/" + "x" * 40_000)).status_code in (400, 414)

    run(go())


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:80", "[::1]:7712", "LOCALHOST", "head:1", "10.0.0.1"])
def test_addresses_loopback_and_own_names_are_known_hosts(host: str) -> None:
    assert is_known_host(host, frozenset({"head"}))


@pytest.mark.parametrize("host", ["", "evil.example", "localhost.evil.example", "head:x", "head/../", "a b", "[::1"])
def test_other_hosts_are_not(host: str) -> None:
    assert not is_known_host(host, frozenset({"head"}))


def test_a_node_name_cannot_leave_its_path(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            agent_of(authority, running.address, node=NodeName("a b?c")) as agent,
            httpx.AsyncClient(base_url=running.url) as web,
        ):
            await settled(agent, web)
            (target,) = (await web.get("/sd")).json()
            assert target["labels"]["__metrics_path__"] == "/agents/a%20b%3Fc/metrics"

    run(go())


def test_crowds_that_ask_nothing_are_cut_off_and_agents_and_clients_do_not_notice(
    authority: Authority, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "SOCKETS_MAX", 20)
    monkeypatch.setattr(http, "FIRST_REQUEST_S", 0.2)

    async def go() -> None:
        async with coordinating(authority, tmp_path) as running:
            host, port = running.server.http.address.split(":")
            crowd = [await asyncio.open_connection(host, int(port)) for _ in range(60)]
            async with client_of(authority, running.address) as client:
                assert (await client.ask(1, "status")).status is not None
            async with asyncio.timeout(5.0):
                for reader, _ in crowd:
                    with contextlib.suppress(ConnectionResetError):
                        assert await reader.read() == b""
            for _, writer in crowd:
                writer.close()
            async with httpx.AsyncClient(base_url=running.url) as web:
                assert (await web.get("/readyz")).status_code == 200

    run(go())

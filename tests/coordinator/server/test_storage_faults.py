"""The real program on a disk that fails, hangs, or may not be written; and without descriptors (docs/FAULTS.md)."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from coordinator.server.conftest import Run
from herder_shared.wire import messages as m
from support.coordinators import (
    FUNCTION,
    JOB,
    Peer,
    Process,
    client_of,
    config_for,
    coordinator_process,
    coordinator_starting,
    job_spec,
    submission,
    tasks,
)
from support.links import Authority
from support.requirements import require_program, require_root

SHIM = Path(__file__).resolve().parents[2] / "support" / "sync_shim.c"


class Disk:
    """What the program's syncs do."""

    def __init__(self, library: Path, order: Path) -> None:
        self.environ = {"LD_PRELOAD": str(library), "TEST_SYNC_FILE": str(order)}
        self._order = order

    def order(self, text: str) -> None:
        part = self._order.with_suffix(".part")
        part.write_text(text)
        part.replace(self._order)


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = require_program("gcc", "gcc")
    library = tmp_path_factory.mktemp("shim") / "sync.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(SHIM), "-ldl"], check=True, timeout=60)
    return library


@pytest.fixture
def disk(shim: Path, tmp_path: Path) -> Disk:
    return Disk(shim, tmp_path / "order")


async def acknowledged(client: Peer, upto: int) -> None:
    while (await client.next(m.SubmitOk)).upto < upto:
        pass


@pytest.mark.slow
def test_a_sync_that_fails_ends_it_and_all_that_was_acknowledged_is_kept(
    authority: Authority, tmp_path: Path, run: Run, disk: Disk
) -> None:
    config = config_for(authority, tmp_path)

    async def submit(address: tuple[str, int]) -> None:
        async with client_of(authority, address) as client:
            client.send(m.OpenJob(job_spec(detached=True)), submission(5))
            await acknowledged(client, 5)
            disk.order("eio")
            client.send(m.SubmitTasks(JOB, 5, FUNCTION, tasks(b"not acknowledged")))
            await client.client.observer.until(lambda: client.client.observer.ends)
            assert max(one.upto for one in client.messages if isinstance(one, m.SubmitOk)) == 5

    async def count(address: tuple[str, int]) -> None:
        async with client_of(authority, address) as client:
            (job,) = (await client.ask(1, "jobs")).jobs or ()
            assert job.tasks in {5, 6}

    with coordinator_process(config, **disk.environ) as failing:
        run(submit(failing.address))
        assert failing.process.wait(10) == 4
        assert "cannot be written" in failing.log.read_text()
        assert "Traceback" not in failing.log.read_text()
    with coordinator_process(config) as again:
        run(count(again.address))


@pytest.mark.slow
def test_while_a_sync_hangs_acknowledgements_wait_heartbeats_do_not_and_health_says_why(
    authority: Authority, tmp_path: Path, run: Run, disk: Disk
) -> None:
    config = config_for(authority, tmp_path)

    async def wait(started: Process) -> None:
        loop = asyncio.get_running_loop()
        async with client_of(authority, started.address) as client, httpx.AsyncClient(base_url=started.url) as web:
            client.send(m.OpenJob(job_spec()))
            await acknowledged(client, 0)
            disk.order("2500")
            begun_s = loop.time()
            client.send(submission(3))
            while "has not answered" not in (await web.get("/healthz")).text:
                client.send(m.Heartbeat(1))
                await client.next(m.HeartbeatAck)
                assert loop.time() < begun_s + 20
                await asyncio.sleep(0.1)
            assert (await web.get("/readyz")).status_code == 200
            assert not [one for one in client.messages if isinstance(one, m.SubmitOk) and one.upto]
            disk.order("")
            await acknowledged(client, 3)
            assert loop.time() > begun_s + 2.4
            assert (await web.get("/healthz")).text == "ok\n"

    with coordinator_process(config, **disk.environ) as started:
        run(wait(started))


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    require_root()
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,mode=0700", "none", str(folder)], timeout=10, check=True)
    yield folder
    subprocess.run(["umount", str(folder)], timeout=10, check=True)


@pytest.mark.slow
def test_a_read_only_folder_is_said_at_the_start(authority: Authority, tmp_path: Path, read_only: Path) -> None:
    with coordinator_starting(config_for(authority, tmp_path)) as started:
        assert started.process.wait(30) == 4
        assert f"the state folder {read_only} cannot be written: read-only file system" in started.log.read_text()


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
def test_without_descriptors_accepts_stop_sessions_live_and_nothing_spins(
    authority: Authority, tmp_path: Path, run: Run
) -> None:
    config = config_for(authority, tmp_path)

    async def exhaust(started: Process) -> None:
        pid = started.process.pid
        async with client_of(authority, started.address) as client:
            client.send(m.OpenJob(job_spec()))
            await acknowledged(client, 0)
            limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            highest = max(map(int, os.listdir(f"/proc/{pid}/fd")))
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 3, limits[1]))
            crowd = [socket.create_connection(started.address, timeout=5) for _ in range(20)]
            try:
                before_s = cpu_s(pid)
                for number in range(10):
                    client.send(m.Heartbeat(number))
                    await client.next(m.HeartbeatAck)
                    await asyncio.sleep(0.1)
                client.send(submission(3))
                await acknowledged(client, 3)
                assert cpu_s(pid) - before_s < 0.5
            finally:
                for one in crowd:
                    one.close()
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
            async with client_of(authority, started.address, incarnation="d" * 16) as late:
                assert (await late.ask(1, "status")).status is not None

    with coordinator_process(config) as started:
        run(exhaust(started))
        assert started.end() == 0
        assert "Traceback" not in started.log.read_text()

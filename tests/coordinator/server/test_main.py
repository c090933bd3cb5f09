"""The real program with its real journal: starts, says so, ends, is killed, comes back, says plainly what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import httpx
import msgspec
import pytest

from coordinator.server.conftest import Run
from herder_coordinator.main import escape
from herder_shared.config import CoordinatorConfig
from herder_shared.wire import messages as m
from support.coordinators import (
    FUNCTION,
    JOB,
    Process,
    agent_of,
    client_of,
    collect_ends,
    config_for,
    coordinator_process,
    ended,
    job_spec,
    run_all,
    start_arguments,
    submission,
    tasks,
)
from support.links import Authority
from support.requirements import unmet


def run_to_end(config: CoordinatorConfig, *more: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*start_arguments(config), *more],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environ},
    )


@pytest.mark.slow
def test_what_was_acknowledged_survives_kill_9(authority: Authority, tmp_path: Path, run: Run) -> None:
    config = config_for(authority, tmp_path)

    async def submit(address: tuple[str, int]) -> None:
        async with client_of(authority, address) as client:
            client.send(m.OpenJob(job_spec(detached=True)), submission(20))
            while (await client.next(m.SubmitOk)).upto < 20:
                pass

    async def fetch(address: tuple[str, int]) -> None:
        async with agent_of(authority, address) as agent, client_of(authority, address) as client:
            assert client.link.epoch == 2
            client.send(m.Attach(JOB, 0))
            await run_all(agent, 20)
            assert len(await collect_ends(client, 20)) == 20

    with coordinator_process(config) as first:
        assert first.hello["epoch"] == 1
        assert first.hello["pid"] == first.process.pid
        run(submit(first.address))
        first.kill()
    config = msgspec.structs.replace(config, listen=first.hello["address"], http_listen=first.hello["http"])
    with coordinator_process(config) as second:
        assert second.hello["epoch"] == 2
        assert second.address == first.address
        run(fetch(second.address))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_good_order(authority: Authority, tmp_path: Path, number: signal.Signals) -> None:
    with coordinator_process(config_for(authority, tmp_path)) as started:
        assert started.end(number) == 0
        assert "Traceback" not in started.log.read_text()


@pytest.mark.slow
def test_a_cut_lifeline_ends_it(authority: Authority, tmp_path: Path) -> None:
    with coordinator_process(config_for(authority, tmp_path)) as started:
        started.cut_lifeline()
        assert started.process.wait(10) == 0


@pytest.mark.slow
def test_a_second_coordinator_on_the_same_folder_is_refused(authority: Authority, tmp_path: Path) -> None:
    config = config_for(authority, tmp_path)
    with coordinator_process(config) as started:
        second = run_to_end(config)
        assert second.returncode == 3
        assert str(started.process.pid) in second.stderr
        assert "Traceback" not in second.stderr


@pytest.mark.slow
def test_a_busy_port_is_said_with_its_number(authority: Authority, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for option in ("listen", "http_listen"):
            config = config_for(authority, tmp_path, **{option: f"127.0.0.1:{port}"})
            ended = run_to_end(config)
            assert (ended.returncode, ended.stdout) == (2, "")
            assert str(port) in ended.stderr
            assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_wrong_configuration_is_one_clear_line(authority: Authority, tmp_path: Path) -> None:
    config = config_for(authority, tmp_path)
    unknown = run_to_end(config, HERDER_COORDINATOR_LISTN="x")
    assert (unknown.returncode, len(unknown.stderr.splitlines())) == (2, 1)
    assert "HERDER_COORDINATOR_LISTEN" in unknown.stderr
    absent = run_to_end(msgspec.structs.replace(config, identity=tmp_path / "nowhere"))
    assert absent.returncode == 2
    assert "nowhere" in absent.stderr
    assert "Traceback" not in absent.stderr


@pytest.mark.slow
def test_a_key_that_others_can_read_is_refused(authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path, authority.cluster)
    config = config_for(other, tmp_path)
    (config.identity / "key.pem").chmod(0o644)
    ended = run_to_end(config)
    assert ended.returncode == 2
    assert "key.pem" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_it_serves_metrics_and_listens_on_loopback_only(authority: Authority, tmp_path: Path) -> None:
    with coordinator_process(config_for(authority, tmp_path)) as started:
        metrics = httpx.get(f"{started.url}/metrics").text
        assert "herder_build_info" in metrics
        assert re.search(r"^process_resident_memory_bytes ", metrics, re.MULTILINE)
        status = json.loads(httpx.get(f"{started.url}/api/v1/status").text)
        assert status["epoch"] == 1
        ports = {started.address[1], int(started.hello["http"].rpartition(":")[2])}
        table = Path(f"/proc/{started.process.pid}/net/tcp").read_text().splitlines()[1:]
        listening = [line.split()[1] for line in table if line.split()[3] == "0A"]
        ours = [address for address in listening if int(address.partition(":")[2], 16) in ports]
        assert len(ours) == 2
        assert all(address.startswith("0100007F") for address in ours)


def test_a_hardened_process_cannot_unpickle() -> None:
    gadget = pickle.dumps(os.getcwd)
    code = f"import pickle; from herder_coordinator.main import harden; harden(); pickle.loads({gadget!r})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode != 0
    assert "never unpickles" in ended.stderr


def test_a_hardened_process_may_have_as_many_descriptors_as_the_system_lets() -> None:
    code = (
        "from resource import RLIMIT_NOFILE as N, getrlimit, setrlimit; from herder_coordinator.main import harden;"
        "hard = getrlimit(N)[1]; setrlimit(N, (64, hard)); harden(); assert getrlimit(N) == (hard, hard)"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def test_log_text_cannot_fake_a_line() -> None:
    assert escape("a\nb\x1b[31m\u202e") == "a\\nb\\x1b[31m\\u202e"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], None]]:
    """`state` on a disk of its own; called with MiB, it makes that the disk's size."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "none", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, timeout=10, check=False).returncode != 0:
        unmet("a full disk needs root, to mount a small one")

    def resize(size_mib: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size_mib}m", str(folder)], timeout=10, check=True)

    yield resize
    subprocess.run(["umount", str(folder)], timeout=10, check=True)


@pytest.mark.slow
def test_on_a_full_disk_what_runs_ends_and_what_is_new_waits_for_room(
    authority: Authority, tmp_path: Path, run: Run, small_disk: Callable[[int], None]
) -> None:
    small_disk(6)
    config = config_for(authority, tmp_path)

    async def fill(started: Process) -> None:
        async with (
            agent_of(authority, started.address) as agent,
            client_of(authority, started.address) as client,
            httpx.AsyncClient(base_url=started.url) as web,
        ):
            client.send(m.OpenJob(job_spec()), submission(2))
            order = await agent.next(m.StartAttempts)
            running = list(order.attempts)
            while len(running) < 2:
                running += (await agent.next(m.StartAttempts)).attempts
            first = 2
            while not any(isinstance(one, m.SubmitRefused) for one in client.messages):
                client.send(m.SubmitTasks(JOB, first, FUNCTION, tasks(bytes(50_000))))
                await client.ask(first, "status")
                first += 1
                assert first < 500
            refused = await client.next(m.SubmitRefused)
            assert (refused.error, refused.again) == ("Unreachable", True)
            assert "KiB are left on the disk" in refused.message
            assert "KiB are left" in (await web.get("/healthz")).text
            # What runs ends, and is told.
            agent.send(m.AttemptsEnded(tuple(map(ended, running))))
            assert len((await client.next(m.TasksEnded)).ends) >= 1
            small_disk(40)
            upto = 0
            while upto < refused.first + 1:
                client.send(m.SubmitTasks(JOB, refused.first, FUNCTION, tasks(bytes(50_000))))
                await client.ask(1_000 + first, "status")
                first += 1
                oks = [one.upto for one in client.messages if isinstance(one, m.SubmitOk)]
                upto = max(oks)

    with coordinator_process(config) as started:
        run(fill(started))
        assert started.end() == 0
        assert "Traceback" not in started.log.read_text()


@pytest.mark.slow
def test_no_room_at_the_start_is_said_with_the_cure(
    authority: Authority, tmp_path: Path, small_disk: Callable[[int], None]
) -> None:
    config = config_for(authority, tmp_path)
    (config.state_dir / "something").write_bytes(bytes(2 * 1024 * 1024 - 8192))
    full = run_to_end(config)
    assert full.returncode == 4
    assert "no space left" in full.stderr
    assert "make room on that disk" in full.stderr
    assert "Traceback" not in full.stderr


@pytest.mark.slow
def test_a_damaged_journal_is_refused_and_repaired_only_when_asked(
    authority: Authority, tmp_path: Path, run: Run
) -> None:
    config = config_for(authority, tmp_path)

    async def submit(address: tuple[str, int]) -> None:
        async with client_of(authority, address) as client:
            client.send(m.OpenJob(job_spec(detached=True)))
            for number in range(4):
                client.send(submission(5, first=5 * number))
                while (await client.next(m.SubmitOk)).upto < 5 * number + 5:
                    pass

    async def count(address: tuple[str, int]) -> None:
        async with client_of(authority, address) as client:
            (job,) = (await client.ask(1, "jobs")).jobs or ()
            assert job.tasks == 10

    with coordinator_process(config) as started:
        run(submit(started.address))
        assert started.end() == 0
    database = apsw.Connection(str(config.state_dir / "journal.sqlite"))
    third = "SELECT seq FROM batches ORDER BY seq DESC LIMIT 1 OFFSET 1"
    database.execute(f"UPDATE batches SET content = zeroblob(40) WHERE seq = ({third})")
    database.close()
    refused = run_to_end(config)
    assert refused.returncode == 4
    assert "is damaged at batch" in refused.stderr
    assert "--repair" in refused.stderr
    repaired = run_to_end(config, "--repair")
    assert repaired.returncode == 0, repaired.stderr
    assert f"job {JOB}: 5 tasks as submitted, 0 ends: submit these again" in repaired.stdout
    assert (config.state_dir / "journal.repaired-2").read_text() in repaired.stdout
    with coordinator_process(config) as again:
        run(count(again.address))
    whole = run_to_end(config, "--repair")
    assert (whole.returncode, whole.stdout) == (0, "nothing is damaged, and nothing was dropped\n")

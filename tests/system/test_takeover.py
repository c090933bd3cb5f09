"""A whole cluster whose coordinator dies: another one takes over, and client, agent and running tasks go on."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import pytest

import herder
from herder_shared import tls
from herder_shared.config import CoordinatorConfig, Profile, create_profile
from support.coordinators import coordinator_process, coordinator_starting
from support.leaks import wait_until
from support.links import free_address
from support.postgres import Postgres

cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def agent_process(profile: Profile, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """It is told of both addresses, and ends with us."""
    tls.issue(profile.authority, folder / "identity", "agent", "n1")
    life_read, life_write = os.pipe()
    arguments = ["--identity", str(folder / "identity"), "--state-dir", str(folder / "state"), "--node", "n1"]
    arguments += [part for address in profile.addresses for part in ("--coordinator", address)]
    arguments += ["--cores", "4", "--no-pin", "--lifeline-fd", str(life_read)]
    with (folder / "agent.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "herder_agent", *arguments],
            pass_fds=(life_read,),
            stdin=subprocess.DEVNULL,
            stderr=log,
        )
    os.close(life_read)
    try:
        yield process
    finally:
        os.close(life_write)
        process.wait(20)


def mark(folder: str, number: int, bulk: bytes, gate: str) -> tuple[int, int]:
    """Say that this attempt runs; go on until the gate is there."""
    descriptor = os.open(f"{folder}/ran-{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, b"x")
    os.close(descriptor)
    deadline_s = time.monotonic() + 60
    while not os.path.exists(gate) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return number, len(bulk)


@pytest.mark.slow
@pytest.mark.timeout(110)
def test_tasks_run_on_while_another_coordinator_takes_over(tmp_path: Path, postgres: Postgres) -> None:
    addresses = (free_address(), free_address())
    profile = create_profile("pair", addresses, environ={"HERDER_PROFILES": str(tmp_path / "profiles")})
    database, gate = postgres.new_database(), tmp_path / "gate"

    def config(number: int) -> CoordinatorConfig:
        state_dir = tmp_path / f"coordinator-{number}" / "state"
        state_dir.mkdir(mode=0o700, parents=True)
        return CoordinatorConfig(
            identity=profile.coordinator,
            state_dir=state_dir,
            store=database,
            blob_dir=tmp_path / "blobs",
            listen=addresses[number],
            http_listen="127.0.0.1:0",
        )

    with (
        coordinator_process(config(0)) as first,
        coordinator_starting(config(1)) as second,
        agent_process(profile, tmp_path),
        herder.Client(profile=profile) as client,
    ):
        view = client.options(idempotent=False)
        bulk = bytes(200_000)
        running = [view.submit(mark, str(tmp_path), number, bulk, str(gate)) for number in range(4)]
        assert wait_until(lambda: len(list(tmp_path.glob("ran-*"))) == 4, 40), [f for f in running if f.done()]
        waiting = [view.submit(mark, str(tmp_path), number, bulk, str(gate)) for number in range(4, 8)]
        assert client.status().epoch == 1
        first.kill()
        second.await_hello()
        gate.touch()
        results = [future.result(60) for future in (*running, *waiting)]
        assert results == [(number, len(bulk)) for number in range(8)]
        assert client.status().epoch == 2
    assert [(tmp_path / f"ran-{number}").read_bytes() for number in range(8)] == [b"x"] * 8

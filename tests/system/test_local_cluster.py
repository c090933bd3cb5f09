"""LocalCluster: comes up, serves, survives the death of each of its processes, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import cloudpickle
import pytest

import herder
from support.leaks import wait_until

# The nodes cannot import the tests' modules, which lean on pytest's path: their functions travel by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.slow


def square(x: int) -> int:
    return x * x


def note_and_wait(log: str, gate: str) -> str:
    """Leaves a line for each time that it is run, then waits for the gate."""
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")
    deadline_s = time.monotonic() + 60
    while not os.path.exists(gate):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return "done"


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_cluster_comes_up_works_and_leaves_nothing() -> None:
    with herder.LocalCluster(cores=2) as cluster, cluster.client() as client:
        assert list(client.map(square, range(5))) == [0, 1, 4, 9, 16]
        assert [node.facts.cores for node in client.nodes()] == [2]
        assert cluster.http.startswith("http://127.0.0.1:")
        folder = cluster.state_dir
        assert folder.stat().st_mode & 0o077 == 0
    assert not folder.exists()


def test_cores_are_split_over_the_agents() -> None:
    with herder.LocalCluster(cores=5, agents=2, memory="2GiB") as cluster, cluster.client() as client:
        facts = {node.facts.node: node.facts for node in client.nodes()}
        assert sorted(each.cores for each in facts.values()) == [2, 3]
        assert all(each.memory_bytes == 2**30 for each in facts.values())


def test_wrong_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="cores"):
        herder.LocalCluster(cores=0)
    with pytest.raises(ValueError, match="agents"):
        herder.LocalCluster(cores=1, agents=2)
    with pytest.raises(TypeError, match="agents"):
        herder.LocalCluster(agents=1.5)  # type: ignore[arg-type]


def test_closing_with_work_left_cancels_it(tmp_path: Path) -> None:
    cluster = herder.LocalCluster(cores=1)
    client = cluster.client()
    log = tmp_path / "log"
    future = client.submit(note_and_wait, str(log), str(tmp_path / "never"))
    assert wait_until(lambda: bool(lines_of(log)), 30)
    cluster.close()
    assert future.cancelled()
    pid = int(lines_of(log)[0])
    assert wait_until(lambda: not os.path.exists(f"/proc/{pid}"), 10)
    with pytest.raises(RuntimeError, match="after shutdown"):
        client.submit(square, 1)
    cluster.close()


def test_process_that_cannot_start_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "coordinator").write_text("not a folder")
    with pytest.raises(herder.HerderError, match=r"coordinator of the local cluster ended") as caught:
        herder.LocalCluster(cores=1, state_dir=tmp_path)
    assert "log" in str(caught.value)


def test_cluster_ends_with_the_process_that_made_it(tmp_path: Path) -> None:
    script = """
        import herder, os, signal
        cluster = herder.LocalCluster(cores=1, state_dir="state")
        client = cluster.client()
        assert client.submit(abs, -1).result(30) == 1
        print(*(process.pid for process in cluster.processes.values()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    assert wait_until(lambda: not any(_is_alive(pid) for pid in pids), 20)


def test_cluster_that_is_never_closed_ends_with_the_interpreter() -> None:
    script = """
        import herder
        cluster = herder.LocalCluster(cores=1)
        client = cluster.client()
        future = client.submit(abs, -1)
        print(*(process.pid for process in cluster.processes.values()), cluster.state_dir)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    *pids, folder = done.stdout.split()
    assert done.stderr == ""
    assert not any(_is_alive(int(pid)) for pid in pids)
    assert not Path(folder).exists()


def test_killed_coordinator_comes_back_and_nothing_runs_twice(tmp_path: Path) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    with herder.LocalCluster(cores=2) as cluster, cluster.client() as client:
        running = client.submit(note_and_wait, str(log), str(gate))
        waiting = [client.submit(square, i) for i in range(20)]
        dependant = client.submit(str, running)
        assert wait_until(lambda: bool(lines_of(log)), 30)
        cluster.processes["coordinator"].popen.send_signal(signal.SIGKILL)
        submitted_meanwhile = client.submit(square, 9)
        cluster.restart("coordinator")
        gate.touch()
        assert running.result(60) == "done"
        assert [each.result(60) for each in waiting] == [i * i for i in range(20)]
        assert dependant.result(60) == "done"
        assert submitted_meanwhile.result(60) == 81
        assert len(lines_of(log)) == 1


def test_killed_agent_loses_no_task(tmp_path: Path) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    with herder.LocalCluster(cores=2, agents=2) as cluster, cluster.client() as client:
        futures = [client.submit(note_and_wait, str(log), str(gate)) for _ in range(2)]
        assert wait_until(lambda: len(lines_of(log)) == 2, 30)
        cluster.processes["local-1"].popen.send_signal(signal.SIGKILL)
        gate.touch()
        assert [each.result(90) for each in futures] == ["done", "done"]


def test_killed_child_is_noticed_by_its_task_only(tmp_path: Path) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    with herder.LocalCluster(cores=2) as cluster, cluster.client(idempotent=False) as client:
        future = client.submit(note_and_wait, str(log), str(gate))
        assert wait_until(lambda: bool(lines_of(log)), 30)
        os.kill(int(lines_of(log)[0]), signal.SIGKILL)
        with pytest.raises(herder.TaskError):
            future.result(30)
        assert client.submit(square, 3).result(30) == 9


def test_other_programs_reach_it_by_its_profile() -> None:
    with herder.LocalCluster(cores=1) as cluster:
        done = subprocess.run(
            [sys.executable, "-c", "import herder; print(herder.Client().submit(abs, -7).result(30))"],
            env={**os.environ, **cluster.environ},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert done.stdout == "7\n"


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

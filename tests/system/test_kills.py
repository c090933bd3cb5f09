"""kill -9 in the middle of a job: a child, a template, an agent, the coordinator. Real processes all.

Every attempt writes one line into a folder of its own when its code starts, so that what ran, and how often, is known
from outside the product.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path

import cloudpickle
import pytest

import herder
from herder.local import LocalCluster

WAIT_S = 60.0
# The children cannot import the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def _run(folder: str, name: str, gate: str) -> str:
    """Say that an attempt of `name` runs, then wait until the file `gate` is there."""
    with (Path(folder) / f"ran-{name}").open("a") as file:
        file.write(f"{os.getpid()} {os.getppid()}\n")
    deadline_s = time.monotonic() + WAIT_S
    while not Path(gate).exists():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{gate} was not opened")
        time.sleep(0.01)
    return name


def _ran(folder: Path, name: str) -> list[tuple[int, int]]:
    """The (pid, parent) of each attempt of `name` which has started."""
    try:
        lines = (folder / f"ran-{name}").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [(int(pid), int(parent)) for pid, parent in (line.split() for line in lines)]


def _until(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {WAIT_S:g} s for: {what}"
        time.sleep(0.01)


def _is_gone(pid: int) -> bool:
    """Ended; perhaps not yet reaped by whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(cores=4, agents=2) as running:
        yield running


def test_killed_child_is_noticed_by_its_own_task_only(cluster: LocalCluster, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with cluster.client(idempotent=False) as client:
        futures = {name: client.submit(_run, str(tmp_path), name, str(gate)) for name in "abcd"}
        _until(lambda: all(_ran(tmp_path, name) for name in "abcd"), "four running tasks")
        os.kill(_ran(tmp_path, "b")[0][0], signal.SIGKILL)
        with pytest.raises(herder.TaskCrashed) as crash:
            futures["b"].result(WAIT_S)
        assert crash.value.signal == signal.SIGKILL
        gate.touch()
        assert {name: futures[name].result(WAIT_S) for name in "acd"} == {"a": "a", "c": "c", "d": "d"}
    assert {name: len(_ran(tmp_path, name)) for name in "abcd"} == dict.fromkeys("abcd", 1)


def test_killed_forked_child_of_an_idempotent_task_runs_once_more_in_a_fresh_interpreter(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    with cluster.client() as client:
        future = client.submit(_run, str(tmp_path), "a", str(gate))
        _until(lambda: _ran(tmp_path, "a"), "the task to run")
        os.kill(_ran(tmp_path, "a")[0][0], signal.SIGKILL)
        gate.touch()
        assert future.result(WAIT_S) == "a"
        assert future.usage(WAIT_S).start_method == "fresh"
    assert len(_ran(tmp_path, "a")) == 2


def test_killed_template_is_rebuilt_and_its_tasks_run_again(cluster: LocalCluster, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with cluster.client() as client:
        futures = {name: client.submit(_run, str(tmp_path), name, str(gate)) for name in "abcd"}
        _until(lambda: all(_ran(tmp_path, name) for name in "abcd"), "four running tasks")
        pid, template = _ran(tmp_path, "a")[0]
        victims = {name for name in "abcd" if _ran(tmp_path, name)[0][1] == template}
        os.kill(template, signal.SIGKILL)
        _until(lambda: _is_gone(pid), "the template's children to go with it")
        _until(lambda: all(len(_ran(tmp_path, name)) == 2 for name in victims), "the lost attempts to run again")
        gate.touch()
        assert sorted(future.result(WAIT_S) for future in futures.values()) == list("abcd")
    counts = {name: len(_ran(tmp_path, name)) for name in "abcd"}
    assert counts == {name: 2 if name in victims else 1 for name in "abcd"}


def test_killed_agent_loses_its_children_and_its_tasks_run_elsewhere(cluster: LocalCluster, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with cluster.client() as client:
        futures = {name: client.submit(_run, str(tmp_path), name, str(gate)) for name in "abcd"}
        _until(lambda: all(_ran(tmp_path, name) for name in "abcd"), "four running tasks")
        survivor, victim = (name for name in cluster.processes if name != "coordinator")
        pids = {name: _ran(tmp_path, name)[0][0] for name in "abcd"}
        cluster.processes[victim].popen.kill()
        _until(lambda: sum(map(_is_gone, pids.values())) == 2, "the agent's children to go with it")
        gate.touch()
        assert sorted(future.result(WAIT_S) for future in futures.values()) == list("abcd")
        assert {future.usage(WAIT_S).node for future in futures.values()} == {survivor}
    assert Counter(len(_ran(tmp_path, name)) for name in "abcd") == {1: 2, 2: 2}


def test_tasks_that_must_run_at_most_once_are_lost_with_their_agent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HERDER_COORDINATOR_LEASE_S", "8")  # waited out, as the agent does not come back
    gate = tmp_path / "gate"
    with LocalCluster(cores=4, agents=2) as cluster, cluster.client(idempotent=False) as client:
        futures = {name: client.submit(_run, str(tmp_path), name, str(gate)) for name in "abcd"}
        _until(lambda: all(_ran(tmp_path, name) for name in "abcd"), "four running tasks")
        victim = next(name for name in cluster.processes if name != "coordinator")
        pids = {name: _ran(tmp_path, name)[0][0] for name in "abcd"}
        cluster.processes[victim].popen.kill()
        _until(lambda: sum(map(_is_gone, pids.values())) == 2, "the agent's children to go with it")
        gate.touch()
        done, pending = wait(futures.values(), WAIT_S)
        assert not pending
        ends = Counter(type(future.exception()).__name__ for future in done)
    assert ends == {"NoneType": 2, "NodeLost": 2}
    assert Counter(len(_ran(tmp_path, name)) for name in "abcd") == {1: 4}


@pytest.mark.parametrize("idempotent", [True, False])
def test_killed_coordinator_comes_back_and_every_task_ends_once(
    cluster: LocalCluster, tmp_path: Path, idempotent: bool
) -> None:
    gate = tmp_path / "gate"
    names = [f"t{n:03d}" for n in range(100)]
    with cluster.client(idempotent=idempotent) as client:
        running = {name: client.submit(_run, str(tmp_path), name, str(gate)) for name in names[:4]}
        _until(lambda: all(_ran(tmp_path, name) for name in names[:4]), "four running tasks")
        queued = {name: client.submit(_run, str(tmp_path), name, str(gate)) for name in names[4:]}
        _until(
            lambda: len(client.jobs()) >= 1 and sum(job.tasks for job in client.jobs()) == len(names), "the submission"
        )
        cluster.processes["coordinator"].popen.kill()
        gate.touch()  # the four end while nobody listens
        cluster.restart("coordinator")
        results = sorted(future.result(WAIT_S) for future in [*running.values(), *queued.values()])
        assert results == names
        assert client.status().epoch == 2
    counts = {name: len(_ran(tmp_path, name)) for name in names}
    assert {name for name in names[:4] if counts[name] != 1} == set(), "a running task was run again"
    assert {name for name in names if counts[name] != 1} == set()


def test_coordinator_killed_again_and_again_under_load_loses_and_doubles_nothing(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    names = [f"t{n:03d}" for n in range(100)]
    with cluster.client(idempotent=False) as client:
        futures = []
        for n, name in enumerate(names):
            futures.append(client.submit(_run, str(tmp_path), name, str(gate)))
            if n % 30 == 25:
                _until(futures[-20].done, "some progress")
                cluster.processes["coordinator"].popen.kill()
                cluster.restart("coordinator")
        assert sorted(future.result(WAIT_S) for future in futures) == names
        assert client.status().epoch == 4
    assert {name: len(_ran(tmp_path, name)) for name in names} == dict.fromkeys(names, 1)

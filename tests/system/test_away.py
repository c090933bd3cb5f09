"""Agents that are away: stopped, cut off, killed by their tasks. Real processes, a lease of two seconds."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cloudpickle
import pytest

import herder
from herder.local import LocalCluster, Process
from herder_shared.states import AgentState
from support.proxy import Proxy

pytestmark = pytest.mark.slow

LEASE_S = 2.0
WAIT_S = 60.0
# The children cannot import the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def hold(folder: str, name: str, gate: str) -> str:
    """Say that an attempt runs, and where; wait for the file `gate`."""
    with (Path(folder) / f"ran-{name}").open("a") as file:
        file.write(f"{os.getpid()} {herder.task().node}\n")
    deadline_s = time.monotonic() + WAIT_S
    while not Path(gate).exists():
        if time.monotonic() > deadline_s:
            raise TimeoutError(gate)
        time.sleep(0.01)
    return name


def ran(folder: Path, name: str) -> list[tuple[int, str]]:
    """`(pid, node)` of each attempt that began."""
    try:
        lines = (folder / f"ran-{name}").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [(int(pid), node) for pid, node in (line.split() for line in lines)]


def until(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {WAIT_S:g} s for: {what}"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def states(client: herder.Client) -> dict[str, AgentState]:
    return {str(node.facts.node): node.state for node in client.nodes()}


def agents(cluster: LocalCluster) -> list[Process]:
    return [process for name, process in cluster.processes.items() if name != "coordinator"]


@pytest.fixture(scope="module", autouse=True)
def _short_lease() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HERDER_COORDINATOR_LEASE_S", str(LEASE_S))
        patch.setenv("HERDER_COORDINATOR_HEARTBEAT_S", "0.3")
        yield


@pytest.fixture
def behind_proxy() -> Iterator[tuple[LocalCluster, Proxy]]:
    """One agent, whose way to the coordinator can be cut."""
    with LocalCluster(cores=2) as cluster:
        host, _, port = cluster.address.rpartition(":")
        with Proxy((host, int(port))) as proxy:
            agent = agents(cluster)[0]
            agent.popen.kill()
            agent.arguments = tuple(proxy.address if each == cluster.address else each for each in agent.arguments)
            cluster.restart(agent.name)
            yield cluster, proxy


def test_a_stopped_agents_tasks_run_elsewhere_and_it_drops_them_when_it_goes_on(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with LocalCluster(cores=2, agents=2) as cluster, cluster.client() as client:
        future = client.submit(hold, str(tmp_path), "a", str(gate))
        until(lambda: ran(tmp_path, "a"), "the task to run")
        first, node = ran(tmp_path, "a")[0]
        stopped = cluster.processes[node]
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            until(lambda: len(ran(tmp_path, "a")) == 2, "it to run elsewhere")
            assert states(client)[node] is AgentState.LOST
        finally:
            os.kill(stopped.pid, signal.SIGCONT)
        until(lambda: is_gone(first), "the attempt that was given up to be killed")
        until(lambda: states(client)[node] is AgentState.READY, "the agent to be back")
        assert not is_gone(ran(tmp_path, "a")[1][0])
        gate.touch()
        assert future.result(WAIT_S) == "a"
    assert len(ran(tmp_path, "a")) == 2


def test_a_cut_shorter_than_the_lease_changes_nothing(behind_proxy: tuple[LocalCluster, Proxy], tmp_path: Path) -> None:
    cluster, proxy = behind_proxy
    gate = tmp_path / "gate"
    with cluster.client() as client:
        future = client.submit(hold, str(tmp_path), "a", str(gate))
        until(lambda: ran(tmp_path, "a"), "the task to run")
        proxy.cut()
        time.sleep(LEASE_S / 3)
        gate.touch()
        proxy.heal()
        assert future.result(WAIT_S) == "a"
        assert client.status().agents[AgentState.READY] == 1
    assert len(ran(tmp_path, "a")) == 1


def test_tasks_that_end_in_a_cut_of_two_leases_have_one_end(
    behind_proxy: tuple[LocalCluster, Proxy], tmp_path: Path
) -> None:
    cluster, proxy = behind_proxy
    gate = tmp_path / "gate"
    ends: list[object] = []
    with cluster.client() as client:
        again = client.submit(hold, str(tmp_path), "again", str(gate))
        once = client.options(idempotent=False).submit(hold, str(tmp_path), "once", str(gate))
        for future in (again, once):
            future.add_done_callback(ends.append)
        until(lambda: ran(tmp_path, "again") and ran(tmp_path, "once"), "the tasks to run")
        proxy.cut()
        gate.touch()
        until(lambda: states(client) == {"local-1": AgentState.LOST}, "the agent to be given up")
        time.sleep(LEASE_S)
        proxy.heal()
        # The result that was made in the cut is as good as another; but what may run once was lost for good by then.
        assert again.result(WAIT_S) == "again"
        with pytest.raises(herder.NodeLost, match="may not run twice"):
            once.result(WAIT_S)
        until(lambda: states(client) == {"local-1": AgentState.READY}, "the agent to be back")
        assert client.submit(os.getpid).result(WAIT_S)
    assert len(ends) == 2
    assert (len(ran(tmp_path, "again")), len(ran(tmp_path, "once"))) == (1, 1)


def kill_agent(folder: str) -> None:
    with (Path(folder) / "killed").open("a") as file:
        file.write(f"{herder.task().node}\n")
    template = os.getppid()
    agent = int(Path(f"/proc/{template}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(agent, signal.SIGKILL)
    time.sleep(WAIT_S)


def test_a_task_that_kills_its_agents_is_found_out_and_its_neighbours_are_not_blamed(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with LocalCluster(cores=6, agents=3) as cluster, cluster.client(max_crashes=0) as client:
        neighbours = [client.submit(hold, str(tmp_path), name, str(gate)) for name in "abc"]
        until(lambda: all(ran(tmp_path, name) for name in "abc"), "the neighbours to run")
        culprit = client.submit(kill_agent, str(tmp_path))
        with pytest.raises(herder.NodeLost, match="max_crashes is 0"):
            culprit.result(WAIT_S)
        gate.touch()
        assert [future.result(WAIT_S) for future in neighbours] == ["a", "b", "c"]
    assert len((tmp_path / "killed").read_text().split()) == 2


def suicide(way: str) -> None:
    if way == "template":
        os.kill(os.getppid(), signal.SIGKILL)
    else:
        os.killpg(0, signal.SIGKILL)
    time.sleep(WAIT_S)


def test_a_task_that_kills_its_template_or_its_group_harms_nobody_for_long(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with LocalCluster(cores=3) as cluster, cluster.client(max_crashes=5) as client:
        neighbour = client.submit(hold, str(tmp_path), "a", str(gate))
        until(lambda: ran(tmp_path, "a"), "the neighbour to run")
        with pytest.raises(herder.TaskCrashed):
            client.options(idempotent=False).submit(suicide, "group").result(WAIT_S)
        assert len(ran(tmp_path, "a")) == 1
        with pytest.raises(herder.NodeLost, match="template"):
            client.options(idempotent=False).submit(suicide, "template").result(WAIT_S)
        until(lambda: len(ran(tmp_path, "a")) == 2, "the neighbour to run again")
        gate.touch()
        assert neighbour.result(WAIT_S) == "a"


def listening(pids: set[int]) -> dict[str, int]:
    """Addresses at which these processes listen, as the kernel writes them, with one of the processes."""
    inodes: dict[str, int] = {}
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = str(fd.readlink())
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes[target[8:-1]] = pid
    found = {}
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if (fields[3] == "0A" or table.startswith("udp")) and fields[9] in inodes:
                found[fields[1]] = inodes[fields[9]]
    return found


def below(pid: int) -> set[int]:
    found = {pid}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found |= below(child)
    return found


def test_no_process_listens_beyond_loopback(behind_proxy: tuple[LocalCluster, Proxy], tmp_path: Path) -> None:
    cluster, _ = behind_proxy
    gate = tmp_path / "gate"
    with cluster.client() as client:
        future = client.submit(hold, str(tmp_path), "a", str(gate))
        until(lambda: ran(tmp_path, "a"), "the task to run")
        pids = set().union(*(below(process.pid) for process in cluster.processes.values()))
        found = listening(pids)
        gate.touch()
        future.result(WAIT_S)
        coordinator = cluster.processes["coordinator"].pid
    assert ran(tmp_path, "a")[0][0] in pids
    assert len(found) == 2
    assert {address.partition(":")[0] for address in found} == {"0100007F"}
    assert set(found.values()) == {coordinator}

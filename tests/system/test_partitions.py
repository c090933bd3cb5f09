"""Links that fail as the kernel's do: down, deaf one way or both, flapping, losing packets. Real processes in networks
of their own, a lease of two seconds."""

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
from herder_shared.states import AgentState
from support.cables import Cables, StretchedCluster

pytestmark = [pytest.mark.netlab, pytest.mark.slow]

LEASE_S = 2.0
HEARTBEAT_S = 0.3
WAIT_S = 60.0
NODES = ("local-1", "local-2", "local-3", "local-4")
# The children cannot import the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def hold(folder: str, name: str) -> str:
    """Say that an attempt runs; wait for the file `gate`."""
    with (Path(folder) / f"ran-{name}").open("a") as file:
        file.write(f"{os.getpid()} {herder.task().node}\n")
    deadline_s = time.monotonic() + WAIT_S
    while not (Path(folder) / "gate").exists():
        if time.monotonic() > deadline_s:
            raise TimeoutError(name)
        time.sleep(0.01)
    return name


def fill(folder: str, name: str, size_bytes: int) -> bytes:
    with (Path(folder) / f"ran-{name}").open("a") as file:
        file.write(f"{os.getpid()} {herder.task().node}\n")
    return name.encode() * (size_bytes // len(name))


def ran(folder: Path, name: str) -> list[str]:
    """The node of each attempt that began."""
    try:
        return [line.split()[1] for line in (folder / f"ran-{name}").read_text().splitlines()]
    except FileNotFoundError:
        return []


def until(condition: Callable[[], object], what: str) -> float:
    """When it came true."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {WAIT_S:g} s for: {what}"
        time.sleep(0.01)
    return time.monotonic()


def states(client: herder.Client) -> dict[str, AgentState]:
    return {str(node.facts.node): node.state for node in client.nodes()}


@pytest.fixture
def cluster() -> Iterator[tuple[herder.LocalCluster, Cables]]:
    """A coordinator, and four agents with two cores each, at the ends of four cables."""
    with pytest.MonkeyPatch.context() as patch, Cables(len(NODES)) as cables:
        patch.setenv("HERDER_COORDINATOR_LEASE_S", str(LEASE_S))
        patch.setenv("HERDER_COORDINATOR_HEARTBEAT_S", str(HEARTBEAT_S))
        with cables.at(None), StretchedCluster(cables, cores=2 * len(NODES), agents=len(NODES)) as cluster:
            yield cluster, cables


@pytest.fixture
def client(cluster: tuple[herder.LocalCluster, Cables]) -> Iterator[herder.Client]:
    with cluster[0].client() as client:
        yield client


def test_links_that_fail_for_less_than_the_lease_change_nothing(
    cluster: tuple[herder.LocalCluster, Cables], client: herder.Client, tmp_path: Path
) -> None:
    _, cables = cluster
    futures = [client.options(nodes=node, idempotent=False).submit(hold, str(tmp_path), node) for node in NODES]
    until(lambda: all(ran(tmp_path, node) for node in NODES), "the tasks to run")
    cables.plug(0, connected=False)
    cables.drop(1)
    cables.drop(2, "to the coordinator")
    cables.drop(3, "to the agent")
    (tmp_path / "gate").touch()
    time.sleep(LEASE_S / 4)
    for n in range(len(NODES)):
        cables.mend(n)
    assert [future.result(WAIT_S) for future in futures] == list(NODES)
    assert set(states(client).values()) == {AgentState.READY}
    assert [ran(tmp_path, node) for node in NODES] == [[node] for node in NODES]


def test_silence_beyond_the_lease_is_noticed_and_every_task_has_one_end(
    cluster: tuple[herder.LocalCluster, Cables], client: herder.Client, tmp_path: Path
) -> None:
    """One node loses its power and three their links: both ways, and one way each. Their tasks end meanwhile."""
    running, cables = cluster
    ends: list[object] = []
    again = [client.options(nodes=node).submit(hold, str(tmp_path), node) for node in NODES]
    once = [client.options(nodes=node, idempotent=False).submit(hold, str(tmp_path), f"once-{node}") for node in NODES]
    for future in (*again, *once):
        future.add_done_callback(ends.append)
    until(lambda: all(ran(tmp_path, node) and ran(tmp_path, f"once-{node}") for node in NODES), "the tasks to run")
    start_s = time.monotonic()
    cables.plug(0, connected=False)
    os.kill(running.processes[NODES[0]].pid, signal.SIGKILL)  # no FIN leaves the host
    cables.drop(1)
    cables.drop(2, "to the coordinator")
    cables.drop(3, "to the agent")
    (tmp_path / "gate").touch()
    noticed_s = until(lambda: set(states(client).values()) == {AgentState.LOST}, "all to be given up") - start_s
    # A lease of the last that was answered, a heartbeat, and a second until the links are looked through; twice that,
    # as the machine is shared.
    assert noticed_s < 2 * (LEASE_S + HEARTBEAT_S + 1.0)
    time.sleep(max(0.0, 3 * LEASE_S - noticed_s))
    assert not any(future.done() for future in again[:3])
    for n in range(len(NODES)):
        cables.mend(n)
    running.restart(NODES[0])
    # What ended in the cut is as good as another end; what died with its node runs again.
    assert [future.result(WAIT_S) for future in again] == list(NODES)
    assert [len(ran(tmp_path, node)) for node in NODES[:3]] == [2, 1, 1]
    # What may run once was lost for good, where its end could not be told before the lease was over.
    for future in once[:3]:
        with pytest.raises(herder.NodeLost, match="may not run twice"):
            future.result(WAIT_S)
    assert once[3].result(WAIT_S) == f"once-{NODES[3]}"
    assert [len(ran(tmp_path, f"once-{node}")) for node in NODES] == [1, 1, 1, 1]
    assert len(ends) == 2 * len(NODES)
    until(lambda: set(states(client).values()) == {AgentState.READY}, "all agents to be back")


def test_links_that_flap_throttle_and_lose_packets_cost_no_task_and_double_none(
    cluster: tuple[herder.LocalCluster, Cables], client: herder.Client, tmp_path: Path
) -> None:
    _, cables = cluster
    cables.drop(1, "both", percent=15)
    cables.throttle(1, "8mbit")
    cables.drop(2, "to the coordinator", percent=20)
    cables.drop(3, "to the agent", percent=20)
    count, size_bytes = 5, 70_000  # beyond what travels inside a message
    futures = {}
    for n in range(count):
        for node in NODES:
            name = f"{node}-{n}"
            futures[name] = client.options(nodes=node).submit(fill, str(tmp_path), name, size_bytes)
    for _ in range(3):
        cables.plug(0, connected=False)
        time.sleep(0.5)
        cables.plug(0, connected=True)
        time.sleep(0.5)
    results = {name: future.result(WAIT_S) for name, future in futures.items()}
    assert results == {name: name.encode() * (size_bytes // len(name)) for name in futures}

"""`herder up`, work, repair and `herder down` on three hosts with real sshd, own host keys and own addresses.

The launcher and the client are on a fourth host, the desk.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.leaks import wait_until
from support.netlab import HostSpec, Lab, public_key

pytestmark = [pytest.mark.netlab, pytest.mark.slow, pytest.mark.timeout(240)]

HERDER = str(Path(sys.executable).with_name("herder"))
NODES = ("n1", "n2", "n3")
ALL = "n1,n2,n3"

#: Runs on the desk: a job whose tasks say where they ran. Each waits a little, so that one node cannot take them all.
_JOB = """
import socket, time
import herder

def where(n):
    time.sleep(0.05)
    return socket.gethostname()

with herder.Client() as client:
    print(*sorted(set(client.map(where, range(60)))))
"""


def herder(lab: Lab, *argv: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return lab["desk"].run([HERDER, *argv], check=False, timeout_s=timeout_s)


def up(lab: Lab, *argv: str) -> tuple[int, dict[str, object]]:
    done = herder(lab, "up", "--json", *argv)
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    assert isinstance(result, dict)
    return done.returncode, result


def programs(lab: Lab, node: str, module: str) -> set[int]:
    return set(lab[node].processes(f"-m {module}"))


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    specs = [HostSpec("desk", sshd=False), *map(HostSpec, NODES), HostSpec("mute", sshd=False)]
    with Lab(specs) as running:
        yield running


@pytest.fixture
def cluster(lab: Lab) -> Lab:
    """All three nodes up, whatever the last test did."""
    status, result = up(lab, "--hosts", ALL, "--cores", "2")
    assert (status, result["nodes"], result["failures"]) == (0, list(NODES), {})
    return lab


def test_a_client_on_a_fourth_host_runs_a_job_over_all_three(cluster: Lab) -> None:
    listed = herder(cluster, "nodes", "--json")
    assert listed.returncode == 0, listed.stderr
    assert all(f'"{node}"' in listed.stdout for node in NODES)
    done = cluster["desk"].run([sys.executable, "-c", _JOB], timeout_s=90)
    assert done.stdout.split() == list(NODES)


def test_a_second_up_starts_what_is_missing_and_nothing_else(cluster: Lab) -> None:
    before = {node: programs(cluster, node, "herder_agent") for node in NODES}
    coordinator = programs(cluster, "n1", "herder_coordinator")
    (victim,) = before["n2"]
    os.kill(victim, signal.SIGKILL)
    assert wait_until(lambda: not programs(cluster, "n2", "herder_agent"), 5)
    status, result = up(cluster, "--hosts", "n3,n2,n1")
    assert (status, result["nodes"]) == (0, list(NODES))
    after = {node: programs(cluster, node, "herder_agent") for node in NODES}
    assert after["n1"] == before["n1"]
    assert after["n3"] == before["n3"]
    assert len(after["n2"]) == 1
    assert after["n2"] != before["n2"]
    assert [programs(cluster, node, "herder_coordinator") for node in NODES] == [coordinator, set(), set()]


def test_hosts_that_refuse_are_named_and_the_others_stay_up(cluster: Lab) -> None:
    known = cluster["desk"].run("cat /root/.ssh/known_hosts").stdout
    wrong = public_key(cluster.etc / "n1.host_key")
    try:
        cluster["desk"].run(
            f"sed -i 's|^{cluster['n3'].address} .*|{cluster['n3'].address} {wrong}|' ~/.ssh/known_hosts"
        )
        status, result = up(cluster, "--hosts", f"{ALL},mute")
    finally:
        cluster["desk"].run(["bash", "-c", 'printf "%s" "$1" > /root/.ssh/known_hosts', "-", known])
    assert (status, result["nodes"]) == (1, ["n1", "n2"])
    failures = result["failures"]
    assert isinstance(failures, dict)
    assert failures["agent mute"] == f"mute: cannot connect to {cluster['mute'].address} port 22: Connection refused"
    assert failures["agent n3"].startswith("n3: wrong host key: ")
    assert programs(cluster, "n3", "herder_agent"), "an agent that cannot be reached by SSH goes on"


def test_a_busy_port_and_a_host_without_python_are_said_in_one_line(cluster: Lab) -> None:
    address = f"{cluster['n1'].address}:7711"
    elsewhere = ("--http-listen", "127.0.0.1:7799")
    status, result = up(cluster, "--profile", "other", "--hosts", "n1", "--listen", address, *elsewhere)
    failures = result["failures"]
    assert isinstance(failures, dict)
    assert status == 3
    assert address in failures["coordinator"]
    assert "\n" not in failures["coordinator"]
    status, result = up(cluster, "--profile", "other", "--hosts", "n2", "--python", "/nowhere/python3")
    failures = result["failures"]
    assert isinstance(failures, dict)
    assert status == 3
    assert "no CPython 3.11 or later" in failures["agent n2"]
    assert len(programs(cluster, "n1", "herder_coordinator")) == 1


def test_another_coordinator_for_the_same_cluster_is_refused(cluster: Lab) -> None:
    done = herder(cluster, "up", "--hosts", ALL, "--coordinator", "n2")
    assert done.returncode == 2
    assert "the coordinator of this cluster is on n1, not on n2" in done.stderr


def test_secrets_are_private_on_the_nodes_and_in_no_command_line(cluster: Lab) -> None:
    for node in NODES:
        loose = cluster[node].run(
            "find /var/lib/herder -name '*key*' ! -perm 0600; find /var/lib/herder -type d ! -perm 0700"
        )
        assert loose.stdout == ""
    commands = {command for node in NODES for command in cluster[node].processes("herder_").values()}
    assert not [command for command in commands if "PRIVATE KEY" in command]


def test_down_leaves_no_process_on_any_host(cluster: Lab) -> None:
    done = herder(cluster, "down")
    assert done.returncode == 0, done.stdout + done.stderr
    for node in NODES:
        assert cluster[node].processes("herder_") == {}
    again = herder(cluster, "down")
    assert again.returncode == 0, again.stdout + again.stderr

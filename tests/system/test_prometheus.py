"""A real Prometheus scrapes a real cluster: the coordinator, and the agents that it finds through `/sd`."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from herder import LocalCluster
from support.leaks import wait_until
from support.requirements import require_program

pytestmark = [pytest.mark.prometheus, pytest.mark.slow, pytest.mark.timeout(180)]

NODES = {"local-1", "local-2"}

CONFIG = """\
global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs:
  - job_name: herder-coordinator
    static_configs: [{{targets: ["{coordinator}"]}}]
  - job_name: herder-agents
    http_sd_configs: [{{url: "http://{coordinator}/sd", refresh_interval: 1s}}]
"""


def spinner() -> Callable[[int], int]:
    """A task which uses a core for a moment. Made here, so that it travels by value."""

    def spin(n: int) -> int:
        until_s = time.process_time() + 0.05
        while time.process_time() < until_s:
            n += 1
        return n

    return spin


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(cores=2, agents=2) as running, running.client() as client:
        assert len(list(client.map(spinner(), range(24)))) == 24
        yield running


@pytest.fixture(scope="module")
def prometheus(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus that scrapes the cluster."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = folder / "prometheus.yml"
    config.write_text(CONFIG.format(coordinator=cluster.http.removeprefix("http://")))
    checked = subprocess.run(
        [require_program("promtool", "prometheus"), "check", "config", str(config)],
        capture_output=True,
        check=False,
        text=True,
    )
    assert checked.returncode == 0, checked.stderr
    address = f"127.0.0.1:{free_port()}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                require_program("prometheus", "prometheus"),
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        ready = wait_until(lambda: responds(f"http://{address}/-/ready"), 20, 0.1)
        assert ready, (folder / "log").read_text()
        yield address
    finally:
        process.terminate()
        process.wait(20)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


def responds(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as response:
        content = response.read()
    assert isinstance(content, bytes)
    return content


def query(prometheus: str, expression: str) -> dict[str, float]:
    """The value of an instant query, by node ("" where there is no such label)."""
    encoded = urllib.parse.quote(expression)
    data = json.loads(get(f"http://{prometheus}/api/v1/query?query={encoded}"))["data"]
    return {each["metric"].get("node", ""): float(each["value"][1]) for each in data["result"]}


def query_until(prometheus: str, expression: str, holds: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """The value as soon as it `holds`, else the last one."""
    last: dict[str, float] = {}

    def look() -> bool:
        nonlocal last
        last = query(prometheus, expression)
        return holds(last)

    wait_until(look, 30, 0.2)
    return last


def promtool_says(metrics: bytes) -> str:
    done = subprocess.run(
        [require_program("promtool", "prometheus"), "check", "metrics"], input=metrics, capture_output=True, check=False
    )
    return (done.stdout + done.stderr).decode() + ("" if done.returncode == 0 else f"exit {done.returncode}")


def test_promtool_finds_no_fault_with_the_coordinators_metrics(cluster: LocalCluster) -> None:
    assert promtool_says(get(f"{cluster.http}/metrics")) == ""


def test_service_discovery_lists_every_agent_and_promtool_finds_no_fault_with_theirs(cluster: LocalCluster) -> None:
    groups: list[dict[str, Any]] = json.loads(get(f"{cluster.http}/sd"))
    assert {group["labels"]["node"] for group in groups} == NODES
    for group in groups:
        path = group["labels"].get("__metrics_path__", "/metrics")
        assert promtool_says(get(f"http://{group['targets'][0]}{path}")) == ""


def test_prometheus_sees_the_coordinator_and_both_agents_up(prometheus: str) -> None:
    agents = query_until(prometheus, 'up{job="herder-agents"} == 1', lambda found: set(found) == NODES)
    assert set(agents) == NODES
    assert query_until(prometheus, 'up{job="herder-coordinator"}', bool) == {"": 1.0}


def test_core_seconds_add_up_to_the_cores_of_every_node(prometheus: str, cluster: LocalCluster) -> None:
    used = query_until(
        prometheus,
        'sum by (node) (herder_core_seconds_total{job="herder-agents", state="task"})',
        lambda found: set(found) == NODES and sum(found.values()) > 1.0,
    )
    assert sum(used.values()) >= 24 * 0.05 * 0.9
    # The machine's own CPU time, of the same exposition, is the clock: scrapes and expositions have ages of their own.
    passed = 'sum by (node) (rate(herder_cpu_seconds_total{job="herder-agents"}[15s]))'
    cpus = 'count by (node) (count by (node, core) (herder_cpu_seconds_total{job="herder-agents"}))'
    cores = f'sum by (node) (rate(herder_core_seconds_total{{job="herder-agents"}}[15s])) / ({passed} / {cpus})'
    found = query_until(
        prometheus, cores, lambda found: set(found) == NODES and all(abs(each - 1) < 0.1 for each in found.values())
    )
    assert found == {node: pytest.approx(1.0, abs=0.1) for node in NODES}


def test_finished_tasks_and_used_against_allocated_time_can_be_asked_for(prometheus: str) -> None:
    finished = 'sum(herder_tasks_finished_total{outcome="succeeded"})'
    assert query_until(prometheus, finished, bool) == {"": 24.0}
    used = "sum(herder_task_cpu_seconds_total)"
    allocated = "sum(herder_allocated_core_seconds_total)"
    # How much of what was allocated is used depends on who else uses the machine; what they spin does not.
    assert 24 * 0.05 * 0.9 <= query(prometheus, used)[""] < 24 * 0.05 * 5
    (ratio,) = query_until(prometheus, f"{used} / {allocated}", bool).values()
    assert 0.0 < ratio <= 1.1


def test_no_metric_names_a_task_or_a_job(cluster: LocalCluster) -> None:
    text = get(f"{cluster.http}/metrics").decode()
    labels = {part.partition("=")[0] for line in text.splitlines() for part in line.partition("{")[2].split(",")}
    assert labels & {"task", "job", "task_id", "job_id", "attempt"} == set()

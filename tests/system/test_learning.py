"""It learns: what passes every audit and hangs or dies only in use is found out, and no task is lost by it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import herder
from herder_shared.wire.messages import WorkloadInfo

cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = [pytest.mark.slow, pytest.mark.module_state]

WAIT_S = 40
CURE = "deadlocked after fork: every thread waits for a lock that no thread holds; use start='fresh'"


@pytest.fixture(scope="module")
def cluster() -> Iterator[herder.LocalCluster]:
    with herder.LocalCluster(cores=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: herder.LocalCluster) -> Iterator[herder.Client]:
    with cluster.client() as client:
        yield client


def is_forked() -> bool:
    return b"fresh.py" not in Path("/proc/self/cmdline").read_bytes()


def found(client: herder.Client, name: str) -> WorkloadInfo:
    (workload,) = [each for each in client.workloads() if each.name == name]
    return workload


def own(name: str) -> herder.Workload:
    """One that shares nothing with others, as equal workloads do whatever their names are."""
    return herder.Workload(name, env={"WHOSE": name})


def methods(futures: list[Any]) -> set[str]:
    return {future.usage(WAIT_S).start_method for future in futures}


# --- a library that hangs in use -------------------------------------------------------------------------------------

POLARS_THREADS = ("polars-0", "polars-1", "polars-ooc-clea", "tokio-rt-worker", "async-executor-", "jemalloc_bg_thd")


def query_once() -> Any:
    import polars

    return sum_groups(polars.DataFrame({"a": range(200_000), "b": [number % 7 for number in range(200_000)]}))


def sum_groups(frame: Any) -> Any:
    import polars

    frame.lazy().group_by("b").agg(polars.col("a").sum()).collect()
    return frame


def query_again(number: int) -> int:
    return len(sum_groups(herder.shared())) + number


@pytest.fixture
def two_polars_threads() -> dict[str, str]:
    """So that the names of its threads are known, on every machine."""
    pytest.importorskip("polars")
    return {"POLARS_MAX_THREADS": "2"}


def test_polars_after_a_query_runs_under_auto_although_its_threads_were_declared_harmless(
    client: herder.Client, two_polars_threads: dict[str, str]
) -> None:
    workload = herder.Workload("polars", setup=query_once, allow_threads=POLARS_THREADS, env=two_polars_threads)
    view = client.options(workload=workload)
    futures = [view.submit(query_again, number) for number in range(6)]
    assert [future.result(WAIT_S) for future in futures] == [200_000 + number for number in range(6)]
    # The canary has found it out: setup ran in another process, and its value is mapped.
    assert methods(futures) == {"fork"}
    info = found(client, "polars")
    assert info.demoted == ""
    (report,) = info.reports.values()
    assert "deadlocked" in report.reason
    assert report.setup_mode == "mapped"


def test_polars_after_a_query_is_an_error_under_fork(client: herder.Client, two_polars_threads: dict[str, str]) -> None:
    workload = herder.Workload(
        "polars-fork", start="fork", setup=query_once, allow_threads=POLARS_THREADS, env=two_polars_threads
    )
    began_s = time.monotonic()
    with pytest.raises(herder.ForkUnsafe, match="deadlocked"):
        client.options(workload=workload).submit(query_again, 1).result(WAIT_S)
    assert time.monotonic() - began_s < WAIT_S / 2
    assert found(client, "polars-fork").demoted == ""


# --- a service whose thread is not there any more ---------------------------------------------------------------------


class Service:
    """Answers by a thread of its own, as many clients of databases and brokers do."""

    def __init__(self) -> None:
        self.requests: queue.SimpleQueue[tuple[int, queue.SimpleQueue[int]]] = queue.SimpleQueue()
        threading.Thread(target=self.serve, name="service", daemon=True).start()

    def serve(self) -> None:
        while True:
            number, answer = self.requests.get()
            answer.put(number * number)

    def ask(self, number: int) -> int:
        answer: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.requests.put((number, answer))
        return answer.get()


def ask_service(number: int) -> int:
    return int(herder.shared().ask(number))


def test_deadlock_in_use_is_an_error_under_fork(client: herder.Client) -> None:
    workload = herder.Workload("service-fork", start="fork", setup=Service, allow_threads=("service",))
    with pytest.raises(herder.TaskCrashed) as caught:
        client.options(workload=workload).submit(ask_service, 1).result(WAIT_S)
    assert CURE in str(caught.value)
    assert found(client, "service-fork").demoted == ""


def test_no_task_is_lost_and_everybody_is_told(cluster: herder.LocalCluster, client: herder.Client) -> None:
    workload = herder.Workload("service", setup=Service, allow_threads=("service",))
    view = client.options(workload=workload)
    assert list(view.map(ask_service, range(30))) == [number * number for number in range(30)]
    info = found(client, "service")
    (report,) = info.reports.values()
    assert info.demoted == report.demoted == report.reason
    assert report.demoted.startswith("1 forked child deadlocked")
    assert (report.start_method, report.fork_point) == ("fresh", "")
    assert [step.step for step in report.steps][:2] == ["start", "setup"]
    page = json.loads(get(f"{cluster.http}/api/v1/workloads"))
    (told,) = [each for each in page if each["name"] == "service"]
    assert told["demoted"] == info.demoted
    assert 'herder_workloads_demoted_total{reason="deadlock"}' in get(f"{cluster.http}/metrics")
    metrics = get(f"{cluster.http}/agents/{next(iter(info.reports))}/metrics")
    assert 'herder_children_hung_total{start_method="fork"}' in metrics


def test_a_proof_takes_a_third_of_a_second(client: herder.Client) -> None:
    workload = herder.Workload("service-fork", start="fork", setup=Service, allow_threads=("service",))
    view = client.options(workload=workload)
    assert view.submit(os.getpid).result(WAIT_S)
    began_s = time.monotonic()
    with pytest.raises(herder.TaskCrashed, match="deadlocked after fork"):
        view.submit(ask_service, 1).result(WAIT_S)
    assert time.monotonic() - began_s < 3.0


# --- crashes ----------------------------------------------------------------------------------------------------------


def die_if_forked(number: int) -> int:
    if is_forked():
        ctypes.string_at(0)
    return number


def test_two_forked_crashes_which_fresh_ones_survive_demote(client: herder.Client) -> None:
    view = client.options(workload=own("segfaults"))
    assert view.submit(die_if_forked, 1).result(WAIT_S) == 1
    assert found(client, "segfaults").demoted == ""
    assert view.submit(die_if_forked, 2).result(WAIT_S) == 2
    assert found(client, "segfaults").demoted.startswith("2 forked children died of a signal")
    third = view.submit(die_if_forked, 3)
    assert third.result(WAIT_S) == 3
    assert third.usage(WAIT_S).start_method == "fresh"
    with pytest.raises(herder.TaskCrashed, match="deadlocked: every thread"):
        view.submit(deadlock).result(WAIT_S)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_task_that_kills_itself_everywhere_is_blamed_itself(client: herder.Client) -> None:
    view = client.options(workload=own("suicides"))
    for _ in range(3):
        with pytest.raises(herder.TaskCrashed):
            view.submit(die).result(WAIT_S)
    assert found(client, "suicides").demoted == ""
    last = view.submit(is_forked)
    assert last.result(WAIT_S) is True


def deadlock() -> None:
    lock = threading.Lock()
    with lock, lock:
        pass


def test_a_task_that_deadlocks_itself_ends_and_its_workload_forks_on(client: herder.Client) -> None:
    view = client.options(workload=own("own-deadlock"))
    with pytest.raises(herder.TaskCrashed) as caught:
        view.submit(deadlock).result(WAIT_S)
    assert "deadlocked: every thread waits for a lock that no thread holds" in str(caught.value)
    assert found(client, "own-deadlock").demoted == ""
    assert view.submit(is_forked).result(WAIT_S) is True


def get(url: str) -> str:
    with contextlib.closing(urllib.request.urlopen(url, timeout=10)) as response:
        return str(response.read().decode())

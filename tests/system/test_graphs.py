"""Graphs on a cluster: how failures and cancellations spread, and a client that is killed in the middle of one."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from operator import add, neg
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import herder
from herder_shared.states import Outcome
from support.leaks import wait_until

# The nodes cannot import the tests' modules, which lean on pytest's path: their functions travel by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = [pytest.mark.slow, pytest.mark.module_state]

WAIT_S = 60


@pytest.fixture(scope="module")
def cluster() -> Iterator[herder.LocalCluster]:
    with herder.LocalCluster(cores=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: herder.LocalCluster) -> Iterator[herder.Client]:
    with cluster.client() as client:
        yield client


def test_a_graph_of_tasks_in_tasks(client: herder.Client) -> None:
    dsk = {"a": (add, 1, 2), "b": (add, "a", (neg, (add, "a", 1))), "c": [(neg, "b"), "a"]}
    assert client.graph(dsk, [["b"], "c"]) == [[-1], [1, 3]]
    job = client.jobs()[-1]
    assert (job.name, job.tasks) == ("graph", 3)


def wait_and_fail(path: str) -> int:
    while not os.path.exists(path):
        time.sleep(0.01)
    raise LookupError("no")


def sleep(seconds: float, *_after: Any) -> float:
    time.sleep(seconds)
    return seconds


def test_a_failure_spreads_with_its_root_and_ends_the_rest(client: herder.Client, tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    dsk = {
        "root": (wait_and_fail, str(tmp_path / "go")),
        "middle": (neg, "root"),
        "leaf": (neg, "middle"),
        "long": (sleep, 600),
    }
    with pytest.raises(herder.DependencyFailed) as caught:
        client.graph(dsk, ["long", "leaf"])
    assert isinstance(caught.value.__cause__, LookupError)
    assert "'leaf'; what failed first is that of the key 'root'" in caught.value.__notes__[0]
    job, _, index = (caught.value.task_id or "").rpartition(".")
    assert index == "1"
    wait_until(lambda: client.job(job).status().state == "failed", WAIT_S)
    assert client.job(job).status().outcomes[Outcome.CANCELLED] == 1


def test_a_cancelled_dependency_cancels_all_that_need_it(client: herder.Client) -> None:
    with client.options() as view:
        first = view.submit(sleep, 600)
        second = view.submit(neg, first)
        third = view.submit(neg, second)
        first.cancel()
        with pytest.raises(concurrent.futures.CancelledError):
            third.result(WAIT_S)
        assert second.cancelled()


def test_dask_collections_compute_on_a_cluster(client: herder.Client) -> None:
    from dask.delayed import delayed

    import herder.integrations.dask as on_herder

    def inc(number: int) -> int:
        return number + 1

    total = delayed(sum)([delayed(inc)(number) for number in range(5)])
    assert total.compute(scheduler=on_herder.get, client=client) == 15
    with pytest.raises(ZeroDivisionError):
        delayed(inc)(delayed(divmod)(1, 0)).compute(scheduler=on_herder.get, client=client)


# --- failed tasks, once more ------------------------------------------------------------------------------------------


def fail_without(path: str, number: int) -> int:
    if number and not os.path.exists(path):
        raise LookupError(number)
    return number


def test_failed_tasks_are_run_again(client: herder.Client, tmp_path: Path) -> None:
    path = tmp_path / "there"
    job = client.array(fail_without, [str(path)] * 4, range(4))
    assert job.wait(WAIT_S)
    assert sorted(job.failures()) == [1, 2, 3]
    assert job.retry_failed() == 3
    assert job.wait(WAIT_S)
    assert sorted(job.failures()) == [1, 2, 3]
    path.touch()
    assert job.retry_failed() == 3
    assert list(job.results(WAIT_S)) == [0, 1, 2, 3]
    assert job.retry_failed() == 0
    assert job.status().outcomes == {Outcome.SUCCEEDED: 4}
    assert job.progress().ended == 4


def test_a_dependant_is_run_again_with_what_it_needs(
    cluster: herder.LocalCluster, client: herder.Client, tmp_path: Path
) -> None:
    """Of a detached job, by another client."""
    path = tmp_path / "there"
    with client.options(detached=True) as view:
        last = view.submit(neg, view.submit(fail_without, str(path), 7))
        assert isinstance(last.exception(WAIT_S), herder.DependencyFailed)
    path.touch()
    with cluster.client() as another:
        job = another.job(last.job_id)
        assert job.retry_failed() == 2
        assert list(job.results(WAIT_S)) == [7, -7]
    with cluster.client() as later:
        assert list(later.job(last.job_id).results(WAIT_S)) == [7, -7]


# --- a client killed in mid-graph ------------------------------------------------------------------------------------

_SCRIPT = """
import os, sys, time, herder
from operator import add
folder = sys.argv[1]

def slow(folder, n):
    import os, time
    open(f"{folder}/began-{n}", "w").close()
    while not os.path.exists(f"{folder}/go"):
        time.sleep(0.01)
    print("task", n)
    return n

grace = float(sys.argv[2]) if sys.argv[2] != "detached" else None
client = herder.Client(detached=grace is None, disconnect_grace=grace, name="killed")
one, two = client.submit(slow, folder, 1), client.submit(slow, folder, 2)
both = client.submit(add, one, two)
failing = client.submit(divmod, both, 0)
client.status()
with open(f"{folder}/job.tmp", "w") as file:
    file.write(both.job_id)
os.rename(f"{folder}/job.tmp", f"{folder}/job")
time.sleep(600)
"""


def killed_in_mid_graph(cluster: herder.LocalCluster, folder: Path, how: str) -> str:
    """A client that submits a small graph and is killed while its first tasks run: the graph's job."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(folder), how], env={**os.environ, **cluster.environ}, start_new_session=True
    )
    try:
        assert wait_until(lambda: (folder / "job").exists() and (folder / "began-1").exists(), WAIT_S)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    return (folder / "job").read_text()


def test_a_detached_graph_goes_on_without_its_client_and_is_found_again(
    cluster: herder.LocalCluster, tmp_path: Path
) -> None:
    """FAULTS 41: killed in mid-graph and attached again from elsewhere, while it runs and when it has ended; the
    coordinator is killed in between, too."""
    job_id = killed_in_mid_graph(cluster, tmp_path, "detached")
    with cluster.client() as elsewhere:
        job = elsewhere.job(job_id)
        assert len(job) == 4
        assert not job.wait(0.01)
        os.kill(cluster.processes["coordinator"].pid, signal.SIGKILL)
        (tmp_path / "go").touch()
        cluster.restart("coordinator")
        assert job.wait(WAIT_S)
        check_results(job)
    with cluster.client() as later:
        check_results(later.job(job_id))


def check_results(job: herder.Job) -> None:
    assert job.wait(WAIT_S)
    results = job.results()
    assert [next(results) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert isinstance(job.failures()[3], ZeroDivisionError)
    assert b"task 1" in job.logs(0).stdout
    assert job.future(2).usage(WAIT_S).node == "local-1"


def test_a_graph_that_is_not_detached_can_be_followed_during_the_grace(
    cluster: herder.LocalCluster, tmp_path: Path
) -> None:
    job_id = killed_in_mid_graph(cluster, tmp_path, "60")
    with cluster.client() as elsewhere:
        job = elsewhere.job(job_id)
        (tmp_path / "go").touch()
        check_results(job)


def test_what_is_not_detached_ends_when_the_grace_is_over(cluster: herder.LocalCluster, tmp_path: Path) -> None:
    job_id = killed_in_mid_graph(cluster, tmp_path, "0.2")
    with cluster.client() as elsewhere:
        wait_until(lambda: elsewhere.job(job_id).status().state == "cancelled", WAIT_S)
        assert elsewhere.job(job_id).status().outcomes == {Outcome.CANCELLED: 4}


def test_a_running_job_is_followed_from_elsewhere_with_what_was_delivered_before(
    cluster: herder.LocalCluster, client: herder.Client, tmp_path: Path
) -> None:
    def when_told(path: str, number: int) -> int:
        while number == 2 and not os.path.exists(path):
            time.sleep(0.01)
        return number

    path = tmp_path / "go"
    job = client.array(when_told, [str(path)] * 3, range(3))
    first = job.results(WAIT_S)
    assert [next(first), next(first)] == [0, 1]
    with cluster.client() as elsewhere:
        found = elsewhere.job(job.id)
        path.touch()
        assert list(found.results(WAIT_S)) == [0, 1, 2]

"""Tasks that submit tasks and wait for them, on one core: a slot that is not given up would be a deadlock."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
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
#: What a client needs is imported once, in the template.
WORKLOAD = herder.Workload(preload=["herder.task_client"])


@pytest.fixture(scope="module")
def cluster() -> Iterator[herder.LocalCluster]:
    with herder.LocalCluster(cores=1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: herder.LocalCluster) -> Iterator[herder.Client]:
    with cluster.client(workload=WORKLOAD) as client:
        yield client


def double(value: int) -> int:
    return 2 * value


def fib(n: int) -> int:
    if n < 2:
        return n
    mine = herder.current_client()
    first, second = mine.submit(fib, n - 1), mine.submit(fib, n - 2)
    return first.result() + second.result()


def test_recursion_ends(client: herder.Client) -> None:
    assert client.submit(fib, 6).result(WAIT_S) == 8


def every_way(numbers: list[int]) -> dict[str, Any]:
    import asyncio
    import concurrent.futures

    mine = herder.current_client()
    futures = [mine.submit(double, number) for number in numbers]
    done, _ = concurrent.futures.wait([mine.submit(double, number) for number in numbers])
    with herder.current_client() as another:
        left = another.submit(double, 50)
    job = mine.array(double, numbers)
    return {
        "as_completed": sorted(future.result() for future in concurrent.futures.as_completed(futures)),
        "wait": sorted(future.result() for future in done),
        "map": list(mine.map(double, numbers)),
        "with": (left.done(), left.result()),
        "results": list(job.results()),
        "gather": asyncio.run(mine.gather(*(mine.submit(double, number) for number in numbers))),
        "depends": mine.submit(double, mine.submit(double, 1)).result(),
        "command": mine.command(["echo", "so"]).result().text(),
    }


@pytest.mark.parametrize(
    "workload",
    [WORKLOAD, herder.Workload(start="fresh"), herder.Workload(max_tasks_per_child=None)],
    ids=["forked", "fresh", "reused"],
)
def test_every_way_of_waiting_gives_the_slot_up(client: herder.Client, workload: herder.Workload) -> None:
    found = client.options(workload=workload).submit(every_way, [1, 2, 3]).result(WAIT_S)
    doubled = [2, 4, 6]
    assert found == {
        "as_completed": doubled,
        "wait": doubled,
        "map": doubled,
        "with": (True, 100),
        "results": doubled,
        "gather": doubled,
        "depends": 4,
        "command": "so\n",
    }


def from_threads(numbers: list[int]) -> list[int]:
    from concurrent.futures import ThreadPoolExecutor

    mine = herder.current_client()
    with ThreadPoolExecutor(3) as threads:
        return list(threads.map(lambda number: mine.submit(double, number).result(), numbers))


def test_threads_of_a_task_wait_side_by_side(client: herder.Client) -> None:
    assert client.submit(from_threads, [1, 2, 3]).result(WAIT_S) == [2, 4, 6]


def wait_for_a_sleeper(seconds: float) -> tuple[str, str]:
    import time

    child = herder.current_client().submit(time.sleep, seconds)
    child.result()
    return child.job_id, child.usage().start_method


def test_time_given_up_is_not_charged_and_children_start_as_their_parent_did(client: herder.Client) -> None:
    future = client.submit(wait_for_a_sleeper, 1.0)
    job, start_method = future.result(WAIT_S)
    usage = future.usage(WAIT_S)
    assert usage.core_s < usage.wall_s - 0.9
    assert start_method == "fork"
    child = next(info for info in client.jobs() if info.job == job)
    parent = next(info for info in client.jobs() if info.job == future.job_id)
    assert (child.owner, child.workload) == (parent.owner, parent.workload)
    assert len(client.workloads()) == len({(info.key) for info in client.workloads()})


# --- ends ------------------------------------------------------------------------------------------------------------


def submit_and(end: Callable[[], Any], folder: str, *, detached: bool = False) -> str:
    """Submit what writes a file a little later, and do not wait for it."""

    def later(path: str) -> None:
        import time

        time.sleep(0.3)
        with open(path, "w"):
            pass

    mine = herder.current_client()
    job = mine.options(detached=detached).submit(later, f"{folder}/wrote").job_id
    mine.status()  # answered after what was said before: the submission is known
    with open(f"{folder}/job.tmp", "w") as file:
        file.write(job)
    import os

    os.rename(f"{folder}/job.tmp", f"{folder}/job")
    end()
    return job


def nothing() -> None:
    """The task returns."""


def fail() -> None:
    raise LookupError("no")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep() -> None:
    time.sleep(600)


def outcomes_of(client: herder.Client, job: str) -> dict[Outcome, int]:
    wait_until(lambda: sum(client.job(job).status().outcomes.values()) == 1, WAIT_S)
    return client.job(job).status().outcomes


def test_a_task_that_returns_waits_for_what_it_submitted(client: herder.Client, tmp_path: Path) -> None:
    job = client.submit(submit_and, nothing, str(tmp_path)).result(WAIT_S)
    assert outcomes_of(client, job) == {Outcome.SUCCEEDED: 1}
    assert (tmp_path / "wrote").exists()


@pytest.mark.parametrize("end", [fail, die], ids=["fails", "dies"])
def test_what_it_submitted_ends_with_a_task_that_does_not_return(
    client: herder.Client, tmp_path: Path, end: Callable[[], None]
) -> None:
    future = client.options(idempotent=False).submit(submit_and, end, str(tmp_path))
    assert isinstance(future.exception(WAIT_S), LookupError if end is fail else herder.TaskCrashed)
    assert outcomes_of(client, (tmp_path / "job").read_text()) == {Outcome.CANCELLED: 1}


def test_what_it_submitted_ends_with_a_task_that_is_cancelled(client: herder.Client, tmp_path: Path) -> None:
    future = client.submit(submit_and, sleep, str(tmp_path))
    assert wait_until((tmp_path / "job").exists, WAIT_S)
    future.cancel()
    assert outcomes_of(client, (tmp_path / "job").read_text()) == {Outcome.CANCELLED: 1}


def test_what_is_detached_outlives_the_task(client: herder.Client, tmp_path: Path) -> None:
    future = client.submit(submit_and, fail, str(tmp_path), detached=True)
    assert isinstance(future.exception(WAIT_S), LookupError)
    assert outcomes_of(client, (tmp_path / "job").read_text()) == {Outcome.SUCCEEDED: 1}


def test_a_restarted_coordinator_finds_parents_and_children(
    cluster: herder.LocalCluster, client: herder.Client, tmp_path: Path
) -> None:
    def parent(folder: str) -> int:
        def child(path: str) -> int:
            import os
            import time

            open(f"{path}/runs", "w").close()
            while not os.path.exists(f"{path}/go"):
                time.sleep(0.02)
            return 41

        mine = herder.current_client()
        return mine.submit(double, mine.submit(child, folder)).result() + 1

    future = client.submit(parent, str(tmp_path))
    assert wait_until((tmp_path / "runs").exists, WAIT_S)
    os.kill(cluster.processes["coordinator"].pid, signal.SIGKILL)
    (tmp_path / "go").touch()
    cluster.restart("coordinator")
    assert future.result(WAIT_S) == 83


# --- who may not -----------------------------------------------------------------------------------------------------


def test_there_is_no_client_outside_a_task() -> None:
    with pytest.raises(RuntimeError, match="only inside a task"):
        herder.current_client()


def test_no_other_process_of_a_task_is_its_client(client: herder.Client) -> None:
    def task() -> tuple[str, int]:
        import multiprocessing

        mine = herder.current_client()

        def other(pipe: Any) -> None:
            try:
                mine.submit(double, 1)
            except herder.HerderError as error:
                pipe.send(str(error))

        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=other, args=(theirs,))
        process.start()
        process.join()
        return ours.recv(), mine.submit(double, 1).result()

    message, value = client.submit(task).result(WAIT_S)
    assert "before a fork" in message
    assert value == 2


def test_a_task_may_not_drain_a_node(client: herder.Client) -> None:
    def task() -> None:
        herder.current_client().drain("local-1")

    assert isinstance(client.submit(task).exception(WAIT_S), herder.Unauthorized)

"""Cancellations that race with ends, come late, or come by the hundred thousand (FAULTS 40)."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator

import cloudpickle
import pytest

import herder
from herder_shared.states import Outcome
from support.leaks import wait_until

# The nodes cannot import the tests' modules, which lean on pytest's path: their functions travel by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = [pytest.mark.slow, pytest.mark.module_state]

WAIT_S = 60
SEED = 20261127


@pytest.fixture(scope="module")
def client() -> Iterator[herder.Client]:
    with herder.LocalCluster(cores=2) as cluster, cluster.client() as client:
        yield client


def test_very_many_tasks_are_cancelled_at_once(client: herder.Client) -> None:
    job = client.array(time.sleep, [600] * 100_000)
    assert wait_until(lambda: len(job) == 100_000, WAIT_S)
    with client.options() as view:
        futures = [view.submit(time.sleep, 600) for _ in range(2_000)]
        for future in futures:
            assert future.cancel()
    job.cancel()
    assert job.wait(WAIT_S)
    assert job.progress().cancelled == 100_000
    outcomes = client.job(futures[0].job_id).status().outcomes
    assert outcomes == {Outcome.CANCELLED: 2_000}


def appended(path: str, number: int) -> int:
    with open(path, "a") as file:
        file.write(f"{number}\n")
    return number


def test_a_cancellation_that_races_with_the_end_leaves_one_outcome(client: herder.Client, tmp_path: object) -> None:
    path = f"{tmp_path}/ran"
    chance = random.Random(SEED)
    view = client.options(idempotent=False, workload=herder.Workload(max_tasks_per_child=None))
    futures = []
    for number in range(300):
        futures.append(view.submit(appended, path, number))
        if number % 3 == 0:
            chance.choice(futures[-20:]).cancel()
        if number % 30 == 0:
            futures[-1].exception(WAIT_S) if not futures[-1].cancelled() else None
    view.shutdown()
    with open(path) as file:
        ran = [int(line) for line in file]
    assert len(ran) == len(set(ran)), f"seed {SEED}: a task ran twice"
    assert all(future.cancelled() or future.result() == number for number, future in enumerate(futures))
    kept = {number for number, future in enumerate(futures) if not future.cancelled()}
    assert kept <= set(ran)
    outcomes = client.job(futures[0].job_id).status().outcomes
    assert sum(outcomes.values()) == 300
    assert outcomes[Outcome.SUCCEEDED] >= len(kept)
    assert set(outcomes) <= {Outcome.SUCCEEDED, Outcome.CANCELLED}


def test_cancelling_what_has_ended_changes_nothing(client: herder.Client) -> None:
    view = client.options(detached=True)
    future = view.submit(abs, -3)
    assert future.result(WAIT_S) == 3
    assert not future.cancel()
    job = client.job(future.job_id)
    assert job.wait(WAIT_S)
    job.cancel()
    view.shutdown()
    client.status()
    assert job.status().outcomes == {Outcome.SUCCEEDED: 1}
    assert list(client.job(future.job_id).results(WAIT_S)) == [3]


def test_a_cancelled_task_and_what_it_started_are_gone_soon(client: herder.Client, tmp_path: object) -> None:
    pids = f"{tmp_path}/pids"

    def stubborn(path: str) -> None:
        import os
        import signal
        import subprocess
        import time

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        with open(f"{path}.tmp", "w") as file:
            file.write(f"{os.getpid()} {child.pid}")
        os.rename(f"{path}.tmp", path)
        time.sleep(600)

    import os

    future = client.submit(stubborn, pids)
    assert wait_until(lambda: os.path.exists(pids), WAIT_S)
    with open(pids) as file:
        own, below = map(int, file.read().split())
    future.cancel()
    assert wait_until(lambda: not os.path.exists(f"/proc/{own}") and not os.path.exists(f"/proc/{below}"), WAIT_S)

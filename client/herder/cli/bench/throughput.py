"""How many empty tasks a second pass through client, coordinator and agent when processes are reused?

One by one: a `submit` for each and a `Future` for each, then waiting for all. As an array: one call. Both with
`max_tasks_per_child=None`, so that it is the way that is measured and not the kernel's fork.
"""

from __future__ import annotations

from concurrent.futures import wait
from typing import Any

from herder.cli.bench.figure import (
    RUN_TIMEOUT_S,
    RUNS,
    Conditions,
    Figure,
    cluster_of_one,
    median,
    no_op,
    rate_of,
    run_array,
    tasks_for,
    too_slow,
)


def one_by_one(conditions: Conditions) -> list[Figure]:
    """N submits, then wait for all."""
    nothing = no_op()

    def run(view: Any, tasks: int) -> None:
        futures = [view.submit(nothing) for _ in range(tasks)]
        if wait(futures, RUN_TIMEOUT_S).not_done:
            raise too_slow(tasks)

    return measure("one-by-one", run, 6_000.0, 10_000.0, conditions)


def array(conditions: Conditions) -> list[Figure]:
    """One array job of N tasks."""
    nothing = no_op()

    def run(view: Any, tasks: int) -> None:
        run_array(view, nothing, tasks)

    return measure("array", run, 30_000.0, 100_000.0, conditions)


def measure(name: str, run_on: Any, must: float, aim: float, conditions: Conditions) -> list[Figure]:
    """The median rate of five runs."""
    import herder

    workload = herder.Workload(f"bench-{name}", max_tasks_per_child=None)
    with cluster_of_one(conditions) as (_, client):
        view = client.options(workload=workload, name=name)

        def run(tasks: int) -> None:
            run_on(view, tasks)

        tasks = tasks_for(run, conditions.seconds)
        rates = tuple(rate_of(run, tasks) for _ in range(RUNS))
    return [Figure(name, median(rates), "tasks/s", must, aim, detail=f"{tasks} tasks a run", runs=rates)]

"""How long does a caller wait for an empty task, one at a time: in a process of its own, and in a reused one?

`compare` asks both in turn, on one cluster, so that each finds the machine as the other did; a forked task then always
finds a child which was forked while the other's was under way. Its figure is the ratio of the medians.

Measured in the client from `submit` to the return of `result()`: pickling, TLS, the journal's disk, placement, the
child, and all the way back.
"""

from __future__ import annotations

import time

from herder.cli.bench.figure import (
    TASKS_MIN,
    Conditions,
    Figure,
    cluster_of_one,
    median,
    no_op,
    percentile,
    times_in_turn,
)


def measure(
    name: str, max_tasks_per_child: int | None, must_ms: float, aim_ms: float, conditions: Conditions
) -> list[Figure]:
    """Median and 99th percentile of one-at-a-time round trips over about the seconds asked for."""
    import herder

    workload = herder.Workload(f"bench-{name}", max_tasks_per_child=max_tasks_per_child)
    nothing = no_op()
    times_ms: list[float] = []
    with cluster_of_one(conditions) as (_, client):
        view = client.options(workload=workload, name=name)
        for _ in range(TASKS_MIN // 4):
            view.submit(nothing).result()
        ends = time.perf_counter() + 2 * conditions.seconds
        while len(times_ms) < TASKS_MIN or time.perf_counter() < ends:
            began = time.perf_counter()
            view.submit(nothing).result()
            times_ms.append(1e3 * (time.perf_counter() - began))
    detail = f"{len(times_ms)} one at a time"
    return [
        Figure(f"{name} p50", median(times_ms), "ms", must_ms, aim_ms, best_is_low=True, detail=detail),
        Figure(f"{name} p99", percentile(times_ms, 99), "ms", best_is_low=True, detail=detail),
    ]


def compare(conditions: Conditions) -> list[Figure]:
    """The median of a forked task over that of a reused process."""
    import herder

    nothing = no_op()
    with cluster_of_one(conditions) as (_, client):
        views = [
            client.options(workload=herder.Workload(f"bench-compare-{name}", max_tasks_per_child=most), name=name)
            for name, most in (("forked", 1), ("reused", None))
        ]
        calls = [lambda view=view: view.submit(nothing).result() for view in views]
        of_forked, of_reused = times_in_turn(calls, 4 * conditions.seconds)
    ratio = median(of_forked) / median(of_reused)
    detail = f"{1e3 * median(of_forked):.2f} ms against {1e3 * median(of_reused):.2f} ms, {len(of_forked)} each in turn"
    return [Figure("forked-against-reused", ratio, "times", 1.5, best_is_low=True, detail=detail)]


def forked(conditions: Conditions) -> list[Figure]:
    """A process for each task."""
    return measure("round-trip-forked", 1, 2.0, 1.2, conditions)


def reused(conditions: Conditions) -> list[Figure]:
    """`max_tasks_per_child=None`."""
    return measure("round-trip-reused", None, 1.2, 0.7, conditions)

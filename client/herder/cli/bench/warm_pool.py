"""A task in a fresh interpreter with scikit-learn preloaded: from the warm pool, against a cold start.

Two workloads with `start="fresh"`, one process per task. *Cold* keeps nothing warm (`warm=0`), so each of its tasks
waits for an interpreter to start and import. *Warm* keeps one (`warm=1`) and is asked once in the time that three cold
starts take, a demand which the pool can follow. In turn; latency from `submit` to the return of `result()`; the figure
is the ratio of the medians.
"""

from __future__ import annotations

import time

from herder.cli.bench.figure import (
    RUN_TIMEOUT_S,
    Conditions,
    Figure,
    cluster_of_one,
    median,
    need_modules,
    no_op,
    timed,
)

ROUNDS = 7
#: A machine on which a cold start takes many seconds gets fewer rounds, and at least so many.
ROUNDS_MIN = 3
BUDGET_S = 60.0
MODULES = ("numpy", "sklearn.ensemble")


def measure(conditions: Conditions) -> list[Figure]:
    """Warm over cold."""
    import herder

    need_modules(*MODULES)
    nothing = no_op()
    with cluster_of_one(conditions) as (_, client):
        cold, warm = (
            client.options(workload=herder.Workload(f"bench-{name}", start="fresh", preload=MODULES, warm=kept))
            for name, kept in (("cold", 0), ("warm", 1))
        )
        cold_s: list[float] = []
        warm_s: list[float] = []

        def cold_one() -> None:
            cold.submit(nothing).result(timeout=RUN_TIMEOUT_S)

        def warm_one() -> None:
            warm.submit(nothing).result(timeout=RUN_TIMEOUT_S)

        cold_one()  # the files are in the page cache
        warm_one()
        began = time.perf_counter()
        while len(warm_s) < ROUNDS_MIN or (len(warm_s) < ROUNDS and time.perf_counter() - began < BUDGET_S):
            cold_s.append(timed(cold_one))
            time.sleep(2 * cold_s[-1])
            warm_s.append(timed(warm_one))
    runs = tuple(mine / other for mine, other in zip(warm_s, cold_s, strict=True))
    detail = f"{1e3 * median(warm_s):.1f} ms warm, {1e3 * median(cold_s):.0f} ms cold, {len(warm_s)} of each in turn"
    ratio = median(warm_s) / median(cold_s)
    return [Figure("warm-pool", ratio, "times", 0.02, best_is_low=True, detail=detail, runs=runs)]

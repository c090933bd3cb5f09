"""Is what a sealed template holds what `setup` made, in fork after fork, whatever earlier children did to theirs?

Sealing moves a template's memory, at its addresses, into memory files (decisions 10 and 11), makes objects immortal
and pins pages: a mistake there would be a wrong value, now and then. So each of many thousand tasks verifies a part of
a value of many kinds of objects and arrays (`soak_values`; every 100th task all of it), then writes to it, or frees
half of it and allocates in its place. Asked of each interpreter that is named, in turn, in several lives of its
template, since each is laid out differently.

`python benchmarks/soak_forks.py [--tasks 20000] [--lives 10] [PYTHON...]`. Exit status 1 where a task failed or hung,
one was not forked, or nothing was moved. Last figures: docs/PERFORMANCE.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from typing import NamedTuple

from fork_table import await_end

import herder
from herder_shared.wire.messages import WorkloadReport

#: Tasks that are waited for together.
CHUNK_TASKS = 200
#: While no task ends for so long, those that are left hang.
STALL_S = 120.0


class Life(NamedTuple):
    """One template, and the tasks that were forked from it."""

    tasks: int
    seconds: float
    failures: list[str]
    methods: Counter[str]
    #: How it was sealed, in the template's words.
    applied: tuple[str, ...]

    @property
    def faults(self) -> list[str]:
        """Why it does not count as good."""
        others = {method: count for method, count in self.methods.items() if method != "fork"}
        return [
            *self.failures,
            *([f"tasks were not forked: {others}"] if others else []),
            *([] if any("moved into a memory file" in each for each in self.applied) else ["nothing was moved"]),
        ]


def main() -> int:
    """Each interpreter, one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pythons", nargs="*", default=[sys.executable], metavar="PYTHON", help="interpreters")
    parser.add_argument("--tasks", type=int, default=20_000, help="of each interpreter")
    parser.add_argument("--lives", type=int, default=10, help="templates of each interpreter")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    is_bad = False
    for python in given.pythons:
        for number in range(given.lives):
            life = live(python, given.tasks // given.lives, given.cores, seed=number)
            rate = life.tasks / life.seconds
            print(
                f"{python}: life {number + 1}: {life.tasks} tasks, {rate:.0f}/s; {'; '.join(life.applied)}", flush=True
            )
            for fault in life.faults[:10]:
                print(f"  {fault}", file=sys.stderr)
            is_bad |= bool(life.faults)
    return 1 if is_bad else 0


def live(python: str, tasks: int, cores: int, *, seed: int) -> Life:
    """A cluster with one template, `tasks` forks of it."""
    workload = herder.Workload(
        "soak",
        python=python,
        preload=("soak_values",),
        setup="soak_values:setup",
        # Another layout of sets and dicts each time.
        env={"PYTHONHASHSEED": str(seed)},
    )
    failures, methods = list[str](), Counter[str]()
    done = 0
    with herder.LocalCluster(cores=cores) as cluster, cluster.client(workload=workload) as client:
        import soak_values

        began = time.perf_counter()
        for first in range(0, tasks, CHUNK_TASKS):
            count = min(CHUNK_TASKS, tasks - first)
            job = client.array(soak_values.task, range(first, first + count))
            if not await_end(job, STALL_S):
                failures.append(f"{count - job.progress().ended} tasks hang")
                job.cancel()
                break
            for future in job.as_completed():
                error = future.exception()
                if error is None and future.result() == first + future.index:
                    done += 1
                else:
                    failures.append(f"task {first + future.index}: {error!r}")
                methods[future.usage().start_method] += 1
        seconds = time.perf_counter() - began
        return Life(done, seconds, failures, methods, seals(client))


def seals(client: herder.Client) -> tuple[str, ...]:
    """What was done when the template was sealed."""
    reports: list[WorkloadReport] = [report for each in client.workloads() for report in each.reports.values()]
    return tuple(text for report in reports for step in report.steps if step.step == "seal" for text in step.applied)


if __name__ == "__main__":
    sys.exit(main())
